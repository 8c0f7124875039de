"""What the lead does for a real run, for a virtual one: reports, progress, evaluations, checkpoints, the result."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from dbmpi.checkpoint.amendment import amend
from dbmpi.checkpoint.lead_saver import LeadSaver
from dbmpi.checkpoint.schema import PARAMETERS, CheckpointInfo
from dbmpi.data.deal import Deal
from dbmpi.downpour.assignment import Assignment
from dbmpi.downpour.checkpoints import LeadCheckpoints
from dbmpi.downpour.datapath import Push
from dbmpi.downpour.evaluation import evaluate
from dbmpi.downpour.not_finite import not_finite
from dbmpi.downpour.totals import Totals
from dbmpi.monitor.callbacks import TrainingEvent
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.reports import EndReport, EvaluationReport, ShardReport
from dbmpi.objective import Outcome
from dbmpi.paramserver.protocol import LEAD, REPORT, Header
from dbmpi.paramserver.tally import Tally
from dbmpi.session import Session
from dbmpi.simulation.replica import VirtualLog, VirtualReplica
from dbmpi.simulation.shard import VirtualShard

_LOOK = 0.1
"""Real seconds between two looks at what a real clock decides: progress and checkpoints."""
_MOMENT = 1e-3
"""Real seconds between two looks at a checkpoint that is being written."""


class VirtualLead:
    """Follows the replicas and shards of a virtual run (the `Observer` of a cluster).

    Parameters
    ----------
    session
        Everything that is known of the run; its plan is the virtual one.
    shards
        All of them.
    saver
        Writes checkpoints, as if one shard had all parameters.
    progress
        Shows the progress.
    now
        Returns the virtual time.
    warmstart
        Batches that replica 0 learns alone.

    Attributes
    ----------
    totals
        What has been learned.
    test
        Outcome on the held-out samples at the end; None without.
    stopped_by
        Number of the signal that ended the run early; 0 if it ran to its end.
    rolls_back
        Whether the run is to go back to its last checkpoint.
    ended_by
        Why an evaluation ends the run, also one of an earlier session; empty where none does.
    waited
        Fraction of the replicas' time that they spent in fetches and pushes.
    """

    def __init__(
        self,
        session: Session,
        shards: Sequence[VirtualShard],
        saver: LeadSaver,
        progress: RunProgress,
        now: Callable[[], float],
        warmstart: int,
    ) -> None:
        run, begin = session.run, session.begin
        self._session, self._shards, self._saver, self._progress, self._now = session, shards, saver, progress, now
        self._workers, self._recorder = session.recorder("worker", 0), session.recorder("shard", LEAD)
        self._workers.clock = self._recorder.clock = now
        self._recorder.write(replace(session.started(), ranks=session.plan.world, virtual=1))
        self.totals = Totals(progress, begin.samples, session.order.samples)
        self._account, self._judge = session.account(), session.judge()
        self._checkpoints = LeadCheckpoints(run.checkpoint, saver, shards[LEAD].version, self._recorder, progress.warn)
        self._deal = Deal(begin.stream, session.plan.replicas, warmstart)
        self._learned, self._left, self._learned_samples = [0] * session.plan.replicas, len(begin.stream), 0
        self._every, self._evaluate_every = run.monitor.report_seconds, run.monitor.evaluate_epochs
        self._reported, self._next_evaluation = 0.0, self._evaluate_every
        while self._evaluate_every and self._next_evaluation <= self.epoch:
            self._next_evaluation += self._evaluate_every
        self._kept = [Tally() for _ in shards]
        """What shards have done since the last report in the records."""
        self._pushes, self._discarded, self._busy = [0] * len(shards), [0] * len(shards), [0.0] * len(shards)
        self._looked = time.monotonic()
        self._times: list[tuple[float, float]] = []
        self.ended_by = self._judge.verdict
        self._stopping, self.rolls_back = bool(self.ended_by), False
        self.stopped_by = 0
        self.test: Outcome | None = None

    @property
    def epoch(self) -> float:
        """Passes through the training samples by all replicas together, over all sessions."""
        return (self._session.begin.samples + self._learned_samples) / self._session.order.samples

    @property
    def waited(self) -> float:
        """Fraction of the replicas' time that they spent in fetches and pushes, of those that have finished."""
        return sum(waited for waited, _ in self._times) / max(sum(spent for _, spent in self._times), 1e-9)

    @property
    def busiest(self) -> float:
        """Fraction of the time that the busiest shard applied pushes."""
        return max(self._busy) / max(self._now(), 1e-9)

    # As a cluster tells

    def poll(self) -> bool:
        """Report in virtual time, show progress and write checkpoints in real time; return whether all must finish."""
        if self._now() - self._reported >= self._every:
            self._report()
        stop = self._session.stop
        if stop.number and not self._stopping:
            self.stopped_by = stop.number
            self._end_early(signal.Signals(stop.number).name)
        if time.monotonic() - self._looked >= _LOOK:
            self._look()
        return self._stopping

    def computed(self, replica: VirtualReplica, log: VirtualLog, outcome: Outcome) -> None:
        """Call the user's callbacks for a step of a `replica`, which is in its `log`, and its `outcome`."""
        loss, accuracy = outcome.mean_loss, outcome.accuracy
        step = TrainingEvent(
            log.steps, self._epoch_of(replica), outcome.samples, loss, accuracy, replica=replica.number
        )
        if self._session.callbacks.call("on_step", step):
            self._end_early("on_step has asked for the end")

    def pushed(self, replica: VirtualReplica, log: VirtualLog, push: Push) -> None:
        """Count a `push`; report on its `replica`, from its `log`, and evaluate, if it is time."""
        samples, loss, correct, _ = push.outcome
        self._learned[replica.number] = replica.learned
        self._left -= push.steps
        self._learned_samples += samples
        header = Header(0, 0, REPORT, 0, samples, correct, loss, push.steps, withheld=int(push.withheld))
        self._shards[LEAD].tally.add(header)
        if replica.withheld_in_a_row > self._session.run.optimizer.most_withheld:
            self._give_up(replica, log, push)
        if log.due(self._now(), self._every):
            self._report_on(replica, log)
        every = self._evaluate_every
        if every and self._left and self.epoch >= self._next_evaluation:
            self._next_evaluation = (self.epoch // every + 1) * every
            if self._session.data.test is not None:
                self._look()
                self._evaluated(self._evaluate())
                if self._checkpoints.wanted:
                    self._look()

    def finished(self, replica: VirtualReplica, log: VirtualLog) -> None:
        """Write the last report of a `replica`, from its `log`."""
        self._report_on(replica, log)
        self._times.append((log.waited, log.spent))

    # The end

    def conclude(self) -> None:
        """Write the last checkpoint, and evaluate."""
        self._report()
        self._look()
        if self.rolls_back:
            return
        while not self._checkpoints.complete:
            if self._checkpoints.may_end:
                self._save(last=True)
            time.sleep(_MOMENT)
        if self._session.data.test is None or self.stopped_by:
            return
        self.test = self._evaluate()
        self._evaluated(self.test)
        assert self._checkpoints.path is not None
        amend(self._checkpoints.path, self._account, self._session.run.checkpoint.keep, self._progress.warn)

    @property
    def checkpoint(self) -> Any:
        """The last checkpoint written; None before there is one."""
        return self._checkpoints.path

    def _end_early(self, why: str) -> None:
        if not self._stopping:
            self._stopping = True
            self._progress.message(f"{why}: the run ends after the current steps")
            self._recorder.write(EndReport(self.totals.steps, self.epoch, why))

    def _give_up(self, replica: VirtualReplica, log: VirtualLog, push: Push) -> None:
        """End the run, or let it go back, after more pushes that were not finite than are allowed in a row."""
        session = self._session
        run, batches, times = session.run, session.batches, replica.withheld_in_a_row
        assert batches is not None
        if run.optimizer.roll_back > 0:
            self.rolls_back = True
            self._end_early(f"replica {replica.number} withholds too many pushes in a row")
            return
        rate = run.optimizer.learning_rate
        assignment = Assignment(
            replica=replica.number,
            train=batches,
            stream=session.begin.stream,
            share=(),
            directory=run.run.directory,
            layers=run.network.layer_names or [tensor.name for tensor in session.model.layout.tensors],
            remedy=f"lower optimizer.learning_rate ({rate:g}), or look for extreme values in {run.data.called}",
        )
        raise not_finite(push, log.steps, replica.batch, times, assignment)

    def _evaluate(self) -> Outcome:
        """Return the outcome of the held-out samples at the present parameters; it takes no virtual time."""
        session = self._session
        assert session.replica is not None
        assert session.data.test is not None
        return evaluate(session.replica, self._vector(PARAMETERS), session.data.test, session.order.batch_size)

    def _evaluated(self, outcome: Outcome) -> None:
        steps, epoch = self.totals.steps, self.epoch
        self._recorder.write(EvaluationReport.of(outcome, steps, epoch))
        step = self._session.begin.step + steps
        best = self._judge.hear(step, outcome)
        self._checkpoints.wanted |= best and self._session.run.checkpoint.best == "at_once"
        self._account.tested(step, outcome, self._judge.fields)
        self._progress.evaluation(epoch, outcome.mean_loss, outcome.accuracy, outcome.samples, outcome.metrics)
        found = outcome.samples, outcome.mean_loss, outcome.accuracy
        self._call("on_evaluation", steps, epoch, *found, None, 0, outcome.metrics)
        if self._left and not (self._stopping or self.ended_by) and (verdict := self._judge.verdict):
            self.ended_by = verdict
            self._end_early(verdict)

    def _call(self, name: str, *event: Any) -> None:
        if self._session.callbacks.call(name, TrainingEvent(*event)):
            self._end_early(f"{name} has asked for the end")

    def _epoch_of(self, replica: VirtualReplica) -> float:
        return (replica.batch + 1) / self._session.order.batches_per_epoch

    def _vector(self, name: str) -> np.ndarray:
        """Return a vector of all shards: the parameters, or an array of the rule's state."""
        parts = [shard.parameters if name == PARAMETERS else shard.state[name] for shard in self._shards]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    # Reports

    def _report_on(self, replica: VirtualReplica, log: VirtualLog) -> None:
        report = log.report(self._now(), self._epoch_of(replica), replica.number)
        if report is not None:
            self._workers.write(report, replica.number)

    def _look(self) -> None:
        """Show the progress, and write a checkpoint if it is time."""
        self._count()
        if self._checkpoints.due(self._shards[LEAD].version):
            self._save()

    def _count(self) -> None:
        """Take the tallies of all shards, and show the progress."""
        seconds, self._looked = time.monotonic() - self._looked, time.monotonic()
        for shard, kept in zip(self._shards, self._kept, strict=True):
            tally = shard.take_tally()
            kept.merge(tally)
            if shard.number == LEAD:
                self.totals.add(tally, seconds)
            else:
                self.totals.discarded += tally.discarded

    def _report(self) -> None:
        """Write reports of all shards."""
        interval, self._reported = self._now() - self._reported, self._now()
        self._count()
        for number, shard in enumerate(self._shards):
            tally, self._kept[number] = self._kept[number], Tally()
            self._pushes[number] += tally.pushes
            self._discarded[number] += tally.discarded
            self._busy[number] += tally.apply_seconds
            if not (tally.pushes or tally.discarded):
                continue
            report = ShardReport(
                version=shard.version,
                pushes=self._pushes[number],
                staleness=tally.staleness.summary(),
                staleness_histogram=tally.staleness.counts,
                queue=tally.deepest_queue,
                seconds={
                    "apply": tally.apply_seconds,
                    "serve": 0.0,
                    "idle": max(interval - tally.apply_seconds, 0.0),
                },
                applied_bytes=tally.applied_bytes,
                discarded=self._discarded[number],
            )
            self._recorder.write(report, number)

    # Checkpoints

    def _save(self, *, last: bool = False) -> None:
        """Write a checkpoint, which takes no virtual time; a disk that fails costs no more than that."""
        checkpoints, totals = self._checkpoints, self.totals
        event = totals.steps, self.epoch, totals.samples
        checkpoints.begin(partial(self._take, last=last), self._shards[LEAD].version, event, last=last)
        written = checkpoints.finished()
        while written is None and self._saver.busy:
            checkpoints.poll()
            time.sleep(_MOMENT)
            written = checkpoints.finished()
        if written is not None:
            self._call("on_checkpoint", *written, math.nan, None, checkpoints.path)

    def _take(self, *, last: bool) -> None:
        session, totals = self._session, self.totals
        if totals.samples:
            self._account.learned(totals.recent.mean_loss, totals.recent.accuracy)
        own = session.objective_state
        steps, describe = self._describe(partial(session.checkpoint_info(), **self._account.fields()))
        identity = self._saver.plan(steps, describe, {} if own is None else own.to_store(own.pack()))
        names = (PARAMETERS, *self._shards[LEAD].state)
        vectors = {name: self._vector(name) for name in names}
        version = max(shard.version for shard in self._shards)
        self._saver.begin(steps, identity, vectors, version, last=last)

    def _describe(self, info: Callable[..., CheckpointInfo]) -> tuple[int, Callable[..., CheckpointInfo]]:
        """Return the step of a checkpoint of what has been learned, and what describes it."""
        begin = self._session.begin
        left, steps = self._deal.left(self._learned), begin.step + sum(self._learned)
        return steps, partial(
            info,
            shards=1,
            step=steps,
            samples=begin.samples + self._learned_samples,
            begun=max(shard.begun for shard in self._shards),
            frontier=left.frontier,
            total=left.total,
            holes=left.holes,
            done=tuple(
                before + now for before, now in zip(begin.done or (0,) * len(self._learned), self._learned, strict=True)
            ),
        )
