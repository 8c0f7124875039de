"""The data of a run: opened by the workers, known in outline to all ranks."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
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
_MOST_AXES = 32
"""Of an HDF5 dataset."""


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

    def validate(self, outputs: int, loss: str, *, fully: bool) -> None:
        """Raise UserError unless the targets fit so many outputs and this loss, and, if asked, every value is good."""
        if self.train is not None and loss != "reconstruction":
            self.train.expect(outputs, loss)
        for source in (self.train, self.test):
            if source is not None and fully:
                source.validate(full=True)


def open_data(run: Run, comm: MPI.Intracomm, plan: Plan, stack: ExitStack) -> RunData:
    """Open and load the data on the workers, and tell its shape to all ranks (collective).

    Raises
    ------
    UserError
        On every rank, if a file cannot be used.
    """
    train = test = None
    found = ""
    with together(comm, "opening the data", seconds=waiting.LONG_SECONDS):
        if plan.worker_of(comm.rank) is not None:
            memory = run.data.memory_mib
            targets: Literal["required", "optional"]
            targets = "optional" if run.network.loss == "reconstruction" else "required"
            reading = Reading.of(run.data, run.network)
            train = stack.enter_context(Source.open(run.data.train, memory, targets, reading))
            notes = [*train.notes]
            if run.data.test is not None:
                held_out = reading.held_out(train.classes, train.labels)
                test = stack.enter_context(Source.open(run.data.test, memory, targets, held_out))
                notes += [*test.notes, *test.expect_like(train)]
            here = min(ranks_on_node(os.environ), plan.workers)
            limits.check_resident(sum(source.resident_bytes for source in (train, test) if source), here)
    # Not before all have looked how much memory there is.
    with together(comm, "loading the data", seconds=waiting.LONG_SECONDS):
        if train is not None:
            train.load()
            if comm.rank == plan.worker_ranks[0]:
                found = json.dumps([train.meaning.model_dump(), notes, loss_of_guessing(train, run.network.loss)])
    numbers = np.zeros(3 + _MOST_AXES, np.int64)
    if train is not None:
        shape = train.input_shape
        numbers[: 3 + len(shape)] = (train.samples, train.classes or 0, len(shape), *shape)
    waiting.broadcast(comm, numbers, plan.worker_ranks[0], "the shapes of the data")
    samples, classes, axes, *rest = (int(number) for number in numbers)
    text = waiting.broadcast_text(comm, found, plan.worker_ranks[0], "how the data were understood")
    said, notes, guessing = json.loads(text)
    meaning = Meaning.model_validate(said)
    return RunData(samples, tuple(rest[:axes]), classes, train, test, meaning, tuple(notes), float(guessing))


def network_notes(network: NetworkSection, input_shape: tuple[int, ...], channels: str) -> list[str]:
    """Return a hint where a sample seems to have its channels last, and the first layer takes them for first."""
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
