"""The lead: shard 0, which also keeps the order of a run.

It shows progress, lets the workers pause until all shards have taken a checkpoint, which is written while they go on,
releases them after the warmstart, and ends the run when all have finished or a signal asked for it.  It acts on
messages and on the clock, and never waits for a worker.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dbmpi.checkpoint.amendment import amend
from dbmpi.data.stream import Order
from dbmpi.downpour.checkpoints import CheckpointPlan, LeadCheckpoints
from dbmpi.downpour.shard import Shard, ShardRole
from dbmpi.monitor.callbacks import Callbacks, TrainingEvent
from dbmpi.monitor.measures import Rate
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.records import EvaluationReport, StalenessHistogram
from dbmpi.monitor.verdict import Recent
from dbmpi.mpi import pieces, waiting
from dbmpi.mpi.mailbox import Message, MessageKind, Role
from dbmpi.mpi.tags import Tag
from dbmpi.mpi.topology import Plan
from dbmpi.objective import Outcome
from dbmpi.paramserver.server import Tally
from dbmpi.session import StartingPoint


class _State(Enum):
    RUNNING = auto()
    PAUSED = auto()
    FINISHED = auto()


def _number(bits: int) -> float:
    """Return the float64 of these bits."""
    return float(np.array([bits], np.int64).view(np.float64)[0])


class Lead(Shard):
    """Shard 0, which keeps the order of a run.

    Parameters
    ----------
    role
        Its means as a shard.
    plan
        Which rank plays which role.
    begin
        Where the session starts.
    order
        Which samples make up each batch of the stream.
    progress
        Shows the run's progress and messages.
    checkpoints
        Where and how to write them.
    callbacks
        The user's own, for evaluations and checkpoints.
    metrics
        Names of what is measured of held-out samples beside the loss.

    Attributes
    ----------
    stopped_by
        Number of the signal that ended it early; 0 if it ran to its end.
    steps, samples
        Steps of all replicas in this session, and the samples behind them, as far as they have been applied.
    staleness
        Of all pushes of this session that shard 0 has applied.
    recent
        The losses of the last samples learned from.
    """

    def __init__(
        self,
        role: ShardRole,
        plan: Plan,
        begin: StartingPoint,
        order: Order,
        progress: RunProgress,
        checkpoints: CheckpointPlan,
        callbacks: Callbacks,
        metrics: Sequence[str] = (),
    ) -> None:
        super().__init__(role)
        self._metrics, self._sums = metrics, [0.0] * len(metrics)
        self._plan = plan
        self._begin = begin
        self._order = order
        self._progress = progress
        self._files, self._callbacks = checkpoints, callbacks
        self._failure: Exception | None = None
        self._ending = False
        """Whether a signal or a callback has asked for the end."""
        self._rate = Rate()
        self._states = [_State.RUNNING] * plan.replicas
        self._learned = [0] * plan.replicas
        self._pausing = self._taking = False
        """Whether the workers are to pause, and whether the shards take a checkpoint."""
        self._stopping = False
        """Whether the workers are to finish when all shards have taken it."""
        self._seen_version = 0
        self._reported_alive = time.monotonic()
        self._state = np.empty(0 if checkpoints.state is None else checkpoints.state.nbytes, np.uint8)
        """That of replica 0 when it last paused."""
        self._checkpoints = LeadCheckpoints(checkpoints, self.version, role.recorder, progress.warn)
        self.steps = 0
        self.samples = 0
        self.staleness = StalenessHistogram()
        self.recent = Recent(order.samples)
        self.stopped_by = 0

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint written."""
        return self._checkpoints.path

    def poll(self) -> bool:
        """Poll as a shard, and act on the messages and on the clock; return whether anything was done."""
        moved = super().poll()
        return (False if self.ended else self._act()) or moved

    def hear(self, message: Message) -> None:
        """Obey a `message` as a shard, or note what a worker or another shard reports in it."""
        super().hear(message)
        kind, values = message.kind, message.values
        if kind in (MessageKind.PAUSED, MessageKind.FINISHED):
            replica = self._replica(message.source)
            self._take_state(replica, message.source)
            self._learned[replica] = values[0]
            self._states[replica] = _State.PAUSED if kind == MessageKind.PAUSED else _State.FINISHED
            if kind == MessageKind.PAUSED:
                self._checkpoints.rests()
        elif kind == MessageKind.WARM:
            self._tell_workers(MessageKind.RELEASE)
        elif kind == MessageKind.STOP_ASKED:
            self.stopped_by = self.stopped_by or values[0]
            self._end_early(signal.Signals(values[0]).name if values[0] else "a callback has asked for the end")
        elif kind == MessageKind.FAILED:
            replica = self._replica(message.source)
            self._take_state(replica, message.source)
            self._learned[replica], self._states[replica] = values[0], _State.FINISHED
            self._progress.message(f"replica {replica} has failed: a checkpoint is written, and the run ends")
            self._stop_workers()
        elif kind == MessageKind.EVALUATION:
            self.report()  # which counts the steps until now
            sums = tuple(zip(self._metrics, self._sums, strict=True))
            outcome = Outcome(values[1], _number(values[3]), values[2], sums)
            self.evaluated(outcome, values[0] / self._order.batches_per_epoch)
        elif kind == MessageKind.METRIC:
            self._sums[values[0]] = _number(values[1])
        elif kind == MessageKind.ALIVE:
            self._say_alive()

    def report(self) -> tuple[Tally, float]:
        """Write a report as a shard, and show the progress; return as a shard does."""
        tally, seconds = super().report()
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
        return tally, seconds

    def evaluated(self, outcome: Outcome, epoch: float) -> None:
        """Record and show the `outcome` of an evaluation on the test data, at that `epoch`."""
        self._role.recorder.write(
            EvaluationReport(
                step=self.steps,
                epoch=epoch,
                loss=outcome.mean_loss,
                accuracy=outcome.accuracy,
                samples=outcome.samples,
                metrics=outcome.metrics or None,
            )
        )
        self._files.account.tested(self._begin.step + self.steps, outcome)
        self._progress.evaluation(epoch, outcome.mean_loss, outcome.accuracy, outcome.samples, outcome.metrics)
        loss, accuracy, metrics = outcome.mean_loss, outcome.accuracy, outcome.metrics
        self._call("on_evaluation", self.steps, epoch, outcome.samples, loss, accuracy, None, 0, metrics)

    def amend(self) -> None:
        """Write the outcome of the evaluation at the end into the last checkpoint."""
        path, plan = self._checkpoints.path, self._files
        assert path is not None
        amend(path, plan.account, plan.section.keep, self._progress.warn)

    def raise_failure(self) -> None:
        """Raise what a callback has raised while others were at work."""
        if self._failure is not None:
            raise self._failure

    def awaited(self) -> str:
        """Name the replicas that the run waits for."""
        late = [replica for replica, state in enumerate(self._states) if state == _State.RUNNING]
        if not late:
            return self._files.saver.awaited() if self._files.saver.busy else "the workers to leave"
        ranks = [self._plan.worker_ranks[replica * self._plan.partitions] for replica in late]
        names = ", ".join(f"replica {replica} on rank {rank}" for replica, rank in zip(late, ranks, strict=True))
        return f"{names} to {'pause for a checkpoint' if self._pausing else 'push or to finish'}"

    @property
    def epoch(self) -> float:
        """Passes through the training samples by all replicas together, over all sessions."""
        return (self._begin.samples + self.samples) / self._order.samples

    def _act(self) -> bool:
        """Start or end a pause, or the run, if it is time; return whether anything was done."""
        if self.version != self._seen_version:
            self._seen_version = self.version
            self._say_alive()
        moved = self._continue_checkpoint()
        if all(state == _State.FINISHED for state in self._states):
            return self._end() or moved
        if self._pausing:
            if any(state == _State.RUNNING for state in self._states):
                return moved
            if not self._taking:
                self._taking = True
                self._begin_checkpoint()
            if not self._checkpoints.taken:
                return moved
            self._pausing = self._taking = False
            self._checkpoints.go()
            self._states = [_State.RUNNING if s == _State.PAUSED else s for s in self._states]
            self._tell_workers(MessageKind.GO)
            if self._stopping:
                self._stopping = False
                self._stop_workers()
            return True
        if not self._ending and self._checkpoints.due(self.version):
            self._pausing = True
            self._tell_workers(MessageKind.PAUSE)
            return True
        return moved

    def _replica(self, rank: int) -> int:
        worker = self._plan.worker_of(rank)
        assert worker is not None
        return worker // self._plan.partitions

    def _take_state(self, replica: int, rank: int) -> None:
        """Receive the state of the objective, which replica 0 sends when it pauses."""
        if replica == 0 and self._state.size:
            request = pieces.irecv(self._comm, self._state, rank, Tag.OBJECTIVE_STATE)
            waiting.complete(request, f"the state of the objective on rank {rank}")

    def _tell_workers(self, kind: MessageKind) -> None:
        """Send END or ALIVE to all workers, and another order to the first worker of each replica still running."""
        ranks, partitions = self._plan.worker_ranks, self._plan.partitions
        if kind not in (MessageKind.END, MessageKind.ALIVE):
            running = [replica for replica, state in enumerate(self._states) if state != _State.FINISHED]
            ranks = tuple(ranks[replica * partitions] for replica in running)
        for rank in ranks:
            self._mailbox.send(rank, Role.WORKER, kind)

    def _say_alive(self) -> None:
        """Tell all ranks that the run moves, in time before those that wait give up."""
        if time.monotonic() - self._reported_alive >= waiting.STALL_SECONDS / 4:
            self._reported_alive = time.monotonic()
            self._tell_workers(MessageKind.ALIVE)
            for rank in self._plan.shard_ranks[1:]:
                self._mailbox.send(rank, Role.SHARD, MessageKind.ALIVE)

    def _end(self) -> bool:
        """Write the last checkpoint, and end training on all ranks; return whether anything was done."""
        if not self._checkpoints.complete:
            if not self._checkpoints.may_end:
                if not self._files.saver.busy:
                    self._say_alive()
                return False
            self._begin_checkpoint(last=True)
            return True
        self._tell_workers(MessageKind.END)
        for rank in self._plan.shard_ranks[1:]:
            self._mailbox.send(rank, Role.SHARD, MessageKind.END)
        self.ended = True
        return True

    def _continue_checkpoint(self) -> bool:
        """Write on; return whether anything was done."""
        moved = self._checkpoints.poll()
        if moved:
            self._say_alive()
        event = self._checkpoints.finished()
        if event is None:
            return moved
        self._call("on_checkpoint", *event, math.nan, None, self._checkpoints.path)
        return True

    def _call(self, name: str, *event: Any) -> None:
        """Call callbacks, and end the run early if one asks for it, or fails: after a checkpoint."""
        try:
            asked = self._callbacks.call(name, TrainingEvent(*event))
        except Exception as error:
            self._failure = error
            self._end_early(f"{name} of a callback has failed")
        else:
            if asked:
                self._end_early(f"{name} has asked for the end")

    def _end_early(self, why: str) -> None:
        """Let all replicas finish, if they have not been told so before; `why` is for the user."""
        if not self._ending and any(state != _State.FINISHED for state in self._states):
            self._ending = True
            self._progress.message(f"{why}: the run ends after the current steps")
            self._stop_workers()

    def _stop_workers(self) -> None:
        """Let all replicas finish; those that pause push what they have accrued, so not while shards take vectors."""
        if self._taking:
            self._stopping = True
            return
        self._states = [_State.RUNNING if state == _State.PAUSED else state for state in self._states]
        self._tell_workers(MessageKind.STOP)

    def _begin_checkpoint(self, *, last: bool = False) -> None:
        """Let all shards take their vectors, while no worker pushes."""
        self.report()
        if self.samples:
            self._files.account.learned(self.recent.mean_loss, self.recent.accuracy)
        event = self.steps, self.epoch, self.samples
        self._checkpoints.begin(partial(self._take, last=last), self.version, event, last=last)

    def _take(self, *, last: bool) -> None:
        begin, files, replicas = self._begin, self._files, self._plan.replicas
        steps = begin.step + self.steps
        left = begin.stream.after(self._learned, begin.warmstart)
        earlier = begin.done or (0,) * replicas
        describe = partial(
            files.info,
            step=steps,
            samples=begin.samples + self.samples,
            frontier=left.frontier,
            total=left.total,
            holes=left.holes,
            done=tuple(before + now for before, now in zip(earlier, self._learned, strict=True)),
            **files.account.fields(),
        )
        state = {} if files.state is None else files.state.to_store(self._state)
        identity = files.saver.plan(steps, describe, state)
        for rank in self._plan.shard_ranks[1:]:
            self._mailbox.send(rank, Role.SHARD, MessageKind.CHECKPOINT, steps, identity, last)
        files.saver.begin(steps, identity, self.vectors(), self.version, last=last)
