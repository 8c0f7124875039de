"""The lead: shard 0, which also keeps the order of a run.

It shows progress, lets the workers pause until all shards have taken a checkpoint, releases them after the warmstart,
and ends the run when all have finished or a signal asked for it.  Where a replica dies, it lets the others learn the
rest of its share.  It acts on messages and on the clock, and never waits for a worker.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dbmpi.checkpoint.amendment import amend
from dbmpi.data.stream import Order
from dbmpi.downpour.checkpoints import CheckpointPlan, LeadCheckpoints
from dbmpi.downpour.final_test import FinalTest, Outcomes
from dbmpi.downpour.losses import Losses, LostShare
from dbmpi.downpour.replica_state import ReplicaState
from dbmpi.downpour.replicas import Replicas
from dbmpi.downpour.shard import Shard, ShardRole
from dbmpi.downpour.state_keeper import StateKeeper
from dbmpi.monitor.callbacks import Callbacks, TrainingEvent
from dbmpi.monitor.measures import Rate
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.records import EvaluationReport, StalenessHistogram
from dbmpi.monitor.verdict import Recent
from dbmpi.mpi.mailbox import Message, MessageKind, number
from dbmpi.mpi.topology import Plan
from dbmpi.mpi.watch import Watch
from dbmpi.objective import Outcome
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.server import PushProgress, Tally
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
    steps, samples, withheld
        Steps of all replicas in this session, and the samples behind them, as far as they have been applied or
        withheld, and the pushes that were.
    staleness
        Of all pushes of this session that shard 0 has applied.
    recent
        The losses of the last samples learned from.
    test
        Outcome on the held-out samples at the end; None without.
    rolls_back
        Whether the run is to go back to its last checkpoint.
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
        self._outcomes, self._tested = Outcomes(metrics), tested
        self._watch, self._begin, self._order, self._progress = watch, begin, order, progress
        self._files, self._callbacks = checkpoints, callbacks
        self._failure: Exception | None = None
        self._ending = self.rolls_back = False
        """Whether a signal, a callback or a replica has asked for the end."""
        self._rate = Rate()
        self._replicas = Replicas(self._comm, plan, begin, self._mailbox, role.held, lambda: watch.dead)
        self._server.on_report = self._replicas.count
        self._losses = Losses(watch, self._replicas, role.recorder, progress.message, role.monitor, plan)
        self._pausing = self._taking = False
        """Whether the workers are to pause, and whether the shards take a checkpoint."""
        self._stopping = False
        """Whether the workers are to finish when all shards have taken it."""
        self._state = StateKeeper(self._comm, checkpoints.state)
        self._checkpoints = LeadCheckpoints(checkpoints, self.version, role.recorder, progress.warn)
        self._final: FinalTest | None = None
        self._closing = False
        self._open = set(plan.shard_ranks[1:])
        """Shards that have not ended."""
        self.steps = self.samples = self.withheld = self.stopped_by = 0
        self.staleness = StalenessHistogram()
        self.recent = Recent(order.samples)
        self.test: Outcome | None = None
        self._seen_version, self._busiest = 0, 0.0

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint written."""
        return self._checkpoints.path

    @property
    def objective_state(self) -> np.ndarray:
        """The bytes of the objective's state in the last checkpoint, uint8."""
        return self._state.packed

    @property
    def lost(self) -> tuple[int, ...]:
        """Replicas that have been given up."""
        return tuple(self._replicas.lost)

    @property
    def advice(self) -> str:
        """Whether the shards were what the workers waited for, and what to do then; empty where they were not."""
        return bottleneck.advice(self._busiest, self._replicas.waited)

    def poll(self) -> bool:
        """Poll as a shard, and act on the messages and on the clock; return whether anything was done."""
        moved = super().poll()
        return (False if self.ended else self._act()) or moved

    def hear(self, message: Message) -> None:
        """Obey a `message` as a shard, or note what a worker or another shard reports in it."""
        super().hear(message)
        kind, values = message.kind, message.values
        if kind in (MessageKind.PAUSED, MessageKind.FINISHED, MessageKind.FAILED):
            if self._replicas.of(message.source) not in self._replicas.lost:
                self._hear_of_rest(message)
        elif kind == MessageKind.WARM:
            self._replicas.release()
        elif kind == MessageKind.STOP_ASKED:
            self._role.stop.hear(values[0])
            self.stopped_by = self.stopped_by or values[0]
            self._end_early(signal.Signals(values[0]).name if values[0] else "a callback has asked for the end")
        elif kind == MessageKind.EVALUATION:
            self.report()  # which counts the steps until now
            self.evaluated(self._outcomes.of(message), values[0] / self._order.batches_per_epoch)
        elif kind == MessageKind.TESTED and self._final is not None:
            self._final.add(values[0], self._outcomes.of(message))
        elif kind == MessageKind.METRIC:
            self._outcomes.hear(message)
        elif kind == MessageKind.HELD:
            self._replicas.settlement.answered(values[0], PushProgress(*values[2:5]), gone=bool(values[1]))
        elif kind == MessageKind.CLOSED:
            self._open.discard(message.source)
            self._busiest = max(self._busiest, number(values[0]))
        elif kind == MessageKind.ALIVE:
            self._replicas.say_alive()
        elif kind == MessageKind.BEAT:
            self._losses.stalls.heard(message.source)
        elif kind == MessageKind.ROLL_BACK and not self._ending:
            self.rolls_back = True
            self._end_early(f"replica {self._replicas.of(message.source)} withholds too many pushes in a row")

    def _hear_of_rest(self, message: Message) -> None:
        """Note that a replica learns nothing more, for now or for good."""
        kind, values, replicas = message.kind, message.values, self._replicas
        replica = replicas.of(message.source)
        if replica == replicas.first:
            self._state.take(message.source)
        if kind == MessageKind.PAUSED:
            if replicas.paused(replica, *values[:3]) and self._pausing:
                self._checkpoints.rests()
            return
        replicas.finished(replica, values[0], number(values[1]), number(values[2]))
        if kind == MessageKind.FAILED:
            self._progress.message(f"replica {replica} has failed: a checkpoint is written, and the run ends")
            self._ending, self._tested = True, False
            self._stop_workers()

    def report(self) -> tuple[Tally, float]:
        """Write a report as a shard, and show the progress; return as a shard does."""
        tally, seconds = super().report()
        outcome = tally.outcome
        self.steps += tally.steps
        self.samples += tally.samples
        if tally.withheld and not self.withheld:
            self._progress.warn("a replica withholds a push, because its gradient is not finite")
        self.withheld += tally.withheld
        self.recent.add(outcome)
        self.staleness.merge(tally.staleness)
        self._rate.add(tally.samples, seconds)
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
        self._role.recorder.write(EvaluationReport.of(outcome, self.steps, epoch))
        self._files.account.tested(self._begin.step + self.steps, outcome)
        self._progress.evaluation(epoch, outcome.mean_loss, outcome.accuracy, outcome.samples, outcome.metrics)
        found = outcome.samples, outcome.mean_loss, outcome.accuracy
        self._call("on_evaluation", self.steps, epoch, *found, None, 0, outcome.metrics)

    def raise_failure(self) -> None:
        """Raise what a callback has raised while others were at work."""
        if self._failure is not None:
            raise self._failure

    def awaited(self) -> str:
        """Name the replicas that the run waits for."""
        replicas = self._replicas
        late = replicas.which(ReplicaState.RUNNING) or ([] if self._final is None else self._final.awaited)
        if not late:
            return self._files.saver.awaited() if self._files.saver.busy else "the workers to leave"
        return f"{replicas.names(late)} to {'pause for a checkpoint' if self._pausing else 'push or to finish'}"

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
            self._replicas.say_alive()
        moved = self._continue_checkpoint()
        self._losses.mourn()
        for done in self._replicas.settlement.take():
            loss = self._replicas.settled(done, ending=self._ending)
            if loss is not None:
                self._lose(loss)
        if self._replicas.settlement.busy:
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
            if not (self._state.packed.size and replica == replicas.first):
                replicas.hold(replica)
        if replicas.awaited:
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

    def _lose(self, loss: LostShare) -> None:
        """Leave out the steps that do not count, and let others do what the lost replica was to do."""
        replicas = self._replicas
        self.report()
        self.steps -= loss.steps
        self.samples -= loss.samples
        self._losses.tell(loss, self.steps)
        if self._final is not None and replicas.living:
            self._final.lose(loss.replica, replicas.living)

    def _end(self) -> bool:
        """Write the last checkpoint, test, and end training on all ranks; return whether anything was done."""
        if self.rolls_back:
            self._tested = False
            if self._files.saver.busy:
                return False
        elif not self._checkpoints.complete:
            if not self._checkpoints.may_end:
                if not self._files.saver.busy:
                    self._replicas.say_alive()
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
        if not (self.stopped_by or self._losses.stalls.may_end()):
            return False
        self._replicas.tell_all(MessageKind.END)
        self._replicas.tell_shards(MessageKind.END)
        self._busiest = max(self._busiest, self.applying)
        self._closing = True
        return True

    def _ask(self, replica: int, part: int, parts: int) -> None:
        """Let a replica evaluate a part of the held-out samples, with the state of the last checkpoint."""
        self._replicas.tell(replica, MessageKind.TEST, part, parts)
        self._state.send(self._replicas.rank(replica))

    def _continue_checkpoint(self) -> bool:
        """Write on; return whether anything was done."""
        moved = self._checkpoints.poll()
        if moved:
            self._replicas.say_alive()
        event = self._checkpoints.finished()
        if event is None:
            return moved
        self._call("on_checkpoint", *event, math.nan, None, self._checkpoints.path)
        if not (self._ending or self._replicas.over):
            self._losses.replace()
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
        files = self._files
        steps, describe = self._replicas.describe(files)
        state = {} if files.state is None else files.state.to_store(self._state.packed)
        identity = files.saver.plan(steps, describe, state)
        self._replicas.tell_shards(MessageKind.CHECKPOINT, steps, identity, last)
        files.saver.begin(steps, identity, self.vectors(), self.version, last=last)
