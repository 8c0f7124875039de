"""What a data file holds, and whether a given HDF5 file is one.

The format is two datasets whose first axis is the sample: inputs, and targets that are classes or values.
``docs/data-format.md`` describes it for users, and the conventions of other tools that are understood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dbmpi.checkpoint.untrusted import damage
from dbmpi.data import hdf5
from dbmpi.data.conventions import meaning
from dbmpi.data.filters import check_filters
from dbmpi.data.hdf5 import Dataset
from dbmpi.data.joined import end_to_end, side_by_side
from dbmpi.data.opened import DataFiles, FileParts
from dbmpi.data.reading import Reading
from dbmpi.data.rows import Stored
from dbmpi.data.targets import Targets
from dbmpi.data.weights import Weights, check_weights
from dbmpi.errors import UserError

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


def describe(files: DataFiles, memory_bytes: int) -> Description:
    """Check ranks, types, sizes and attributes of open data files; of values, only labels and weights are read.

    Parameters
    ----------
    files
        Open.
    memory_bytes
        Most that one sample, as float32, or one chunk may take.

    Raises
    ------
    UserError
        If they are no data files, are incomplete, do not fit together, or one sample or chunk would not fit
        `memory_bytes`.
    """
    reading = files.reading
    with damage(Path(files.called), "its structure"):
        parts = [_of_file(part, files.called, reading, memory_bytes) for part in files.parts]
        names = range(len(parts[0][0]))
        join = partial(end_to_end, files.called)
        inputs = tuple(join([part[0][number] for part in parts], **_options(reading)) for number in names)
        answers, weights = [part[1] for part in parts], [part[2] for part in parts]
        for part, answer in zip(files.parts, answers, strict=True):
            if answers[0] is not None and answer is None:
                raise UserError(f"{part.inputs[0].path}: has no targets, but {files.parts[0].inputs[0].path} has some")
        targets = None if None in answers else join([each for each in answers if each], integers=reading.own)
        weighing = None if None in weights else join([each for each in weights if each])
    named = reading.own and not isinstance(reading.inputs, str)
    return _checked(inputs, targets, weighing, reading, memory_bytes, named=named, called=files.called)


def _of_file(
    part: FileParts, called: str, reading: Reading, memory_bytes: int
) -> tuple[tuple[Stored, ...], Stored | None, Stored | None]:
    """Return the inputs, targets and weights of one file, as many samples of each, once they are known to be sound."""
    join = not reading.own and not isinstance(reading.inputs, str)
    inputs = tuple(_inputs(dataset, reading, single=join) for dataset in part.inputs)
    answers = None if part.targets is None else _stored(part.targets, integers=reading.own)
    weights = None if part.weights is None else _stored(part.weights)
    _check_fit(inputs, answers, weights, memory_bytes)
    if join:
        inputs = (side_by_side(called, inputs, **_options(reading)),)
    for stored in (answers, weights):
        if stored is not None:
            stored.as_column(inputs[0].samples)
    return inputs, answers, weights


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
    answers = None if targets is None else _stored(targets, integers=reading.own)
    weighing = None if weights is None else _stored(weights)
    _check_fit(taken, answers, weighing, memory_bytes)
    return _checked(taken, answers, weighing, reading, memory_bytes, named=named, called=str(taken[0].path))


def _check_fit(inputs: Sequence[Stored], targets: Stored | None, weights: Stored | None, memory_bytes: int) -> None:
    """Refuse parts of different lengths, and those that cannot be read."""
    first = inputs[0]
    for other in inputs[1:]:
        if other.samples != first.samples:
            raise _lengths(first, other)
    if targets is not None and first.samples not in targets.shape:
        raise _lengths(first, targets)
    _check_size(inputs, targets, memory_bytes)
    for stored in (*inputs, targets, weights):
        for part in () if stored is None else stored.dataset.parts:
            check_filters(part)
            part.check_storage(memory_bytes)


def _checked(
    inputs: tuple[Stored, ...],
    answers: Stored | None,
    weighing: Stored | None,
    reading: Reading,
    memory_bytes: int,
    *,
    named: bool,
    called: str,
) -> Description:
    """Return what datasets hold that can be read and fit together."""
    first = inputs[0]
    _check_size(inputs, answers, memory_bytes)
    answering = None if answers is None else Targets(answers, reading, first.samples)
    if answering is not None and answering.stored.samples != first.samples:
        raise _lengths(first, answering.stored)
    if weighing is not None:
        check_weights(weighing, first.samples)
    counted = None
    if weighing is not None or reading.class_weights is not None:
        counted = Weights(weighing, reading, answering)
    notes = [note for stored in (*inputs, answers) if stored is not None for note in stored.meaning.notes]
    if answering is not None and answering.note:
        notes.append(answering.note)
    return Description(inputs, named, answering, counted, tuple(f"{called}: {note}" for note in notes))


def _options(reading: Reading) -> dict[str, Any]:
    """Return options of `Stored` for inputs."""
    return {
        "channels_last": False,
        "replacement": reading.missing,
        "integers": reading.own,
    }


def _stored(dataset: Dataset, integers: bool = False) -> Stored:
    if not dataset.values.shape:
        raise dataset.error(f"has shape {dataset.values.shape}; expected one value or row for each sample")
    return Stored(dataset, meaning(dataset), integers=integers)


def _inputs(dataset: Dataset, reading: Reading, *, single: bool = False) -> Stored:
    """Return a dataset as inputs; with `single`, one value a sample is enough, to stand beside others."""
    name, kind, shape = dataset.name, dataset.values.dtype, dataset.values.shape
    if kind.kind not in "iufb":
        why = _KINDS.get(kind.kind, "of a type that holds no numbers")
        if kind.subdtype is not None:
            why = f"arrays in each element; store them as axes, e.g. with h5py: file['x'] = file[{name!r}][...]"
        raise dataset.error(f"is {str(kind)[:80]}; expected numbers, but these are {why}")
    if shape is None or len(shape) < (1 if reading.own or single else 2):
        hint = ", e.g. reshape(-1, 1) for samples of one feature" if shape else ""
        raise dataset.error(f"has shape {shape}; expected (samples, features ...){hint}")
    if 0 in shape:
        raise dataset.error(f"has shape {shape}; expected at least one sample and feature")
    return Stored(
        dataset,
        meaning(dataset, inputs=True, bytes_scale=1.0 if reading.own or single else hdf5.BYTE_SCALE),
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
