"""The lead: shard 0, which also keeps the order of a run.

It shows progress, lets the workers pause until all shards have taken a checkpoint, which is written while they go on,
releases them after the warmstart, and ends the run when all have finished or a signal asked for it.  Where a replica
dies, it lets the others learn the rest of its share.  It acts on messages and on the clock, and never waits for a
worker.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dbmpi.checkpoint.amendment import amend
from dbmpi.data.stream import Order
from dbmpi.downpour.checkpoints import CheckpointPlan, LeadCheckpoints
from dbmpi.downpour.final_test import FinalTest
from dbmpi.downpour.replicas import Loss, Replicas, ReplicaState
from dbmpi.downpour.settling import Settling
from dbmpi.downpour.shard import Shard, ShardRole
from dbmpi.monitor.callbacks import Callbacks, TrainingEvent
from dbmpi.monitor.measures import Rate
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.records import EvaluationReport, LossReport, StalenessHistogram
from dbmpi.monitor.verdict import Recent
from dbmpi.mpi import failures, pieces, waiting
from dbmpi.mpi.failures import RankLost, Watch
from dbmpi.mpi.mailbox import Message, MessageKind, Role, number
from dbmpi.mpi.tags import Tag
from dbmpi.mpi.topology import Plan
from dbmpi.objective import Outcome
from dbmpi.paramserver.protocol import Header
from dbmpi.paramserver.server import Progress, Tally
from dbmpi.session import StartingPoint


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
    watch
        Knows of ranks that have died.
    metrics
        Names of what is measured of held-out samples beside the loss.
    tested
        Whether there are held-out samples to be evaluated at the end.

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
    test
        Outcome on the held-out samples at the end; None without.
    waited, busiest
        Share of the workers' time spent waiting for the shards, and of the busiest shard's time in the rule's kernel.
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
        watch: Watch,
        metrics: Sequence[str] = (),
        *,
        tested: bool = False,
    ) -> None:
        super().__init__(role)
        self._metrics, self._tested = metrics, tested
        self._sums: dict[int, list[float]] = {}
        self._plan, self._watch = plan, watch
        self._begin = begin
        self._order = order
        self._progress = progress
        self._files, self._callbacks = checkpoints, callbacks
        self._failure: Exception | None = None
        self._ending = False
        """Whether a signal or a callback has asked for the end."""
        self._rate = Rate()
        self._settling = Settling(plan.shards, role.held, self._tell_shards)
        self._replicas = Replicas(self._comm, plan, begin, self._mailbox, self._settling, lambda: watch.dead)
        self._server.on_report = self._count_report
        self._mourned: set[int] = set()
        self._pausing = self._taking = False
        """Whether the workers are to pause, and whether the shards take a checkpoint."""
        self._stopping = False
        """Whether the workers are to finish when all shards have taken it."""
        self._seen_version = 0
        self._reported_alive = time.monotonic()
        self._state = np.empty(0, np.uint8) if checkpoints.state is None else checkpoints.state.pack()
        """That of the first replica when it last paused."""
        self._checkpoints = LeadCheckpoints(checkpoints, self.version, role.recorder, progress.warn)
        self._final: FinalTest | None = None
        self._sent: list[pieces.Operation] = []
        """States of the objective on their way."""
        self._closing = False
        self._open = set(plan.shard_ranks[1:])
        """Shards that have not ended."""
        self._times: dict[int, tuple[float, float]] = {}
        self.steps = 0
        self.samples = 0
        self.staleness = StalenessHistogram()
        self.recent = Recent(order.samples)
        self.stopped_by = 0
        self.test: Outcome | None = None
        self.busiest = 0.0

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint written."""
        return self._checkpoints.path

    @property
    def objective_state(self) -> np.ndarray:
        """The bytes of the objective's state in the last checkpoint, uint8."""
        return self._state

    @property
    def lost(self) -> tuple[int, ...]:
        """Replicas that have been given up."""
        return tuple(self._replicas.lost)

    @property
    def waited(self) -> float:
        """Share of the workers' time that they have waited for the shards."""
        waited, spent = (sum(values) for values in zip(*self._times.values(), strict=True)) if self._times else (0, 0)
        return waited / max(spent, 1e-9)

    def poll(self) -> bool:
        """Poll as a shard, and act on the messages and on the clock; return whether anything was done."""
        moved = super().poll()
        return (False if self.ended else self._act()) or moved

    def hear(self, message: Message) -> None:
        """Obey a `message` as a shard, or note what a worker or another shard reports in it."""
        super().hear(message)
        kind, values = message.kind, message.values
        if kind in (MessageKind.PAUSED, MessageKind.FINISHED, MessageKind.FAILED):
            self._hear_of_rest(message)
        elif kind == MessageKind.WARM:
            self._replicas.release()
        elif kind == MessageKind.STOP_ASKED:
            self.stopped_by = self.stopped_by or values[0]
            self._end_early(signal.Signals(values[0]).name if values[0] else "a callback has asked for the end")
        elif kind == MessageKind.EVALUATION:
            self.report()  # which counts the steps until now
            self.evaluated(self._outcome(message), values[0] / self._order.batches_per_epoch)
        elif kind == MessageKind.TESTED and self._final is not None:
            self._final.add(values[0], self._outcome(message))
        elif kind == MessageKind.METRIC:
            self._sums.setdefault(message.source, [0.0] * len(self._metrics))[values[0]] = number(values[1])
        elif kind == MessageKind.HELD:
            self._settling.answered(values[0], Progress(*values[2:5]), gone=bool(values[1]))
        elif kind == MessageKind.CLOSED:
            self._open.discard(message.source)
            self.busiest = max(self.busiest, number(values[0]))
        elif kind == MessageKind.ALIVE:
            self._say_alive()

    def _hear_of_rest(self, message: Message) -> None:
        """Note that a replica learns nothing more, for now or for good."""
        kind, values, replicas = message.kind, message.values, self._replicas
        replica = replicas.of(message.source)
        self._take_state(replica, message.source)
        if kind == MessageKind.PAUSED:
            if replicas.paused(replica, *values[:3]) and self._pausing:
                self._checkpoints.rests()
            return
        replicas.finished(replica, values[0])
        if kind == MessageKind.FINISHED:
            self._times[replica] = number(values[1]), number(values[2])
        else:
            self._progress.message(f"replica {replica} has failed: a checkpoint is written, and the run ends")
            self._ending = True
            self._stop_workers()

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

    def raise_failure(self) -> None:
        """Raise what a callback has raised while others were at work."""
        if self._failure is not None:
            raise self._failure

    def give_up(self, replica: int, why: str) -> None:
        """Do without a replica from now on, and let others learn the rest of its share.

        Parameters
        ----------
        replica
            Number of the replica.
        why
            A clause for the user, e.g. that a rank has died.
        """
        if replica in self._replicas.lost:
            return
        left = len(self._replicas.living) - 1
        going = f"the run goes on with {left} of {self._plan.replicas} replicas" if left else "it was the last one"
        self._progress.message(f"{why}, and with it replica {replica}: {going}")
        self._replicas.give_up(replica)

    def awaited(self) -> str:
        """Name the replicas that the run waits for."""
        replicas = self._replicas
        late = replicas.which(ReplicaState.RUNNING) or ([] if self._final is None else self._final.awaited)
        if not late:
            return self._files.saver.awaited() if self._files.saver.busy else "the workers to leave"
        names = ", ".join(f"replica {replica} on rank {replicas.rank(replica)}" for replica in late)
        return f"{names} to {'pause for a checkpoint' if self._pausing else 'push or to finish'}"

    @property
    def epoch(self) -> float:
        """Passes through the training samples by all replicas together, over all sessions."""
        return (self._begin.samples + self.samples) / self._order.samples

    def _act(self) -> bool:
        """Start or end a pause, or the run, if it is time; return whether anything was done."""
        if self._closing:
            self.ended = not self._open
            return self.ended
        if self.version != self._seen_version:
            self._seen_version = self.version
            self._say_alive()
        moved = self._continue_checkpoint()
        self._mourn()
        for done in self._settling.take():
            self._lose(self._replicas.settled(done, ending=self._ending))
        if self._settling.busy:
            return moved
        if self._pausing and self._replicas.over and not self._taking:
            self._pausing = False
            self._replicas.go()
        if self._pausing:
            return self._continue_pause() or moved
        self._replicas.deal_out()
        if self._replicas.over:
            return self._end() or moved
        if not self._ending and self._checkpoints.due(self.version):
            self._pausing = True
            self._replicas.pause(self._replicas.living)
            return True
        return moved

    def _continue_pause(self) -> bool:
        """Let the shards take a checkpoint when all replicas pause, then let these go on; return whether that moved."""
        replicas = self._replicas
        for replica in replicas.late():
            # The state of the first one is a part of the checkpoint.
            if not (self._state.size and replica == replicas.first):
                replicas.hold(replica)
        if self._settling.busy or any(one.awaited for one in replicas.standings):
            return False
        if not self._taking:
            self._taking = True
            self._begin_checkpoint()
        if not self._checkpoints.taken:
            return False
        self._pausing = self._taking = False
        self._checkpoints.go()
        replicas.go()
        if self._stopping:
            self._stopping = False
            self._stop_workers()
        return True

    # Losses

    def _count_report(self, client: int, header: Header) -> None:
        self._replicas.standings[client // self._plan.partitions].reports.add(header)

    def _mourn(self) -> None:
        """Go on without the replicas of which a rank has died."""
        for rank in sorted(self._watch.dead - self._mourned):
            self._mourned.add(rank)
            self.give_up(self._replicas.of(rank), f"{self._watch.name(rank)} has died")

    def _lose(self, loss: Loss | None) -> None:
        """Count and tell what has become of a replica's work."""
        if loss is None:
            return
        replicas = self._replicas
        self.report()
        self.steps -= loss.steps
        self.samples -= loss.samples
        self._role.recorder.write(
            LossReport(
                step=self.steps,
                lost=loss.replica,
                pushes=loss.pushes,
                dropped=loss.dropped,
                repeated=loss.repeated,
                left=loss.left,
                takers=loss.takers,
            )
        )
        if loss.left and loss.takers:
            others = f"replica{'s' if len(loss.takers) > 1 else ''} {', '.join(map(str, loss.takers))}"
            again = f", {loss.repeated:,} of them again in part" if loss.repeated else ""
            self._progress.message(
                f"replica {loss.replica}: {loss.pushes:,} pushes count, and {loss.left:,} batches are left{again}, for "
                f"{others}"
            )
        if not replicas.released and not any(replicas.deal.warm(replica) for replica in replicas.living):
            replicas.release()
        if self._final is not None and replicas.living:
            self._final.lose(loss.replica, replicas.living)

    def _take_state(self, replica: int, rank: int) -> None:
        """Receive the state of the objective, which the first replica sends when it pauses."""
        if replica != self._replicas.first or not self._state.size:
            return
        request, came = pieces.irecv(self._comm, into := np.empty_like(self._state), rank, Tag.OBJECTIVE_STATE), False
        try:
            failures.complete(request, self._comm, rank, f"the state of the objective on rank {rank}", memory=into)
            came = True
        except RankLost:
            pass  # the one before stays
        if came:
            self._state = into

    # The end, and checkpoints

    def _tell_shards(self, kind: MessageKind, *values: int) -> None:
        for rank in self._plan.shard_ranks[1:]:
            self._mailbox.send(rank, Role.SHARD, kind, *values)

    def _say_alive(self) -> None:
        """Tell all ranks that the run moves, in time before those that wait give up."""
        if time.monotonic() - self._reported_alive >= waiting.STALL_SECONDS / 4:
            self._reported_alive = time.monotonic()
            self._replicas.tell_all(MessageKind.ALIVE)
            self._tell_shards(MessageKind.ALIVE)

    def _end(self) -> bool:
        """Write the last checkpoint, test, and end training on all ranks; return whether anything was done."""
        if not self._checkpoints.complete:
            if not self._checkpoints.may_end:
                if not self._files.saver.busy:
                    self._say_alive()
                return False
            self._begin_checkpoint(last=True)
            return True
        if not self._replicas.living:
            self._watch.end("no replica is left")
        if self._tested and not self.stopped_by and not self._failure:
            if self._final is None:
                self._final = FinalTest(self._replicas.living, self._ask)
            if (outcome := self._final.outcome) is None:
                return False
            self._tested = False
            self.test = outcome
            self.evaluated(outcome, self.epoch)
            assert self._checkpoints.path is not None
            amend(self._checkpoints.path, self._files.account, self._files.section.keep, self._progress.warn)
        self._replicas.tell_all(MessageKind.END)
        self._tell_shards(MessageKind.END)
        self.busiest = max(self.busiest, self.applying)
        self._closing = True
        return True

    def _ask(self, replica: int, part: int, parts: int) -> None:
        """Let a replica evaluate a part of the held-out samples, with the state of the last checkpoint."""
        self._replicas.tell(replica, MessageKind.TEST, part, parts)
        if self._state.size:
            with failures.survived():
                self._sent.append(
                    pieces.isend(self._comm, self._state, self._replicas.rank(replica), Tag.OBJECTIVE_STATE)
                )

    def _outcome(self, message: Message) -> Outcome:
        """Return what a replica has found on held-out samples."""
        _, samples, correct, loss, *_ = message.values
        sums = self._sums.pop(message.source, [0.0] * len(self._metrics))
        return Outcome(samples, number(loss), correct, tuple(zip(self._metrics, sums, strict=True)))

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
        if not self._ending and not self._replicas.over:
            self._ending = True
            self._progress.message(f"{why}: the run ends after the current steps")
            self._stop_workers()

    def _stop_workers(self) -> None:
        """Let all replicas finish; those that pause push what they have accrued, so not while shards take vectors."""
        self._stopping = self._taking
        if not self._taking:
            self._pausing = False
            self._replicas.stop()

    def _begin_checkpoint(self, *, last: bool = False) -> None:
        """Let all shards take their vectors, while no worker's push is applied."""
        self.report()
        if self.samples:
            self._files.account.learned(self.recent.mean_loss, self.recent.accuracy)
        event = self.steps, self.epoch, self.samples
        self._checkpoints.begin(partial(self._take, last=last), self.version, event, last=last)

    def _take(self, *, last: bool) -> None:
        begin, files, learned = self._begin, self._files, self._replicas.learned
        steps = begin.step + sum(learned)
        left = self._replicas.deal.left(learned)
        earlier = begin.done or (0,) * len(learned)
        describe = partial(
            files.info,
            step=steps,
            samples=begin.samples + self._replicas.samples,
            frontier=left.frontier,
            total=left.total,
            holes=left.holes,
            done=tuple(before + now for before, now in zip(earlier, learned, strict=True)),
            **files.account.fields(),
        )
        state = {} if files.state is None else files.state.to_store(self._state)
        identity = files.saver.plan(steps, describe, state)
        self._tell_shards(MessageKind.CHECKPOINT, steps, identity, last)
        files.saver.begin(steps, identity, self.vectors(), self.version, last=last)
