"""Sandblaster: the coordinator of distributed batch optimisation (paper, section 4.2 and algorithm 1.2).

The coordinator runs a batch method, such as L-BFGS, on the lead's rank.  It holds no vector: it sends commands to the
shards, which send back nothing but scalars, and it offers batches to the replicas.  An evaluation is

1. the shards set the accrued gradient to zero, and *meet*, so that the point is complete on all of them;
2. the batch is put on the board; replicas fetch the point, draw portions, and commit sums of gradients;
3. the shards take each committed sum from the replica's memory and add it up;
4. the losses of the portions, which the replicas wrote down, are added up in their order.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.schema import CheckpointInfo, library_versions
from dbmpi.config import Run
from dbmpi.errors import RunFailed
from dbmpi.monitor.progress import Progress
from dbmpi.monitor.records import BatchReport, EvaluationReport, Recorder
from dbmpi.objective import Outcome
from dbmpi.optim import descent
from dbmpi.optim.batches import REASONS, Beginning, Samples, sampling
from dbmpi.optim.board import Board, Kind
from dbmpi.optim.commands import Command, RemoteSpace, execute
from dbmpi.optim.descent import ORIGIN, POINT, Report
from dbmpi.optim.lbfgs import History
from dbmpi.optim.minimising import minimise
from dbmpi.optim.passes import Passes, Station
from dbmpi.optim.resuming import capture
from dbmpi.optim.saving import check_finite, save
from dbmpi.optim.shardspace import COMMANDS, ShardSpace
from dbmpi.partition.arrangement import Arrangement
from dbmpi.runtime import orders, waiting
from dbmpi.runtime.failures import RESUMING

if TYPE_CHECKING:
    from pathlib import Path

    from dbmpi.optim.ownmethod import Method
    from dbmpi.paramserver.layout import Layout
    from dbmpi.paramserver.window import Window
    from dbmpi.runtime.failures import Watch
    from dbmpi.runtime.orders import Mailbox
    from dbmpi.runtime.signals import StopSignal
    from dbmpi.topology import Plan

_CAUTION = 1e-10
"""A pair is learned only if ``y.s`` is this fraction of ``|s|^2``."""

_LONGEST_LEDGER = 8192
"""Portions of which a line of the records can tell who computed them."""


class _Interrupted(Exception):
    """A signal asks for the end in the middle of an evaluation."""


class Coordinator:
    """Runs a batch method over shards and replicas, on the lead's rank.

    Parameters
    ----------
    space
        The lead's own shard.
    serve
        What else this rank has to do while it waits: the work of a replica, where there is one on this rank.
    watch
        Knows of ranks that have died.
    method
        The user's own batch method, if it is not one of ours.

    Attributes
    ----------
    stopped_by
        Number of the signal that ended the run early; 0 if it ran to its end.
    checkpoint
        The last checkpoint written.
    steps, samples
        Portions, and samples behind them, that counted in this session.
    test
        The outcome on the held-out samples at the end; None without any, or after a stop.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        run: Run,
        plan: Plan,
        layout: Layout,
        ranges: Sequence[range],
        samples: Samples,
        beginning: Beginning,
        *,
        space: ShardSpace,
        carried: Sequence[str],
        board: Board,
        window: Window,
        stations: Sequence[Sequence[Station]],
        mailbox: Mailbox,
        recorder: Recorder,
        progress: Progress,
        stop: StopSignal,
        serve: Callable[[], bool],
        watch: Watch,
        method: Method | None = None,
    ) -> None:
        self._comm, self._run, self._plan, self._layout, self._ranges = comm, run, plan, layout, ranges
        self._samples, self._beginning = samples, beginning
        self._local, self._carried = space, tuple(carried)
        self._board = board
        self._mailbox, self._recorder, self._progress, self._stop = mailbox, recorder, progress, stop
        self._serve_others, self._watch = serve, watch
        self._mourned: set[int] = set()
        self._method = method
        self._leaving: list[tuple[MPI.Request, np.ndarray]] = []
        self.space = RemoteSpace(self._submit, space.names)
        self._gradient = ""
        self._passes = Passes(board, window, stations, self._accrue, ordered=run.sandblaster.deterministic)
        self._sampling = sampling(run, samples.order, run.sandblaster.batch_overlap)
        self._left = beginning.stream.total - beginning.stream.frontier
        self._state, self._counted = beginning.state, (0, 0)
        """Where the method stood after its last iteration, and portions and samples that had counted then."""
        self._history: History | None = None
        self._iterations = self._evaluations = 0
        self._trying = self._moved = False
        """Whether the point is one that is only tried; whether the batch has changed since."""
        self._tested_at = -1
        self._checkpointed = time.monotonic()
        self._next_test = run.monitor.evaluate_epochs
        self.steps = self.samples = self.stopped_by = 0
        self.checkpoint: Path | None = None
        self.test: Outcome | None = None

    def run(self) -> None:
        """Learn until the method or the epochs are at their end, or a signal comes; write a checkpoint, and test."""
        try:
            report = self._minimise()
            if report is not None:
                self._progress.message(
                    f"{report.iterations:,} iterations, {report.evaluations:,} evaluations: "
                    f"{REASONS['evaluations' if self._used_up else report.reason]}"
                    f"   loss {report.loss:.7g}   gradient {report.largest:.3g}"
                )
        except _Interrupted:
            self._tested_at = -1
            if self._trying and ORIGIN in self.space.names:
                self.space.copy(ORIGIN, POINT)  # the search had gone on from there, and will do so again
            self.steps, self.samples = self._counted
        self._save()
        if self._samples.tests and not self.stopped_by and self._tested_at != self.steps:
            self._evaluate_test()
        if self.stopped_by or self._tested_at != self.steps:
            self.test = None
        self._submit(Command("end", (), ()))
        self._board.end()
        for request, _ in self._leaving:
            waiting.complete(request, "the last commands to leave")

    @property
    def epoch(self) -> float:
        """Passes over the training samples, over all sessions."""
        return (self._beginning.samples + self.samples) / self._samples.order.samples

    # What a batch method calls

    def evaluate(self, point: str, gradient: str) -> float:
        """Pass over the batch: return the mean loss at the parameters, and leave its gradient on the shards."""
        if self._moved:
            self._moved = self._trying = False  # the same point on other samples
        loss = self._evaluate(self._sampling.portions, point, gradient)
        self._trying = True
        self._sampling.evaluated(loss)
        return loss

    def evaluate_parts(self, point: str, gradient: str, shared: str, following: str) -> float:
        """Pass over the batch in three parts: what the last batch has, too, the rest, and what the next one will have.

        See :class:`dbmpi.optim.multibatch.SharingBatches`.
        """
        portions, overlap = self._sampling.portions, self._run.sandblaster.batch_overlap
        inner = portions[overlap : len(portions) - overlap]
        parts = [(portions[:overlap], shared), (portions[len(portions) - overlap :], following), (inner, gradient)]
        total, loss, terms = self._samples.of(portions), 0.0, []
        for part, name in parts if inner else parts[:-1]:
            share = self._samples.of(part) / total
            loss += share * self._evaluate(part, point, name)
            terms.append((share, name))
        self._trying = True
        self.space.combine(gradient, terms)
        if strength := self._run.sandblaster.l2:
            for name in (gradient, shared, following):
                self.space.axpy(strength, point, name)
            loss += strength / 2 * float(self.space.dots([(point, point)])[0])
        return loss

    def proceed(self) -> bool:
        """Go on to the next batch, when it is time."""
        moved = self._sampling.proceed()
        self._moved = moved and not self._run.sandblaster.batch_overlap
        return moved

    def exhausted(self) -> bool:
        """Go on with a larger batch, if there is any."""
        self._moved = self._sampling.exhausted()
        return self._moved

    def _evaluate(self, portions: range, point: str, gradient: str) -> float:
        assert point == POINT, f"replicas fetch {POINT!r}, and not {point!r}"
        count = self._samples.of(portions)
        self._gradient = gradient
        while True:
            self.space.create(gradient)
            seconds = self._pass(Kind.GRADIENT, len(portions), portions.start, count, self._frontier(len(portions)))
            self._evaluations += 1
            if not (self._watch.on and self._submit(Command("meet", (), ())).any()):
                break
            self._progress.message("what a dead replica had delivered is out of reach: the evaluation begins anew")
        outcome = self._passes.outcome
        self.steps += len(portions)
        self.samples += outcome.samples
        self._recorder.write(
            BatchReport(
                iteration=self._iterations,
                epoch=self.epoch,
                loss=outcome.mean_loss,
                accuracy=outcome.accuracy,
                samples=outcome.samples,
                portions=self._passes.shares,
                ledger=self._passes.contributors if len(portions) <= _LONGEST_LEDGER else None,
                revoked=self._passes.revoked,
                seconds=seconds,
                lost=sorted(self._passes.lost),
            )
        )
        total = round(self._samples.order.samples * self._run.optimizer.epochs)
        shown = min(self._beginning.samples + self.samples, total)
        rate = outcome.samples / max(seconds, 1e-9)
        self._progress.update(shown, outcome.mean_loss, outcome.accuracy, rate, None)
        return outcome.mean_loss

    # Helpers

    def _minimise(self) -> Report | None:
        settings, state = self._run.sandblaster, self._beginning.state
        if state is not None:
            self._sampling.restore(state.place)
        if self._used_up:
            return None
        if settings.algorithm == "lbfgs":
            self._history = History(self.space, settings.memory, _CAUTION)
            if state is not None:
                self._history.restore(state.arrays)
                self._trying = state.start is not None
        return minimise(
            self,
            settings,
            whole=self._sampling.whole,
            own=self._method,
            callback=self._after_iteration,
            history=self._history,
            start=None if state is None else state.start,
        )

    @property
    def _used_up(self) -> bool:
        """Whether the epochs have no room for another batch."""
        return self._left - self.steps < len(self._sampling.portions)

    def _submit(self, command: Command) -> np.ndarray:
        """Let all shards carry out a command; return what the lead's shard says, which is what they all say."""
        data = np.frombuffer(command.encode(), np.uint8)
        self._leaving = [(request, sent) for request, sent in self._leaving if not request.Test()]
        for rank in self._plan.shard_ranks[1:]:
            self._leaving.append((self._comm.Isend([data, MPI.BYTE], rank, COMMANDS), data))
        return execute(self._local, command)

    def _accrue(self, replica: int, bundle: int) -> None:
        self._submit(Command("accrue", (self._gradient,), (float(replica), float(bundle))))

    def _pass(self, kind: Kind, portions: int, first: int, samples: int, place: int) -> float:
        """Let the replicas work through a batch; return the seconds it took."""
        self._submit(Command("meet", (), ()))
        began = time.monotonic()
        self._passes.begin(kind, portions, first, samples, place)
        waiting.until(lambda: self._passes.finished or bool(self.stopped_by), self._passes.awaited, serve=self._serve)
        if not self._passes.finished:
            raise _Interrupted
        return time.monotonic() - began

    def _serve(self) -> bool:
        self._watch.look()
        if len(self._watch.dead) > len(self._mourned):
            self._mourn()
        moved = self._passes.poll()
        while (message := self._mailbox.receive()) is not None:
            if message.kind == orders.Kind.STOP_ASKED:
                self._stop_asked(message.values[0])
        if self._stop.number:
            self._stop_asked(self._stop.number)
        return self._serve_others() or moved

    def _mourn(self) -> None:
        """Go on without the replicas of which a rank has died."""
        plan, lost = self._plan, self._passes.lost
        for rank in sorted(self._watch.dead - self._mourned):
            self._mourned.add(rank)
            worker = plan.worker_of(rank)
            assert worker is not None
            replica = worker // plan.partitions
            self._passes.give_up(replica)
            left = plan.replicas - len(lost)
            if not left:
                raise RunFailed(f"{self._watch.name(rank)} has died, and with it the last replica.  {RESUMING}")
            self._progress.message(
                f"{self._watch.name(rank)} has died, and with it replica {replica}: what it had not delivered is "
                f"handed out again, and the run goes on with {left} of {plan.replicas} replicas"
            )

    def _stop_asked(self, number: int) -> None:
        if not self.stopped_by:
            self.stopped_by = number
            name = signal.Signals(number).name
            self._progress.message(f"{name}: the run ends here, with a checkpoint")

    def _after_iteration(self, progress: descent.Progress) -> bool:
        """Write a checkpoint and test, when it is time; return whether the run is to end."""
        self._iterations, self._trying = progress.iteration, False
        self._keep_state(progress)
        self._serve()
        every = self._run.monitor.evaluate_epochs
        if every and self._samples.tests and self.epoch >= self._next_test and not self.stopped_by:
            self._next_test = (self.epoch // every + 1) * every
            self._evaluate_test()
        seconds = self._run.checkpoint.every_seconds
        if seconds and time.monotonic() - self._checkpointed >= seconds and not self.stopped_by:
            self._save()
        self._trying = True  # what comes next is
        return bool(self.stopped_by) or self._used_up

    def _keep_state(self, progress: descent.Progress) -> None:
        """Note where the method stands, for a checkpoint."""
        self._counted = self.steps, self.samples
        if self._history is None:
            return
        # What goes on from a gradient goes on to the last bit; the other methods begin with an evaluation.
        settings = self._run.sandblaster
        bounds = None if settings.l1 or settings.batch_overlap else self._local.bounds()
        self._state = capture(self._history, self._sampling.position, progress, bounds)

    def _evaluate_test(self) -> None:
        """Record and show the outcome on the held-out samples at the present parameters."""
        self._pass(Kind.TEST, self._samples.test_portions, 0, self._samples.tests, self._frontier())
        self.test = outcome = self._passes.outcome
        self._tested_at = self.steps
        self._recorder.write(
            EvaluationReport(
                step=self.steps,
                epoch=self.epoch,
                loss=outcome.mean_loss,
                accuracy=outcome.accuracy,
                samples=outcome.samples,
            )
        )
        self._progress.evaluation(self.epoch, outcome.mean_loss, outcome.accuracy, outcome.samples)

    def _frontier(self, more: int = 0) -> int:
        """Return the place in the stream that all portions so far, and some more, make."""
        stream = self._beginning.stream
        return min(stream.frontier + self.steps + more, stream.total)

    def _save(self) -> None:
        """Write the parameters, the history, and what the shards carry along, into a checkpoint."""
        plan, samples, beginning, state = self._plan, self._samples, self._beginning, self._state
        names = (POINT, *self._carried, *(state.vectors if state is not None else ()))
        steps = beginning.step + self.steps
        self._submit(Command("hand_over", names, ()))

        def describe(versions: tuple[int, ...]) -> CheckpointInfo:
            return CheckpointInfo(
                configuration=self._run.to_json(),
                step=steps,
                samples=beginning.samples + self.samples,
                shard_versions=versions,
                shards=plan.shards,
                replicas=plan.replicas,
                partitions=plan.partitions,
                input_shape=samples.input_shape,
                classes=samples.classes,
                frontier=self._frontier(),
                total=beginning.stream.total,
                holes=beginning.stream.holes,
                method="" if state is None else state.model_dump_json(),
                libraries=library_versions(MPI.Get_library_version()),
            )

        self.checkpoint = save(
            self._comm,
            plan.shard_ranks,
            checkpoint_path(self._run.run.directory, steps),
            Arrangement(self._layout, tuple(self._ranges)),
            {name: self._local.array(name) for name in names},
            self._local.version,
            describe,
            keep=self._run.checkpoint.keep,
            check=partial(check_finite, self._run.run.directory),
        )
        self._checkpointed = time.monotonic()
