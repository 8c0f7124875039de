"""The lead: shard 0, which also keeps the order of a run.

It shows progress, lets the workers pause until all shards have taken a checkpoint, releases them after the warmstart,
and ends the run when all have finished or a signal asked for it.  Where a replica dies, it lets the others learn the
rest of its share.  It acts on messages and on the clock, and never waits for a worker.
"""

from __future__ import annotations

import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dbmpi.checkpoint.amendment import amend
from dbmpi.checkpoint.lead_saver import LeadSaver
from dbmpi.downpour.checkpoints import LeadCheckpoints
from dbmpi.downpour.final_test import FinalTest, Outcomes
from dbmpi.downpour.losses import Losses, LostShare
from dbmpi.downpour.replica_state import ReplicaState
from dbmpi.downpour.replicas import Replicas
from dbmpi.downpour.rescue import Rescue
from dbmpi.downpour.shard import Shard, ShardRole
from dbmpi.downpour.snapshots import Snapshots, Taken
from dbmpi.downpour.state_keeper import StateKeeper
from dbmpi.downpour.totals import Totals
from dbmpi.monitor.callbacks import TrainingEvent
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.reports import EndReport, EvaluationReport
from dbmpi.mpi.mailbox import Message, MessageKind, number
from dbmpi.objective import Outcome
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.tally import Tally
from dbmpi.session import Session


class Lead(Shard):
    """Shard 0, which keeps the order of a run.

    Parameters
    ----------
    session
        Everything that is known of the run.
    role
        Its means as a shard.
    saver
        Writes checkpoints, together with the shards.
    progress
        Shows the run's progress and messages.

    Attributes
    ----------
    stopped_by
        Number of the signal that ended it early; 0 if it ran to its end.
    totals
        What all replicas have learned in this session.
    test
        Outcome on the held-out samples at the end; None without.
    rolls_back
        Whether the run is to go back to its last checkpoint.
    ended_by
        Why an evaluation ends the run, also one of an earlier session; empty where none does.
    """

    def __init__(self, session: Session, role: ShardRole, saver: LeadSaver, progress: RunProgress) -> None:
        super().__init__(session, role)
        self._outcomes, self._tested = Outcomes(session.metrics), session.data.tested
        self._begin, self._order, self._saver, self._progress = session.begin, session.order, saver, progress
        self._info, self._account = partial(session.checkpoint_info(), begun=role.server.begun), session.account()
        self._judge = session.judge()
        self._failure: Exception | None = None
        self._ending = self._rescuing = self.rolls_back = False
        """Whether a signal, a callback, an evaluation or a replica has asked for the end."""
        self.ended_by = self._judge.verdict
        self._replicas = Replicas(session, self._mailbox, role.held)
        self._server.on_report = self._replicas.count
        self._losses = Losses(session, self._replicas, role.recorder, progress.message)
        self._pausing = self._taking = False
        """Whether the workers are to pause, and whether the shards take a checkpoint."""
        self._stopping = False
        """Whether the workers are to finish when all shards have taken it."""
        self._state = StateKeeper(session.comms.world, session.objective_state)
        self._checkpoints = LeadCheckpoints(session.run.checkpoint, saver, self.version, role.recorder, progress.warn)
        self._snapshots = Snapshots(session, self._replicas, self._state)
        self._final: FinalTest | None = None
        self._closing = False
        self._open = set(session.plan.shard_ranks[1:])
        """Shards that have not ended."""
        self.totals = Totals(progress, session.begin.samples, session.order.samples)
        self.stopped_by = 0
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
        return tuple(one for one in self._replicas.lost if one < self._session.plan.replicas)

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
        if kind in (MessageKind.PAUSED, MessageKind.FINISHED, MessageKind.FAILED, MessageKind.STATE):
            if self._replicas.of(message.source) not in self._replicas.lost:
                self._hear_of_rest(message)
        elif kind == MessageKind.STOP_ASKED:
            self._stop.hear(values[0])
            self.stopped_by = self.stopped_by or values[0]
            self._end_early(signal.Signals(values[0]).name if values[0] else "a callback has asked for the end")
        elif kind in (MessageKind.SNAPSHOT, MessageKind.EVALUATION):
            self.report()  # which counts the steps until now
            taken = self._snapshots.hear(message, Taken(self.totals.steps, self.epoch))
            if taken is not None:
                self.evaluated(self._outcomes.of(message), taken)
        elif kind == MessageKind.TESTED and self._final is not None:
            self._final.add(values[0], self._outcomes.of(message))
        elif kind == MessageKind.METRIC:
            self._outcomes.hear(message)
        elif kind == MessageKind.CLOSED:
            self._open.discard(message.source)
            self.totals.discarded += values[1]
            self._busiest = max(self._busiest, number(values[0]))
        elif kind == MessageKind.BEAT:
            self._losses.stalls.heard(message.source)
        elif kind == MessageKind.ROLL_BACK and not self._ending:
            self.rolls_back = True
            self._end_early(f"replica {self._replicas.of(message.source)} withholds too many pushes in a row")
        else:
            self._replicas.hear(message)

    def _hear_of_rest(self, message: Message) -> None:
        """Note that a replica learns nothing more, for now or for good, or sends its state meanwhile."""
        kind, values, replicas = message.kind, message.values, self._replicas
        replica = replicas.of(message.source)
        if replica == replicas.first:
            self._state.take(message.source)
            self._snapshots.give()
        if kind == MessageKind.STATE:
            return
        if kind == MessageKind.PAUSED:
            if replicas.paused(replica, *values[:3]) and self._pausing:
                self._checkpoints.rests()
            return
        replicas.finished(replica, values[0], number(values[1]), number(values[2]))
        if kind == MessageKind.FAILED:
            name = self._session.plan.name(replica)
            self._progress.message(f"{name} has failed: a checkpoint is written, and the run ends")
            self._ending, self._tested = True, False
            self._stop_workers()

    def report(self) -> tuple[Tally, float]:
        """Write a report as a shard, and show the progress; return as a shard does."""
        tally, seconds = super().report()
        self.totals.add(tally, seconds)
        return tally, seconds

    def evaluated(self, outcome: Outcome, taken: Taken) -> None:
        """Record and show the `outcome` of an evaluation on the test data, of parameters `taken` at that time."""
        step, epoch = taken
        self._role.recorder.write(EvaluationReport.of(outcome, step, epoch))
        best = self._judge.hear(self._begin.step + step, outcome)
        self._checkpoints.wanted |= best and self._session.run.checkpoint.best == "at_once"
        self._account.tested(self._begin.step + step, outcome, self._judge.fields)
        self._progress.evaluation(epoch, outcome.mean_loss, outcome.accuracy, outcome.samples, outcome.metrics)
        found = outcome.samples, outcome.mean_loss, outcome.accuracy
        self._call("on_evaluation", step, epoch, *found, None, 0, outcome.metrics)
        if not self.ended_by and (verdict := self._judge.verdict) and self._end_early(verdict):
            self.ended_by = verdict

    def rescue(self) -> None:
        """Write a checkpoint with the mirrors of shards that have died, and let the others leave."""
        self._ending = self._rescuing = True
        self.report()
        rescue = Rescue(
            session=self._session,
            role=self._role,
            replicas=self._replicas,
            saver=self._saver,
            progress=self._progress,
            poll=super().poll,
        )
        if not (self._closing or self._checkpoints.complete):
            rescue.run(self, partial(self._take, last=True))
        self._replicas.tell_shards(MessageKind.END)
        self.ended = True

    def raise_failure(self) -> None:
        """Raise what a callback has raised while others were at work."""
        if self._failure is not None:
            raise self._failure

    def awaited(self) -> str:
        """Name the replicas that the run waits for."""
        replicas = self._replicas
        late = replicas.which(ReplicaState.RUNNING) or ([] if self._final is None else self._final.awaited)
        if not late:
            return self._saver.awaited() if self._saver.busy else "the workers to leave"
        return f"{replicas.names(late)} to {'pause for a checkpoint' if self._pausing else 'push or to finish'}"

    @property
    def epoch(self) -> float:
        """Passes through the training samples by all replicas together, over all sessions."""
        return (self._begin.samples + self.totals.samples) / self._order.samples

    def _act(self) -> bool:
        """Start or end a pause, or the run, if it is time; return whether anything was done."""
        if self._closing:
            self.ended = not self._open and (self._role.mirrors is None or self._role.mirrors.closed)
            return self.ended
        if self.version != self._seen_version:
            self._seen_version = self.version
            self._replicas.say_alive()
            if not (self._ending or self._replicas.over):
                self._snapshots.ask()
                self._replicas.joining.poll(self._account, self._progress.message)
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
        self.totals.leave_out(loss.steps, loss.samples)
        self._losses.tell(loss, self.totals.steps)
        self._snapshots.lose(loss.replica)
        if self._final is not None and replicas.living:
            self._final.lose(loss.replica, replicas.testers)

    def _end(self) -> bool:
        """Write the last checkpoint, test, and end training on all ranks; return whether anything was done."""
        if self.rolls_back:
            self._tested = False
            if self._saver.busy:
                return False
        elif not self._checkpoints.complete:
            if not self._checkpoints.may_end:
                if not self._saver.busy:
                    self._replicas.say_alive()
                return False
            self._begin_checkpoint(last=True)
            return True
        if not self._replicas.living:
            self._session.watch.end("no replica is left")
        if self._tested and not self.stopped_by and not self._failure:
            if self._final is None:
                self._final = FinalTest(self._replicas.testers, self._ask)
            if (outcome := self._final.outcome) is None:
                return False
            self._tested = False
            self.test = outcome
            self.evaluated(outcome, Taken(self.totals.steps, self.epoch))
            assert self._checkpoints.path is not None
            amend(self._checkpoints.path, self._account, self._session.run.checkpoint.keep, self._progress.warn)
        if not (self.stopped_by or self._losses.stalls.may_end()):
            return False
        self._replicas.tell_all(MessageKind.END)
        self._replicas.tell_shards(MessageKind.END)
        self._busiest = max(self._busiest, self.applying)
        self._closing = True
        if self._role.mirrors is not None:
            self._role.mirrors.end()
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
            asked = self._session.callbacks.call(name, TrainingEvent(*event))
        except Exception as error:
            self._failure = error
            self._end_early(f"{name} of a callback has failed")
        else:
            if asked:
                self._end_early(f"{name} has asked for the end")

    def _end_early(self, why: str) -> bool:
        """Let all replicas finish, unless they do so in any case; return whether that is why; `why` is for the user."""
        if self._ending or self._replicas.over:
            return False
        self._ending = True
        self._progress.message(f"{why}: the run ends after the current steps")
        self._role.recorder.write(EndReport(self.totals.steps, self.epoch, why))
        self._stop_workers()
        return True

    def _stop_workers(self) -> None:
        """Let all replicas finish; those that pause push what they have accrued, so not while shards take vectors."""
        if self._rescuing:  # they have left
            return
        self._stopping = self._taking
        if not self._taking:
            self._pausing = False
            self._replicas.stop()

    def _begin_checkpoint(self, *, last: bool = False) -> None:
        """Let all shards take their vectors, while no worker's push is applied."""
        self.report()
        event = self.totals.steps, self.epoch, self.totals.samples
        self._checkpoints.begin(partial(self._take, last=last), self.version, event, last=last)

    def _take(self, *, last: bool) -> None:
        totals, own = self.totals, self._session.objective_state
        if totals.samples:
            self._account.learned(totals.recent.mean_loss, totals.recent.accuracy)
        steps, describe = self._replicas.describe(partial(self._info, **self._account.fields()))
        state = {} if own is None else own.to_store(self._state.packed)
        identity = self._saver.plan(steps, describe, state)
        self._replicas.tell_shards(MessageKind.CHECKPOINT, steps, identity, last)
        self.take_vectors(steps, identity, last=last)
