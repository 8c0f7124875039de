"""The lead: shard 0, which keeps the order of a run.

It shows progress, lets the workers pause for a checkpoint and writes it, releases them after the warmstart, and ends
the run when all have finished or a signal asked for it.  It acts on messages and on the clock, and never waits for a
worker.
"""

from __future__ import annotations

import signal
import time
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.attempts import Attempts
from dbmpi.checkpoint.collect import Part, finite, save
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.meaning import Meaning
from dbmpi.checkpoint.retention import kept
from dbmpi.checkpoint.schema import CheckpointInfo, library_versions
from dbmpi.config import Run
from dbmpi.errors import DiskFailed, RunFailed
from dbmpi.monitor.measures import Rate
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.records import EvaluationReport, Recorder, StalenessHistogram
from dbmpi.monitor.verdict import Recent
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox, Message, MessageKind, Role
from dbmpi.mpi.topology import Plan
from dbmpi.objective import Outcome
from dbmpi.paramserver.server import Tally
from dbmpi.replica.arrangement import Arrangement
from dbmpi.session import StartingPoint

if TYPE_CHECKING:
    from dbmpi.downpour.shard import Shard


class _State(Enum):
    RUNNING = auto()
    PAUSED = auto()
    FINISHED = auto()


class Lead:
    """Keeps the order of a run.

    Attributes
    ----------
    ended
        Whether training is over.
    stopped_by
        Number of the signal that ended it early; 0 if it ran to its end.
    checkpoint
        The last checkpoint written.
    steps, samples
        What all replicas have taken and learned from in this session, as far as it is applied.
    staleness
        Of all pushes of this session that shard 0 has applied.
    recent
        The losses of the last samples learned from.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        run: Run,
        plan: Plan,
        arrangement: Arrangement,
        begin: StartingPoint,
        *,
        mailbox: Mailbox,
        recorder: Recorder,
        progress: RunProgress,
        input_shape: tuple[int, ...],
        classes: int,
        meaning: Meaning,
        samples_per_epoch: int,
        batches_per_epoch: int,
    ) -> None:
        self._comm = comm
        self._run = run
        self._plan = plan
        self._arrangement = arrangement
        self._begin = begin
        self._mailbox = mailbox
        self._recorder = recorder
        self._progress = progress
        self._rate = Rate()
        self._input_shape = input_shape
        self._classes = classes
        self._meaning = meaning
        self._samples_per_epoch = samples_per_epoch
        self._batches_per_epoch = batches_per_epoch
        self._states = [_State.RUNNING] * plan.replicas
        self._learned = [0] * plan.replicas
        self._pausing = False
        self._version = 0
        self._said_alive = time.monotonic()
        self._attempts = Attempts(run.checkpoint, run.checkpoint.retry_seconds, progress.warn)
        self._saved_version: int | None = None
        self.steps = 0
        self.samples = 0
        self.staleness = StalenessHistogram()
        self.recent = Recent(samples_per_epoch)
        self.ended = False
        self.stopped_by = 0
        self.checkpoint: Path | None = None

    def hear(self, message: Message) -> None:
        """Take in what a worker or another shard says."""
        kind, values = message.kind, message.values
        if kind in (MessageKind.PAUSED, MessageKind.FINISHED):
            replica = self._replica(message.source)
            self._learned[replica] = values[0]
            self._states[replica] = _State.PAUSED if kind == MessageKind.PAUSED else _State.FINISHED
        elif kind == MessageKind.WARM:
            self._tell_workers(MessageKind.RELEASE)
        elif kind == MessageKind.STOP_ASKED and not self.stopped_by:
            self.stopped_by = values[0]
            name = signal.Signals(self.stopped_by).name
            self._progress.message(f"{name}: the run ends after the current steps")
            self._tell_workers(MessageKind.STOP)
        elif kind == MessageKind.FAILED:
            replica = self._replica(message.source)
            self._learned[replica], self._states[replica] = values[0], _State.FINISHED
            self._progress.message(f"replica {replica} has failed: a checkpoint is written, and the run ends")
            self._tell_workers(MessageKind.STOP)
        elif kind == MessageKind.EVALUATION:
            loss = float(np.array([values[3]], np.int64).view(np.float64)[0])
            self.evaluated(Outcome(values[1], loss, values[2]), values[0] / self._batches_per_epoch)
        elif kind == MessageKind.ALIVE:
            self._say_alive()

    def look(self, shard: Shard) -> bool:
        """Act on what has been heard and on the clock; return whether anything was done."""
        if self.ended:
            return False
        if self._saved_version is None:  # what the run begins with needs no checkpoint
            self._saved_version = shard.version
        if shard.version != self._version:
            self._version = shard.version
            self._say_alive()
        if all(state == _State.FINISHED for state in self._states):
            return self._end(shard)
        if self._pausing:
            if any(state == _State.RUNNING for state in self._states):
                return False
            self._write_checkpoint(shard)
            self._pausing = False
            self._states = [_State.RUNNING if s == _State.PAUSED else s for s in self._states]
            self._tell_workers(MessageKind.GO)
            return True
        # What has been written need not be written again; and nobody is to pause for ever where the time is tiny.
        if self._attempts.due and not self.stopped_by and shard.version != self._saved_version:
            self._pausing = True
            self._tell_workers(MessageKind.PAUSE)
            return True
        return False

    def advance(self, tally: Tally, seconds: float) -> None:
        """Show what was learned in the last `seconds`."""
        outcome = tally.outcome
        self.steps += tally.steps
        self.samples += outcome.samples
        self.recent.add(outcome)
        self.staleness.merge(tally.staleness)
        self._rate.add(outcome.samples, seconds)
        if outcome.samples:
            self._progress.update(
                self._begin.samples + self.samples,
                outcome.mean_loss,
                outcome.accuracy,
                self._rate.per_second,
                tally.staleness.mean,
            )

    def evaluated(self, outcome: Outcome, epoch: float) -> None:
        """Record and show an evaluation on the test data."""
        self._recorder.write(
            EvaluationReport(
                step=self.steps,
                epoch=epoch,
                loss=outcome.mean_loss,
                accuracy=outcome.accuracy,
                samples=outcome.samples,
            )
        )
        self._progress.evaluation(epoch, outcome.mean_loss, outcome.accuracy, outcome.samples)

    def awaited(self) -> str:
        """Say whom the run waits for."""
        late = [replica for replica, state in enumerate(self._states) if state == _State.RUNNING]
        if not late:
            return "the workers to leave"
        ranks = [self._plan.worker_ranks[replica * self._plan.partitions] for replica in late]
        who = ", ".join(f"replica {replica} on rank {rank}" for replica, rank in zip(late, ranks, strict=True))
        return f"{who} to {'come to rest for a checkpoint' if self._pausing else 'push or to finish'}"

    @property
    def epoch(self) -> float:
        """Passes through the training samples by all replicas together, over all sessions."""
        return (self._begin.samples + self.samples) / self._samples_per_epoch

    def _replica(self, rank: int) -> int:
        worker = self._plan.worker_of(rank)
        assert worker is not None
        return worker // self._plan.partitions

    def _tell_workers(self, kind: MessageKind) -> None:
        """Send an order to all replicas that can still obey: to their first workers, and to all what concerns all."""
        for replica, state in enumerate(self._states):
            everybody = kind in (MessageKind.END, MessageKind.ALIVE)
            if state != _State.FINISHED or everybody:
                first = replica * self._plan.partitions
                for worker in range(first, first + (self._plan.partitions if everybody else 1)):
                    self._mailbox.send(self._plan.worker_ranks[worker], Role.WORKER, kind)

    def _say_alive(self) -> None:
        """Tell all ranks that wait that the run moves, in time before they give it up."""
        if time.monotonic() - self._said_alive >= waiting.STALL_SECONDS / 4:
            self._said_alive = time.monotonic()
            self._tell_workers(MessageKind.ALIVE)
            for rank in self._plan.shard_ranks[1:]:
                self._mailbox.send(rank, Role.SHARD, MessageKind.ALIVE)

    def _end(self, shard: Shard) -> bool:
        """Write the last checkpoint, and let all end; return whether anything was done."""
        failed = self._attempts.failed
        if not self._write_checkpoint(shard, last=True):
            return self._attempts.failed != failed
        self._tell_workers(MessageKind.END)
        for rank in self._plan.shard_ranks:
            self._mailbox.send(rank, Role.SHARD, MessageKind.END)
        self.ended = True
        return True

    def _write_checkpoint(self, shard: Shard, *, last: bool = False) -> bool:
        """Write the state of all shards, which are at rest; return whether the disk has taken it."""
        if last and not self._attempts.ready_at_the_end:
            self._say_alive()
            return False
        try:
            self._write(shard)
        except DiskFailed as error:
            (self._attempts.fail_at_the_end if last else self._attempts.fail)(error)
            return False
        self._attempts.succeed()
        self._saved_version = shard.version
        return True

    def _write(self, shard: Shard) -> None:
        """Write one file."""
        shard.report()
        begin, replicas, vectors = self._begin, self._plan.replicas, shard.vectors()
        steps = begin.step + self.steps
        left = begin.stream.after(self._learned, begin.warmstart)
        earlier = begin.done or (0,) * replicas
        for rank in self._plan.shard_ranks[1:]:
            self._mailbox.send(rank, Role.SHARD, MessageKind.CHECKPOINT)

        def describe(versions: tuple[int, ...]) -> CheckpointInfo:
            return CheckpointInfo(
                configuration=self._run.to_json(),
                step=steps,
                samples=begin.samples + self.samples,
                shard_versions=versions,
                shards=self._plan.shards,
                replicas=replicas,
                partitions=self._plan.partitions,
                input_shape=self._input_shape,
                classes=self._classes,
                meaning=self._meaning,
                frontier=left.frontier,
                total=left.total,
                holes=left.holes,
                done=tuple(before + now for before, now in zip(earlier, self._learned, strict=True)),
                libraries=library_versions(MPI.Get_library_version()),
            )

        self.checkpoint = save(
            self._comm,
            self._plan.shard_ranks,
            checkpoint_path(self._run.run.directory, steps),
            Part(self._arrangement, vectors, shard.version),
            describe,
            keep=self._run.checkpoint.keep,
            check=self._check_finite,
            alive=self._say_alive,
        )

    def _check_finite(self, name: str, values: np.ndarray) -> None:
        """Do not put useless parameters in the place of the last good ones."""
        if name == "parameters" and not finite(values):
            raise RunFailed(
                f"after {self._begin.step + self.steps} steps some parameters are NaN or infinite; no checkpoint is "
                f"written; {kept(self._run.run.directory / 'checkpoints')}; lower optimizer.learning_rate "
                f"({self._run.optimizer.learning_rate:g})"
            )
