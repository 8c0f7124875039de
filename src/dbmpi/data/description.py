"""What a data file holds, and whether a given HDF5 file is one.

The format is two datasets whose first axis is the sample: inputs, and targets that are classes or values.
``docs/data-format.md`` describes it for users, and the conventions of other tools that are understood.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py

from dbmpi.checkpoint.untrusted import damage
from dbmpi.data import hdf5
from dbmpi.data.conventions import meaning
from dbmpi.data.filters import check_filters
from dbmpi.data.given import GivenArray
from dbmpi.data.hdf5 import Dataset
from dbmpi.data.links import find, holds
from dbmpi.data.reading import Reading
from dbmpi.data.rows import Stored
from dbmpi.data.targets import Targets
from dbmpi.data.weights import Weights, check_weights
from dbmpi.errors import UserError

BLOCKS_CACHE = 64 << 20
"""Chunk cache (bytes) for reading a compressed file from its beginning to its end."""
_KINDS = {
    "c": "complex numbers; store the real and the imaginary parts as features of their own",
    "S": "text; only numbers can be inputs",
    "U": "text; only numbers can be inputs",
    "O": "text, references, or rows of different lengths; store an array of numbers of one shape for all samples",
    "V": "a table of columns; store the numbers as one array, e.g. with h5py: "
    "file['x'] = numpy.stack([table[column] for column in table.dtype.names], axis=1)",
}
"""Types that inputs cannot have, and what to do."""


@dataclass(frozen=True)
class Description:
    """What a data file, or arrays in its place, declare about themselves, and the datasets."""

    inputs: tuple[Stored, ...]
    """One, or those that an objective takes by their names."""
    named: bool
    targets: Targets | None
    weights: Weights | None
    notes: tuple[str, ...]
    """What was taken for what, where the user may not expect it."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.inputs[0].samples

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample; of several inputs, how many values they have together."""
        return (self.features,) if self.named else self.inputs[0].shape[1:]

    @property
    def features(self) -> int:
        """Number of inputs of one sample."""
        return sum(math.prod(stored.shape[1:]) for stored in self.inputs)

    @property
    def float32_bytes(self) -> int:
        """Size of all samples as float32."""
        answers = 1 if self.targets is None else self.targets.size or 1
        return self.samples * (self.features + answers) * 4


@contextlib.contextmanager
def opened(path: Path, reading: Reading, memory_bytes: int) -> Iterator[tuple[h5py.File, int]]:
    """Open a file and give it with the size of its chunk cache; it is closed only after an exception.

    A compressed file has a cache of at most `memory_bytes`, so that a chunk is not unpacked for every row.  `path` and
    `reading` say which file, and which of its datasets are the inputs.
    """
    file, cache_bytes = hdf5.open_file(path), 0
    try:
        hdf5.check_version(path, file)
        compressed, elements = False, 0
        for name in reading.inputs_named:
            inputs = find(path, file, name, "data.inputs")
            with inputs.damage():
                compressed |= bool(inputs.values.id.get_create_plist().get_nfilters())
                elements += math.prod(inputs.values.shape or (0,))
        if compressed:
            cache_bytes = BLOCKS_CACHE if elements * 4 <= memory_bytes else memory_bytes // 2
            file.close()
            file = hdf5.open_file(path, cache_bytes)
        yield file, cache_bytes
    except BaseException:
        file.close()
        raise


def describe(path: Path, file: h5py.File, memory_bytes: int, reading: Reading, targets_required: bool) -> Description:
    """Check ranks, types, sizes and attributes of an open data file; of values, only labels and weights are read.

    Parameters
    ----------
    path, file
        The file, open.
    memory_bytes
        Most that one sample, as float32, or one chunk may take.
    reading
        How to read the file.
    targets_required
        Whether it must have targets.

    Raises
    ------
    UserError
        If the file is not a data file, is incomplete, or one sample or chunk would not fit `memory_bytes`.
    """
    with damage(path, "its structure"):
        inputs = tuple(find(path, file, name, "data.inputs") for name in reading.inputs_named)
        targets = weights = None
        if targets_required or holds(path, file, reading.targets):
            targets = find(path, file, reading.targets, "data.targets")
        if reading.weights is not None:
            weights = find(path, file, reading.weights, "data.weights")
        named = not isinstance(reading.inputs, str)
        return described(inputs, targets, weights, reading, memory_bytes, named=named)


def described(
    inputs: Sequence[Dataset],
    targets: Dataset | None,
    weights: Dataset | None,
    reading: Reading,
    memory_bytes: int,
    *,
    named: bool,
) -> Description:
    """Check ranks, types, sizes and attributes of datasets, or of arrays in their place.

    Parameters
    ----------
    inputs, targets, weights
        The datasets.
    reading
        How to read them.
    memory_bytes
        Most that one sample, as float32, or one chunk of a file may take.
    named
        Whether the inputs are handed out by their names.

    Raises
    ------
    UserError
        As :func:`describe` does.
    """
    if named and not reading.own:
        raise UserError(
            f"{inputs[0].path}: has several inputs by name, {[dataset.name for dataset in inputs]}, but a network "
            "takes one array; join them, or train an objective of your own"
        )
    taken = tuple(_inputs(dataset, reading) for dataset in inputs)
    first, answers = taken[0], None if targets is None else _stored(targets, integers=reading.own)
    for other in taken[1:]:
        if other.samples != first.samples:
            raise _lengths(first, other)
    if answers is not None and first.samples not in answers.shape:
        raise _lengths(first, answers)
    weighing = None if weights is None else _stored(weights)
    _check_size(taken, answers, memory_bytes)
    for stored in (*taken, answers, weighing):
        if stored is not None and not isinstance(stored.dataset, GivenArray):
            check_filters(stored.dataset)
            stored.dataset.check_storage(memory_bytes)
    answering = None if answers is None else Targets(answers, reading, first.samples)
    if answering is not None and answering.stored.samples != first.samples:
        raise _lengths(first, answering.stored)
    if weighing is not None:
        check_weights(weighing, first.samples)
    counted = None
    if weighing is not None or reading.class_weights is not None:
        counted = Weights(weighing, reading, answering)
    notes = [note for stored in (*taken, answers) if stored is not None for note in stored.meaning.notes]
    if answering is not None and answering.note:
        notes.append(answering.note)
    return Description(taken, named, answering, counted, tuple(f"{first.path}: {note}" for note in notes))


def _stored(dataset: Dataset, integers: bool = False) -> Stored:
    if not dataset.values.shape:
        raise dataset.error(f"has shape {dataset.values.shape}; expected one value or row for each sample")
    return Stored(dataset, meaning(dataset), integers=integers)


def _inputs(dataset: Dataset, reading: Reading) -> Stored:
    name, kind, shape = dataset.name, dataset.values.dtype, dataset.values.shape
    if kind.kind not in "iufb":
        why = _KINDS.get(kind.kind, "of a type that holds no numbers")
        if kind.subdtype is not None:
            why = f"arrays in each element; store them as axes, e.g. with h5py: file['x'] = file[{name!r}][...]"
        raise dataset.error(f"is {str(kind)[:80]}; expected numbers, but these are {why}")
    if shape is None or len(shape) < (1 if reading.own else 2):
        hint = ", e.g. reshape(-1, 1) for samples of one feature" if shape else ""
        raise dataset.error(f"has shape {shape}; expected (samples, features ...){hint}")
    if 0 in shape:
        raise dataset.error(f"has shape {shape}; expected at least one sample and feature")
    return Stored(
        dataset,
        meaning(dataset, inputs=True, bytes_scale=1.0 if reading.own else hdf5.BYTE_SCALE),
        channels_last=reading.channels == "last",
        replacement=reading.missing,
        integers=reading.own,
    )


def _check_size(inputs: Sequence[Stored], targets: Stored | None, memory_bytes: int) -> None:
    features = sum(math.prod(stored.shape[1:]) for stored in inputs)
    values = 1 if targets is None else math.prod(targets.shape[1:])
    sample_bytes = (features + max(values, 1)) * 4
    if sample_bytes > memory_bytes:
        shapes = ", ".join(str(stored.shape[1:]) for stored in inputs)
        raise UserError(
            f"{inputs[0].path}: one sample of shape {shapes} takes {sample_bytes / 2**20:.0f} MiB, but "
            f"data.memory_mib allows {memory_bytes / 2**20:.0f}; raise it if this is meant"
        )


def _lengths(inputs: Stored, other: Stored) -> UserError:
    """Return the error for different numbers of samples, with a hint where another axis matches."""
    text = f"has {inputs.samples} samples, but {other.name!r} has {other.samples}; expected the same number"
    for stored, samples in ((inputs, other.samples), (other, inputs.samples)):
        if samples > 1 and samples in stored.shape[1:]:
            axis = stored.shape.index(samples, 1)
            text += (
                f".  Axis {axis} of {stored.name!r}, whose shape is {stored.shape}, has {samples}: if that is the "
                f"sample, store it as the first axis, e.g. numpy.moveaxis(x, {axis}, 0)"
            )
            if stored.meaning.reversed_axes:
                text += f", or in MATLAB permute(x, [{axis + 1} ...])"
            break
    return inputs.error(text)
