"""The data of a run: opened by the workers, known in outline to all ranks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mpi4py import MPI

from dbmpi.checkpoint.meaning import Meaning
from dbmpi.checkpoint.named_arrays import StoredValues
from dbmpi.config import NetworkSection, Run
from dbmpi.config.data import DataPlace
from dbmpi.data import limits
from dbmpi.data.given import GivenData
from dbmpi.data.guess import loss_of_guessing
from dbmpi.data.local_copy import with_local_copies
from dbmpi.data.numbered_batches import Transform
from dbmpi.data.reading import Reading
from dbmpi.data.shared import is_function, shared_data
from dbmpi.data.source import Source
from dbmpi.data.storage import BlockLayout
from dbmpi.errors import UserError
from dbmpi.machine.rank_variables import ranks_on_node
from dbmpi.monitor.callbacks import Callbacks
from dbmpi.mpi import waiting
from dbmpi.mpi.topology import Plan
from dbmpi.mpi.world import together
from dbmpi.network.losses import Targets
from dbmpi.objective import OwnObjective

_OF_MAPS = ("local", "convolution", "pooling", "normalisation")
"""Types of layers to which the first axis of a sample is that of channels, or maps."""
_FEW_CHANNELS = 4
_CALLED = ("dbmpi.train(data=...)", "dbmpi.train(test=...)")
"""What messages call data that are given."""


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
    tested: bool = False
    """Whether there are held-out samples."""
    blocks: BlockLayout = field(default_factory=BlockLayout)
    """Of the samples to learn from."""

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


class Supplied(NamedTuple):
    """What a program gives to a run beside its description."""

    train: Any = None
    """Instead of a file: arrays, or a function that returns them."""
    test: Any = None
    transform: Transform | None = None
    callbacks: Callbacks = Callbacks()
    initial: Mapping[str, StoredValues] | None = None
    """First values of the parameters, by name."""
    objective: OwnObjective | None = None
    """Instead of the one that the description names."""
    notes: tuple[str, ...] = ()
    """Lines on the ranks, to be shown at the start."""

    @property
    def kinds(self) -> str:
        """What the data are, in words that must be the same on all ranks."""
        return " and ".join(
            f"{name} is {'not given' if given is None else 'a function' if is_function(given) else 'given'}"
            for name, given in (("data", self.train), ("test", self.test))
        )


def open_data(run: Run, comm: MPI.Intracomm, plan: Plan, stack: ExitStack, supplied: Supplied) -> RunData:
    """Open and load the data on the workers, and send their outline to all ranks (collective).

    Parameters
    ----------
    run
        With the sections of the data and the network.
    comm, plan
        All ranks of the run, and which of them are workers.
    stack
        Closes the files at its end.
    supplied
        What is given instead of files, of the same kinds on all ranks.

    Raises
    ------
    UserError
        On every rank, if a file or an array cannot be used.
    """
    run = with_local_copies(run, comm)
    notes, arrays = [], []
    for name, given in zip(_CALLED, supplied[:2], strict=True):
        data, note = (None, "") if given is None else shared_data(comm, given, name, stack)
        arrays.append(data)
        notes += [note] if note else []
    train = test = None
    outline = ""
    with together(comm, "opening the data", seconds=waiting.LONG_SECONDS):
        if plan.worker_of(comm.rank) is not None:
            train, test = _opened(run, arrays, stack)
            notes += [*train.notes, *filter(None, [train.storage.way])]
            notes += [] if test is None else [*test.notes, *test.expect_like(train)]
            here = min(ranks_on_node(os.environ), plan.workers)
            limits.check_resident(sum(source.storage.resident_bytes for source in (train, test) if source), here)
    # Not before every rank has measured how much memory there is.
    with together(comm, "loading the data", seconds=waiting.LONG_SECONDS):
        if train is not None:
            if not plan.evaluates(comm.rank):
                train.load()
            if comm.rank == plan.worker_ranks[0]:
                guessing = math.nan if run.objective is not None else loss_of_guessing(train, run.network.loss)
                numbers = (train.samples, train.input_shape, train.classes or 0)
                outline = json.dumps(
                    [
                        *numbers,
                        train.meaning.model_dump(),
                        notes,
                        guessing,
                        train.storage.blocks,
                        *(_digest(source) if source else "" for source in (train, test)),
                    ]
                )
    text = waiting.broadcast_text(comm, outline, plan.worker_ranks[0], "the outline of the data")
    samples, input_shape, classes, meaning, notes, guessing, blocks, *digests = json.loads(text)
    with together(comm, "comparing the data"):
        for called, source, there in zip(_CALLED, (train, test), digests, strict=True):
            mine = "" if source is None or source.in_file else _digest(source)
            if mine and mine != there:
                raise UserError(
                    f"{called}: the arrays differ between ranks: {mine} on rank {comm.rank}, {there} on rank "
                    f"{plan.worker_ranks[0]}; give all ranks the same ones"
                )
    understood = Meaning.model_validate(meaning)
    return RunData(
        samples,
        tuple(input_shape),
        classes,
        train,
        test,
        understood,
        tuple(notes),
        float(guessing),
        bool(digests[1]),
        BlockLayout(*blocks),
    )


def _opened(run: Run, arrays: Sequence[GivenData | None], stack: ExitStack) -> tuple[Source, Source | None]:
    """Open what the samples to learn from are in, and those to test on."""
    targets: Literal["required", "optional"]
    # An objective may need none; those that are named must be there.
    own = run.objective is not None and "targets" not in run.data.model_fields_set
    targets = "optional" if own or run.network.loss == "reconstruction" else "required"

    def opened(number: int, place: DataPlace | None, reading: Reading) -> Source | None:
        given = arrays[number]
        if given is not None:
            # Held-out samples all count alike, as those of a file do.
            given = given._replace(weights=None) if number else given
            return stack.enter_context(Source.of_arrays(given, _CALLED[number], targets, reading))
        if place is None:
            return None
        return stack.enter_context(Source.open(place, run.data.memory_mib, targets, reading))

    reading = Reading.of(run.data, run.network)
    train = opened(0, run.data.train, reading)
    assert train is not None
    if own and train.has_targets:
        targets = "required"
    return train, opened(1, run.data.test, reading.held_out(train.classes, train.labels, train.encoding))


def _digest(source: Source) -> str:
    """Say what samples are, short enough to be compared and shown."""
    return f"{source.samples:,} samples of {source.input_shape}, digest {source.meaning.digest[:8]}"


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
