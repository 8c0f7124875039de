"""Checkpoints of Sandblaster: what the shards hold, and where the batch method stands, written on the lead's rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.attempts import Attempts
from dbmpi.checkpoint.collect import Part, check_finite, save
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.schema import CheckpointInfo, library_versions
from dbmpi.config import Run
from dbmpi.errors import DiskFailed
from dbmpi.methods.descent import POINT, Progress
from dbmpi.methods.lbfgs import History
from dbmpi.mpi import waiting
from dbmpi.replica.arrangement import Arrangement
from dbmpi.sandblaster.batches import BatchStart, Samples
from dbmpi.sandblaster.commands import Command
from dbmpi.sandblaster.shard import ShardSpace
from dbmpi.sandblaster.state import Position, capture

if TYPE_CHECKING:
    from pathlib import Path

    from dbmpi.mpi.topology import Plan


class Keeper:
    """Writes checkpoints between two iterations.

    Parameters
    ----------
    comm, plan, arrangement
        Who holds what of the vectors.
    lead, carried
        The lead's own shard, and the names of its vectors that are kept for another optimizer.
    submit
        Lets all shards carry out a command.
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
        comm: MPI.Intracomm,
        run: Run,
        plan: Plan,
        arrangement: Arrangement,
        samples: Samples,
        beginning: BatchStart,
        *,
        lead: ShardSpace,
        carried: Sequence[str],
        submit: Callable[[Command], np.ndarray],
        warn: Callable[[str], None],
        serve: Callable[[], bool],
    ) -> None:
        self._comm, self._run, self._plan, self._arrangement = comm, run, plan, arrangement
        self._samples, self._beginning = samples, beginning
        self._lead, self._carried, self._submit = lead, tuple(carried), submit
        self._state = beginning.state
        """Where the method stood after its last iteration."""
        # The other ranks wait meanwhile, and hear little of it.
        patience = min(run.checkpoint.retry_seconds, waiting.STALL_SECONDS / 2)
        self._attempts, self._serve = Attempts(run.checkpoint, patience, warn), serve
        self.last: Path | None = None

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self._attempts.due

    def note(self, history: History, position: Position, progress: Progress) -> None:
        """Note where L-BFGS stands after an iteration."""
        # What goes on from a gradient goes on to the last bit; the other methods begin with an evaluation.
        settings = self._run.sandblaster
        bounds = None if settings.l1 or settings.batch_overlap else self._lead.bounds()
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
        plan, beginning, state = self._plan, self._beginning, self._state
        names = (POINT, *self._carried, *(state.vectors if state is not None else ()))
        self._submit(Command("hand_over", names, ()))

        def describe(versions: tuple[int, ...]) -> CheckpointInfo:
            return CheckpointInfo(
                configuration=self._run.to_json(),
                step=beginning.step + steps,
                samples=beginning.samples + samples,
                shard_versions=versions,
                shards=plan.shards,
                replicas=plan.replicas,
                partitions=plan.partitions,
                input_shape=self._samples.input_shape,
                classes=self._samples.classes,
                meaning=self._samples.meaning,
                frontier=beginning.place(steps),
                total=beginning.stream.total,
                holes=beginning.stream.holes,
                method="" if state is None else state.model_dump_json(),
                libraries=library_versions(MPI.Get_library_version()),
            )

        self.last = save(
            self._comm,
            plan.shard_ranks,
            checkpoint_path(self._run.run.directory, beginning.step + steps),
            Part(self._arrangement, {name: self._lead.array(name) for name in names}, self._lead.version),
            describe,
            keep=self._run.checkpoint.keep,
            check=partial(check_finite, self._run.run.directory),
        )
