"""Sandblaster: the coordinator of distributed batch optimisation (paper, section 4.2 and algorithm 1.2).

The coordinator runs a batch method, such as L-BFGS, on the lead's rank.  It holds no vector: the method works on those
of the shards by commands, which send back nothing but scalars, and has its batches evaluated by the replicas (see
:mod:`dbmpi.sandblaster.evaluation`).  Between two iterations the coordinator tests, and has checkpoints written.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dbmpi.errors import EndedByDeath, EndedElsewhere, RunFailed
from dbmpi.methods import descent
from dbmpi.methods.descent import ORIGIN, POINT, Limits, Report
from dbmpi.methods.lbfgs import History
from dbmpi.methods.multibatch import multi_batch_lbfgs
from dbmpi.methods.select import Choice, minimise
from dbmpi.monitor.callbacks import TrainingEvent
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.records import Recorder
from dbmpi.monitor.reports import BatchReport, EndReport, EvaluationReport
from dbmpi.mpi import failures
from dbmpi.objective import Outcome
from dbmpi.sandblaster.batches import REASONS, samples_of, sampling
from dbmpi.sandblaster.checkpoints import Keeper
from dbmpi.sandblaster.evaluation import Evaluator, Interrupted, LastReplicaLost

if TYPE_CHECKING:
    from pathlib import Path

    from dbmpi.methods.own import Method
    from dbmpi.sandblaster.state import MethodState
    from dbmpi.session import Session

_LONGEST_LEDGER = 8192
"""Portions whose replicas fit into a line of the records."""


class Coordinator:
    """Runs a batch method over shards and replicas, on the lead's rank.

    Parameters
    ----------
    session
        The run.
    state
        Where the method stood at the end of an earlier session.
    tests
        Number of held-out samples.
    evaluator
        Evaluates losses and gradients.
    keeper
        Writes checkpoints.
    recorder
        Writes reports.
    progress
        Shows how the run advances.
    method
        The user's own batch method, if it is not one of ours.

    Attributes
    ----------
    steps, samples
        Portions, and samples behind them, that counted in this session.
    iterations
        Iterations finished in this session.
    best
        The least mean loss of the training samples that an evaluation came to; NaN before the first one.
    converged
        Whether the method ended by itself.
    test
        The outcome on the held-out samples at the end; None without any, or after a stop.
    ended_by
        Why an evaluation ends the run, also one of an earlier session; empty where none does.
    """

    def __init__(
        self,
        session: Session,
        state: MethodState | None,
        tests: int,
        *,
        evaluator: Evaluator,
        keeper: Keeper,
        recorder: Recorder,
        progress: RunProgress,
        method: Method | None = None,
    ) -> None:
        self._settings, self._order, self._begin = session.run.sandblaster, session.order, session.begin
        self._state, self._tests = state, tests
        self._evaluator, self._keeper = evaluator, keeper
        self.space = evaluator.space
        self._recorder, self._progress = recorder, progress
        self._total = round(session.order.samples * session.run.optimizer.epochs)
        self._method = method
        self._callbacks, self._asked = session.callbacks, False
        self._judge, self._at_once = session.judge(), session.run.checkpoint.best == "at_once"
        self._wanted = False
        """Whether a checkpoint is to be written, because an evaluation is the best so far."""
        self._sampling = sampling(self._settings, session.order, session.draws)
        self._left = session.begin.stream.total - session.begin.stream.frontier
        self._counted = 0, 0
        """Portions and samples that had counted after the last iteration."""
        self._history: History | None = None
        self._trying = self._moved = False
        """Whether the point is one that is only tried; whether the batch has changed since."""
        self._tested_at = -1
        self._every = self._next_test = session.run.monitor.evaluate_epochs
        self._announced: Path | None = None
        """The checkpoint that callbacks know of."""
        self.steps = self.samples = self.iterations = 0
        self.best = math.nan
        self.converged = False
        self.test: Outcome | None = None
        self.ended_by = self._judge.verdict

    def run(self) -> None:
        """Learn until the method or the epochs are at their end, or a signal comes; write a checkpoint, and test.

        Raises
        ------
        RunFailed
            Where the method fails, or finds that there is no minimum, or a worker has failed: after a checkpoint of
            what was learned.
        """
        try:
            report = self._minimise()
            if report is not None:
                self.converged = report.reason in ("gradient", "loss", "precision")
                self._progress.message(
                    f"{report.iterations:,} iterations, {report.evaluations:,} evaluations: "
                    f"{REASONS['evaluations' if self._used_up else report.reason]}"
                    f"   loss {report.loss:.7g}   gradient {report.largest:.3g}"
                )
                if report.reason == "unbounded":
                    raise RunFailed(
                        f"the loss has no minimum, as it seems: it has fallen to {report.loss:g}.  Look for a term "
                        "with the wrong sign, or set sandblaster.l2, which keeps the parameters small."
                    )
        except Interrupted:
            self._go_back()
        except Exception as failure:
            self._keep_before(failure)
            raise
        try:
            self._write(last=True)
        except RunFailed as failure:
            if self._evaluator.failed is None:
                raise
            self._progress.warn(f"no checkpoint could be written: {failure}")  # and the worker says what came first
        if self._tests and not self._evaluator.interrupted and self._tested_at != self.steps:
            with suppress(Interrupted):
                self._evaluate_test()
                self._keeper.amend()
        if self.stopped_by or self._tested_at != self.steps:
            self.test = None
        self._evaluator.end()

    def _keep_before(self, failure: Exception) -> None:
        """Write a checkpoint of what was learned before a `failure`, if that is possible and of use."""
        if isinstance(failure, EndedElsewhere | EndedByDeath) or failures.reports_death(failure):
            return  # without a shard nothing can be gone back to, and the watch says which one
        self._go_back()
        if self.steps:
            self._keeper.write(self.steps, self.samples, last=True)
        if isinstance(failure, LastReplicaLost):
            self._evaluator.give_up(failure)
        if not self.steps:
            return
        kept = f"what was learned before is in {self.checkpoint}"
        if isinstance(failure, RunFailed):
            raise RunFailed(f"{failure}  {kept[0].upper()}{kept[1:]}.") from failure
        self._progress.message(kept)

    @property
    def stopped_by(self) -> int:
        """Number of the signal that ended the run early; 0 if it ran to its end."""
        return self._evaluator.stopped_by

    @property
    def lost(self) -> list[int]:
        """Replicas that have died."""
        return sorted(self._evaluator.passes.lost)

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint written."""
        return self._keeper.last

    @property
    def epoch(self) -> float:
        """Passes over the training samples, over all sessions."""
        return (self._begin.samples + self.samples) / self._order.samples

    # What a batch method calls

    def evaluate(self, point: str, gradient: str) -> float:
        """Pass over the batch: return the mean loss at `point`, and leave its `gradient` on the shards."""
        if self._moved:
            self._moved = self._trying = False  # the same point on other samples
        loss = self._evaluate(self._sampling.portions, point, gradient)
        self._trying = True
        self._sampling.evaluated(loss)
        return loss

    def evaluate_parts(self, point: str, gradient: str, shared: str, following: str) -> float:
        """Pass over the batch in three parts: what the last batch has, too, the rest, and what the next one will have.

        See :class:`dbmpi.methods.multibatch.SharingBatches`.

        Parameters
        ----------
        point
            Name of the vector with the parameters.
        gradient, shared, following
            Names of the vectors for the gradients of the mean losses of the whole batch, and of both shared parts.
        """
        portions, overlap = self._sampling.portions, self._settings.batch_overlap
        inner = portions[overlap : len(portions) - overlap]
        parts = [(portions[:overlap], shared), (portions[len(portions) - overlap :], following), (inner, gradient)]
        total, loss, terms = samples_of(self._order, portions), 0.0, []
        for part, name in parts if inner else parts[:-1]:
            share = samples_of(self._order, part) / total
            loss += share * self._evaluate(part, point, name)
            terms.append((share, name))
        self._trying = True
        self.space.combine(gradient, terms)
        if strength := self._settings.l2:
            for name in (gradient, shared, following):
                self.space.axpy(strength, point, name)
            loss += strength / 2 * float(self.space.dots([(point, point)])[0])
        return loss

    def proceed(self) -> bool:
        """Go on to the next batch, when it is time."""
        moved = self._sampling.proceed()
        self._moved = moved and not self._settings.batch_overlap
        return moved

    def exhausted(self) -> bool:
        """Go on with a larger batch, if there is any."""
        self._moved = self._sampling.exhausted()
        return self._moved

    def _evaluate(self, portions: range, point: str, gradient: str) -> float:
        assert point == POINT, f"replicas fetch {POINT!r}, and not {point!r}"
        count, reached = samples_of(self._order, portions), self._begin.after(self.steps + len(portions))
        seconds = self._evaluator.gradient(gradient, portions, count, reached)
        passes = self._evaluator.passes
        outcome = passes.outcome
        self.steps += len(portions)
        self.samples += outcome.samples
        self.best = min(outcome.mean_loss, self.best)  # NaN is above nothing
        self._recorder.write(
            BatchReport(
                iteration=self.iterations,
                epoch=self.epoch,
                loss=outcome.mean_loss,
                accuracy=outcome.accuracy,
                samples=outcome.samples,
                portions=passes.shares,
                ledger=passes.contributors if len(portions) <= _LONGEST_LEDGER else None,
                revoked=passes.revoked,
                seconds=seconds,
                lost=self.lost,
            )
        )
        shown = min(self._begin.samples + self.samples, self._total)
        rate = outcome.samples / max(seconds, 1e-9)
        self._progress.update(shown, outcome.mean_loss, outcome.accuracy, rate, None)
        return outcome.mean_loss

    # Helpers

    def _go_back(self) -> None:
        """Go back to where the last iteration ended."""
        self._tested_at = -1
        if self._trying and ORIGIN in self.space.names:
            self.space.copy(ORIGIN, POINT)  # the search had gone on from there, and will do so again
        self.steps, self.samples = self._counted

    def _minimise(self) -> Report | None:
        settings, state = self._settings, self._state
        if state is not None:
            self._sampling.restore(state.batches)
        if self._used_up or self.ended_by:
            return None
        history = None
        if settings.algorithm == "lbfgs":
            self._history = history = History(self.space, settings.memory)
            if state is not None:
                history.restore(state.arrays)
                self._trying = state.start is not None
        limits, callback = Limits(settings.gtol, settings.ftol), self._after_iteration
        if settings.batch_overlap:
            assert history is not None
            length = settings.step_length
            return multi_batch_lbfgs(self.space, self, history, step_length=length, limits=limits, callback=callback)
        choice = Choice(
            self._method or settings.algorithm, settings.line_search, settings.step_length, settings.l1, settings.l2
        )
        return minimise(
            self.space,
            self.evaluate,
            choice,
            limits=limits,
            callback=callback,
            batches=None if self._sampling.whole else self,
            history=history,
            start=None if state is None else state.start,
        )

    @property
    def _used_up(self) -> bool:
        """Whether the epochs leave too few portions for another batch."""
        return self._left - self.steps < len(self._sampling.portions)

    def _after_iteration(self, progress: descent.Progress) -> bool:
        """Write a checkpoint and test, when it is time; return whether the run is to end."""
        self.iterations, self._trying = progress.iteration, False
        self._counted = self.steps, self.samples
        if self._history is not None:
            self._keeper.note(self._history, self._sampling.position, progress)
        learned, samples = self._evaluator.passes.outcome, samples_of(self._order, self._sampling.portions)
        whole = learned.samples == samples  # and not the last of several parts of a batch
        accuracy = learned.accuracy if whole else None
        self._keeper.account.learned(learned.mean_loss if whole else progress.loss, accuracy)
        self._call("on_step", self.iterations, self.epoch, samples, progress.loss, accuracy)
        self._evaluator.serve()
        every = self._every
        if every and self._tests and self.epoch >= self._next_test and not self._evaluator.interrupted:
            self._next_test = (self.epoch // every + 1) * every
            self._evaluate_test()
        self._announce()
        if (self._keeper.due or self._wanted) and not self._evaluator.interrupted:
            self._write()
        self._trying = True  # what comes next is
        verdict = "" if self._used_up else self._judge.verdict
        if verdict:
            self.ended_by = verdict
            self._progress.message(f"{verdict}: the run ends")
            self._recorder.write(EndReport(self.steps, self.epoch, verdict))
        return self._evaluator.interrupted or self._used_up or self._asked or bool(verdict)

    def _write(self, *, last: bool = False) -> None:
        """Begin a checkpoint, or write the last one."""
        self._wanted = False
        self._keeper.finish()
        self._announce()
        self._keeper.write(self.steps, self.samples, last=last)
        self._announce()

    def _announce(self) -> None:
        """Call callbacks where a checkpoint is written by now."""
        if self.checkpoint in (None, self._announced):
            return
        self._announced = self.checkpoint
        steps, samples = self._keeper.written
        epoch = (self._begin.samples + samples) / self._order.samples
        self._call("on_checkpoint", steps, epoch, samples, math.nan, None, self.checkpoint)

    def _call(self, name: str, *event: Any) -> None:
        """Call callbacks, and remember if one asks for the end."""
        self._asked |= self._callbacks.call(name, TrainingEvent(*event))

    def _evaluate_test(self) -> None:
        """Record and show the outcome on the held-out samples at the present parameters."""
        portions = -(-self._tests // self._order.batch_size)
        self._evaluator.test(portions, self._tests, self._begin.after(self.steps))
        self.test = outcome = self._evaluator.passes.outcome
        self._tested_at = self.steps
        step = self._begin.step + self.steps
        self._wanted |= self._judge.hear(step, outcome) and self._at_once
        self._keeper.account.tested(step, outcome, self._judge.fields)
        self._recorder.write(EvaluationReport.of(outcome, self.steps, self.epoch))
        self._progress.evaluation(self.epoch, outcome.mean_loss, outcome.accuracy, outcome.samples, outcome.metrics)
        loss, accuracy, metrics = outcome.mean_loss, outcome.accuracy, outcome.metrics
        self._call("on_evaluation", self.steps, self.epoch, outcome.samples, loss, accuracy, None, 0, metrics)
