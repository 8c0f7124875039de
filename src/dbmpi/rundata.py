"""The data of a run: opened by the workers, known in outline to all ranks."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
from mpi4py import MPI

from dbmpi import limits
from dbmpi.config import Run
from dbmpi.data.meaning import Meaning
from dbmpi.data.source import Source
from dbmpi.network.losses import Targets
from dbmpi.runtime import waiting
from dbmpi.runtime.threads import ranks_on_node
from dbmpi.runtime.world import together
from dbmpi.topology import Plan

LOADING_SECONDS = 86400.0
"""How long the ranks wait for each other's data: reading a large file takes what it takes."""
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
    notices: tuple[str, ...] = ()
    """What the user should know of the data."""

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
    said = ""
    with together(comm, "opening the data", seconds=LOADING_SECONDS):
        if plan.worker_of(comm.rank) is not None:
            memory = run.data.memory_mib
            targets: Literal["required", "optional"]
            targets = "optional" if run.network.loss == "reconstruction" else "required"
            notices: tuple[str, ...] = ()
            train = stack.enter_context(Source.open(run.data.train, memory, targets))
            if run.data.test is not None:
                test = stack.enter_context(Source.open(run.data.test, memory, targets))
                notices = test.expect_like(train)
            here = min(ranks_on_node(os.environ), plan.workers)
            limits.check_resident(sum(source.resident_bytes for source in (train, test) if source), here)
            said = json.dumps([train.meaning.model_dump(), notices])
    # Not before all have looked how much memory there is.
    with together(comm, "loading the data", seconds=LOADING_SECONDS):
        if train is not None:
            train.load()
    numbers = np.zeros(3 + _MOST_AXES, np.int64)
    if train is not None:
        shape = train.input_shape
        numbers[: 3 + len(shape)] = (train.samples, train.classes or 0, len(shape), *shape)
    waiting.broadcast(comm, numbers, plan.worker_ranks[0], "the shapes of the data")
    samples, classes, axes, *rest = (int(number) for number in numbers)
    said = waiting.broadcast_text(comm, said, plan.worker_ranks[0], "what the data stand for")
    meaning, notices = json.loads(said)
    return RunData(samples, tuple(rest[:axes]), classes, train, test, Meaning.model_validate(meaning), tuple(notices))
