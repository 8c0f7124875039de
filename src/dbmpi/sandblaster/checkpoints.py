"""Checkpoints of Sandblaster: what the shards hold, and where the batch method stands, written on the lead's rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from mpi4py import MPI

from dbmpi.checkpoint.attempts import Attempts
from dbmpi.checkpoint.collect import ShardPart, check_finite, save
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.schema import CheckpointInfo, library_versions
from dbmpi.errors import DiskFailed
from dbmpi.index.layout import cut
from dbmpi.methods.descent import POINT, Progress
from dbmpi.methods.lbfgs import History
from dbmpi.mpi import waiting
from dbmpi.replica.arrangement import Arrangement
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
    """

    def __init__(
        self,
        session: Session,
        state: MethodState | None,
        shards: Shards,
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
        self.last: Path | None = None

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self._attempts.due

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

    def write(self, steps: int, samples: int, *, last: bool = False) -> None:
        """Write the parameters, the history, and what the shards carry along, into a checkpoint.

        Where the disk does not take it the run goes on without; unless it is the last one, which is tried for a while.

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
        while True:
            try:
                self._write(steps, samples)
            except DiskFailed as error:
                if not last:
                    self._attempts.fail(error)
                    return
                self._attempts.fail_at_the_end(error)
                waiting.until(lambda: self._attempts.ready_at_the_end, "the disk", serve=self._serve, longest_sleep=0.1)
            else:
                self._attempts.succeed()
                return

    def _write(self, steps: int, samples: int) -> None:
        session, lead, state = self._session, self._shards.lead, self._state
        run, plan, data, begin = session.run, session.plan, session.data, session.begin
        objective_state = session.objective_state  # the same on all ranks: nothing changes it
        names = (POINT, *self._carried, *(state.vectors if state is not None else ()))
        self._shards.submit(Command("hand_over", (names,)))

        def describe(versions: tuple[int, ...]) -> CheckpointInfo:
            return CheckpointInfo(
                configuration=run.to_json(),
                step=begin.step + steps,
                samples=begin.samples + samples,
                shard_versions=versions,
                shards=plan.shards,
                replicas=plan.replicas,
                partitions=plan.partitions,
                input_shape=data.input_shape,
                classes=data.classes,
                meaning=data.meaning,
                frontier=begin.after(steps),
                total=begin.stream.total,
                holes=begin.stream.holes,
                begun=begin.begun,
                method="" if state is None else state.model_dump_json(),
                libraries=library_versions(MPI.Get_library_version()),
            )

        self.last = save(
            session.comms.world,
            plan.shard_ranks,
            checkpoint_path(run.run.directory, begin.step + steps),
            ShardPart(
                Arrangement(session.model.layout, cut(session.model.layout.size, plan.shards)),
                {name: lead.array(name) for name in names},
                lead.version,
                {} if objective_state is None else objective_state.to_store(objective_state.pack()),
            ),
            describe,
            keep=run.checkpoint.keep,
            check=partial(check_finite, run.run.directory),
        )
