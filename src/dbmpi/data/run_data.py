"""The data of a run: opened by the workers, known in outline to all ranks."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from mpi4py import MPI

from dbmpi.checkpoint.meaning import Meaning
from dbmpi.config import NetworkSection, Run
from dbmpi.data import limits
from dbmpi.data.guess import loss_of_guessing
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.machine.rank_variables import ranks_on_node
from dbmpi.mpi import waiting
from dbmpi.mpi.topology import Plan
from dbmpi.mpi.world import together
from dbmpi.network.losses import Targets

_OF_MAPS = ("local", "convolution", "pooling", "normalisation")
"""Types of layers to which the first axis of a sample is that of channels, or maps."""
_FEW_CHANNELS = 4


@dataclass(frozen=True)
class RunData:
    """What a rank has and knows of the data."""

    samples: int
    """To learn from."""
    input_shape: tuple[int, ...]
    """Of one sample."""
    classes: int
    """0 where the targets are values."""
    train: Source | None
    """Open on workers."""
    test: Source | None
    """Open on workers, if the run has such data."""
    meaning: Meaning
    """What the samples to learn from stand for."""
    notes: tuple[str, ...] = ()
    """Lines to show: what in the files was taken for what."""
    guessing: float = math.nan
    """Mean loss of the best answer that is always the same (:mod:`dbmpi.data.guess`); NaN where it is not known."""

    @property
    def targets(self) -> Targets:
        """What a loss compares outputs with."""
        return "classes" if self.classes else "values"

    def expect(self, outputs: int, loss: str) -> None:
        """Raise UserError unless the targets fit so many `outputs` of a network and this `loss`."""
        if self.train is not None and loss != "reconstruction":
            self.train.expect(outputs, loss)

    def validate(self, *, fully: bool) -> None:
        """Raise UserError where, if `fully`, a value is bad."""
        for source in (self.train, self.test):
            if source is not None and fully:
                source.validate(full=True)


def open_data(run: Run, comm: MPI.Intracomm, plan: Plan, stack: ExitStack) -> RunData:
    """Open and load the data on the workers, and send their outline to all ranks (collective).

    Parameters
    ----------
    run
        With the sections of the data and the network.
    comm, plan
        All ranks of the run, and which of them are workers.
    stack
        Closes the files at its end.

    Raises
    ------
    UserError
        On every rank, if a file cannot be used.
    """
    train = test = None
    outline = ""
    with together(comm, "opening the data", seconds=waiting.LONG_SECONDS):
        if plan.worker_of(comm.rank) is not None:
            memory = run.data.memory_mib
            targets: Literal["required", "optional"]
            # An objective may need none; those that are named must be there.
            own = run.objective is not None and "targets" not in run.data.model_fields_set
            targets = "optional" if own or run.network.loss == "reconstruction" else "required"
            reading = Reading.of(run.data, run.network)
            train = stack.enter_context(Source.open(run.data.train, memory, targets, reading))
            notes = [*train.notes]
            if run.data.test is not None:
                held_out = reading.held_out(train.classes, train.labels)
                if own and train.has_targets:
                    targets = "required"
                test = stack.enter_context(Source.open(run.data.test, memory, targets, held_out))
                notes += [*test.notes, *test.expect_like(train)]
            here = min(ranks_on_node(os.environ), plan.workers)
            limits.check_resident(sum(source.resident_bytes for source in (train, test) if source), here)
    # Not before every rank has measured how much memory there is.
    with together(comm, "loading the data", seconds=waiting.LONG_SECONDS):
        if train is not None:
            train.load()
            if comm.rank == plan.worker_ranks[0]:
                guessing = math.nan if run.objective is not None else loss_of_guessing(train, run.network.loss)
                numbers = (train.samples, train.input_shape, train.classes or 0)
                outline = json.dumps([*numbers, train.meaning.model_dump(), notes, guessing])
    text = waiting.broadcast_text(comm, outline, plan.worker_ranks[0], "the outline of the data")
    samples, input_shape, classes, meaning, notes, guessing = json.loads(text)
    understood = Meaning.model_validate(meaning)
    return RunData(samples, tuple(input_shape), classes, train, test, understood, tuple(notes), float(guessing))


def network_notes(network: NetworkSection, input_shape: tuple[int, ...], channels: str) -> list[str]:
    """Return a hint where samples of `input_shape` seem to have their channels elsewhere than `channels` says.

    It matters only where the first layer of the `network` has maps.
    """
    first = next((layer for layer in network.layers if layer.type != "dropout"), None)
    if first is None or first.type not in _OF_MAPS or len(input_shape) != 3:
        return []
    maps, rows, columns = input_shape
    if channels == "first" and columns <= _FEW_CHANNELS < min(maps, rows):
        return [
            f"samples of shape {input_shape} are taken for {maps} channels of {rows} x {columns}; if they are "
            f"images of {maps} x {rows} with {columns} channels, set data.channels = 'last'"
        ]
    if channels == "last" and rows <= _FEW_CHANNELS < min(maps, columns):
        return [
            f"with data.channels = 'last', samples are taken for {maps} channels of {rows} x {columns}; if they are "
            f"images of {rows} channels of {columns} x {maps}, leave data.channels out"
        ]
    return []
