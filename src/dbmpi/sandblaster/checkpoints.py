"""Checkpoints of Sandblaster: what the shards hold, and where the batch method stands, noted on the lead's rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from dbmpi.checkpoint.amendment import amend
from dbmpi.checkpoint.attempts import Attempts
from dbmpi.checkpoint.lead_saver import LeadSaver
from dbmpi.errors import DiskFailed
from dbmpi.methods.descent import POINT, Progress
from dbmpi.methods.lbfgs import History
from dbmpi.monitor.records import Recorder
from dbmpi.monitor.reports import CheckpointReport
from dbmpi.mpi import waiting
from dbmpi.sandblaster.commands import Command
from dbmpi.sandblaster.state import Position, capture

if TYPE_CHECKING:
    from pathlib import Path

    from dbmpi.sandblaster.shard import Shards
    from dbmpi.sandblaster.state import MethodState
    from dbmpi.session import Session


class Keeper:
    """Writes checkpoints between two iterations.

    Parameters
    ----------
    session
        What the run is.
    state
        Where the method stands, until it is noted again.
    shards
        Hold the vectors.
    saver
        Writes them, together with the shards.
    recorder
        Writes a report of each.
    carried
        Names of the vectors that are kept for another optimizer.
    warn
        Tells the user a line.
    serve
        What this rank has to do while it waits.

    Attributes
    ----------
    last
        The last checkpoint written.
    written
        Portions, and samples behind them, of this session that are in it.
    account
        What checkpoints say beside the position.
    """

    def __init__(
        self,
        session: Session,
        state: MethodState | None,
        shards: Shards,
        saver: LeadSaver,
        recorder: Recorder,
        *,
        carried: Sequence[str],
        warn: Callable[[str], None],
        serve: Callable[[], bool],
    ) -> None:
        self._session, self._shards, self._carried = session, shards, tuple(carried)
        self._state = state
        """Where the method stood after its last iteration."""
        # The other ranks wait meanwhile, without a sign of life.
        settings = session.run.checkpoint
        patience = min(settings.retry_seconds, waiting.STALL_SECONDS / 2)
        self._attempts, self._serve = Attempts(settings, patience, warn), serve
        self._recorder = recorder
        self._saver, self._last, self._counts = saver, False, (0, 0)
        self._problem: DiskFailed | None = None
        """Why the checkpoint that was begun last could not be written."""
        self.account, self._warn = session.account(), warn
        self.last: Path | None = None
        self.written = 0, 0

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self._attempts.due and not self._saver.busy

    def note(self, history: History, position: Position, progress: Progress) -> None:
        """Note where L-BFGS stands after an iteration.

        Parameters
        ----------
        history, progress
            Of the method.
        position
            Of the batches.
        """
        # What goes on from a gradient goes on to the last bit; the other methods begin with an evaluation.
        settings = self._session.run.sandblaster
        bounds = None if settings.l1 or settings.batch_overlap else self._shards.lead.bounds()
        self._state = capture(history, position, progress, bounds)

    def poll(self) -> bool:
        """Go on with what is being written; return whether anything moved.

        Raises
        ------
        RunFailed
            If some parameters are not finite, or another run has taken the directory over.
        """
        moved = self._saver.poll()
        try:
            path = self._saver.result()
        except DiskFailed as error:
            self._problem = error
            if not self._last:
                self._attempts.fail(error)
            return True
        if path is None:
            return moved
        self._attempts.succeed()
        self.last, self.written, self._problem = path, self._counts, None
        saver = self._saver
        self._recorder.write(CheckpointReport(path.name, saver.size, saver.seconds, 0.0, saver.waited))
        return True

    def write(self, steps: int, samples: int, *, last: bool = False) -> None:
        """Write the parameters, the history, and what the shards carry along, into a checkpoint.

        It is only begun, and written while the run goes on; unless it is the last one.  Where the disk does not take it
        the run goes on without; unless it is the last one, which is tried for a while.

        Parameters
        ----------
        steps, samples
            Portions, and samples behind them, that counted in this session.
        last
            Whether nothing is learned after it.

        Raises
        ------
        RunFailed
            If some parameters are not finite, or the last checkpoint cannot be written.
        """
        self.finish()
        self._begin(steps, samples, last=last)
        while last:
            self.finish()
            if self._problem is None:
                return
            self._attempts.fail_at_the_end(self._problem)
            waiting.until(lambda: self._attempts.ready_at_the_end, "the disk", serve=self._serve, longest_sleep=0.1)
            self._begin(steps, samples, last=last)

    def amend(self) -> None:
        """Write the outcome of an evaluation after the last checkpoint into this."""
        if self.last is not None:
            amend(self.last, self.account, self._session.run.checkpoint.keep, self._warn)

    def finish(self) -> None:
        """Wait until nothing is being written."""
        waiting.until(lambda: not self._saver.busy, self._saver.awaited, serve=self._serve, longest_sleep=0.05)

    def _begin(self, steps: int, samples: int, *, last: bool) -> None:
        """Let all shards take their vectors."""
        session, state, begin = self._session, self._state, self._session.begin
        objective_state = session.objective_state  # the same on all ranks: nothing changes it
        names = (POINT, *self._carried, *(state.vectors if state is not None else ()))
        describe = partial(
            session.checkpoint_info(),
            step=begin.step + steps,
            samples=begin.samples + samples,
            frontier=begin.after(steps),
            total=begin.stream.total,
            holes=begin.stream.holes,
            begun=begin.begun,
            method="" if state is None else state.model_dump_json(),
            **self.account.fields(),
        )
        self._last, self._counts, self._problem = last, (steps, samples), None
        kept = {} if objective_state is None else objective_state.to_store(objective_state.pack())
        try:
            identity = self._saver.plan(begin.step + steps, describe, kept)
        except DiskFailed as error:
            self._problem = error
            if not last:
                self._attempts.fail(error)
            return
        self._shards.submit(Command("snapshot", (begin.step + steps, identity, names, last)))
