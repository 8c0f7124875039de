"""Several datasets as one: end to end, samples of several files, or side by side, features of the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import h5py
import numpy as np

from dbmpi.data.conventions import Convention
from dbmpi.data.derived import Derived, Rows, Selection
from dbmpi.data.hdf5 import Dataset
from dbmpi.data.rows import Stored
from dbmpi.errors import UserError

ENCODED = ("subtract", "divide", "one_hot")
"""Attributes that say what is done to inputs (:mod:`dbmpi.data.encoding`)."""


class EndToEnd(Rows):
    """Rows of several files, one after the other.

    Parameters
    ----------
    parts
        Of samples of one shape.
    dtype
        To return them as; None: decoded, as each file says by itself.
    """

    def __init__(self, parts: Sequence[Stored], dtype: np.dtype[Any] | None) -> None:
        self.parts, self._decoded = parts, dtype is None
        self._starts = np.cumsum([0, *(part.samples for part in parts)])
        super().__init__((int(self._starts[-1]), *parts[0].shape[1:]), np.dtype(np.float32) if dtype is None else dtype)

    @property
    def scattered(self) -> bool:
        """Whether all parts are read like that."""
        return all(part.scattered for part in self.parts)

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        """Return some rows."""
        (rows,) = selection
        if isinstance(rows, slice):
            first, last, _ = rows.indices(self.shape[0])
            cuts = np.clip(self._starts, first, max(first, last)) - first
        else:
            rows = np.asarray(rows, np.int64)
            cuts = np.searchsorted(rows, self._starts)
        found = np.empty((int(cuts[-1]), *self.shape[1:]), self.dtype)
        for number, part in enumerate(self.parts):
            begin, end, start = int(cuts[number]), int(cuts[number + 1]), int(self._starts[number])
            if begin == end:
                continue
            if isinstance(rows, slice):
                values = part.read(slice(first + begin - start, first + end - start))
            else:
                values = part.read(rows[begin:end] - start)
            found[begin:end] = _decoded(part, values) if self._decoded else values
        return found


class SideBySide(Rows):
    """Features of several datasets, decoded, as one row of float32.

    Parameters
    ----------
    parts
        Of the same samples.
    """

    def __init__(self, parts: Sequence[Stored]) -> None:
        self.parts = parts
        super().__init__((parts[0].samples, sum(math.prod(part.shape[1:]) for part in parts)), np.dtype(np.float32))

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        """Return some rows."""
        (rows,) = selection
        return np.concatenate(
            [_decoded(part, values).reshape(len(values), -1) for part in self.parts for values in [part.read(rows)]],
            axis=1,
        )


class Joined(Derived):
    """A dataset of several."""

    def reopened(self, fresh: Mapping[tuple[str, str], Dataset]) -> Dataset:
        """Return the same of files that were opened again, whose datasets are the `fresh` ones."""
        parts = [part.reopened(fresh) for part in self.values.parts]
        values = SideBySide(parts) if isinstance(self.values, SideBySide) else EndToEnd(parts, self._kept)
        return replace(self, values=values, parts=tuple(piece for part in parts for piece in part.dataset.parts))

    @property
    def _kept(self) -> np.dtype[Any] | None:
        return None if self.values._decoded else self.values.dtype


def end_to_end(called: str, parts: Sequence[Stored], **options: Any) -> Stored:
    """Return the rows of one file after those of another.

    Parameters
    ----------
    called
        What messages call all of them.
    parts
        A dataset of each file.
    options
        Of :class:`Stored`, as those of the parts.

    Raises
    ------
    UserError
        If they are not alike.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        if other.shape[1:] != first.shape[1:]:
            raise _unlike(first, other, f"samples of shape {other.shape[1:]}", f"{first.shape[1:]}")
        if _names(other) != _names(first):
            raise _unlike(first, other, f"the labels {_names(other)}", f"{_names(first)}")
        if other.kind.kind != first.kind.kind and not {other.kind.kind, first.kind.kind} <= set("iubf"):
            raise _unlike(first, other, str(other.kind), str(first.kind))
    meanings = [replace(part.meaning, reversed_axes=False, notes=()) for part in parts]
    notes = tuple(dict.fromkeys(note for part in parts for note in part.meaning.notes))
    alike = all(meaning == meanings[0] for meaning in meanings)
    kind = first.kind if alike else _common([part.kind for part in parts])
    plain = all(meaning.plain and meaning.scale == meanings[0].scale for meaning in meanings)
    if alike or (plain and (kind.kind in "OSU" or np.uint8 not in [part.kind for part in parts])):
        meaning, dtype = replace(meanings[0], kind=kind, notes=notes), kind
    else:  # each by its own scale, offset and marks of gaps
        kind = np.dtype(np.float32)
        meaning, dtype = Convention(kind, missing=(math.nan,), notes=notes), None
    columns = _agreed(called, parts)
    pieces = tuple(piece for part in parts for piece in part.dataset.parts)
    dataset = Joined(called, first.name, EndToEnd(parts, dtype), pieces, _attributes(parts), (), columns)
    return Stored(dataset, meaning, **options)


def side_by_side(called: str, parts: Sequence[Stored], **options: Any) -> Stored:
    """Return the features of one dataset beside those of another, in this order, as float32.

    Parameters
    ----------
    called
        What messages call all of them.
    parts
        Datasets of as many samples.
    options
        Of :class:`Stored`.

    Raises
    ------
    UserError
        If they have not the same number of samples.
    """
    first = parts[0]
    for other in parts[1:]:
        if other.samples != first.samples:
            raise other.error(f"has {other.samples} samples, but {first.name!r} has {first.samples}; expected as many")
    for part in parts:
        said = next((key for key in ENCODED if part.dataset.attribute(key) is not None), None)
        if said is not None:
            raise part.error(
                f"has the attribute {said!r}, which cannot be kept beside other datasets; name it alone, or normalise "
                "the file that 'dbmpi data split' makes of them"
            )
    named = all(math.prod(part.shape[1:]) == 1 for part in parts)
    columns = tuple(part.name.rpartition("/")[2] for part in parts) if named else ()
    pieces = tuple(piece for part in parts for piece in part.dataset.parts)
    name = ", ".join(part.name for part in parts[:3]) + (" ..." if len(parts) > 3 else "")
    notes = tuple(dict.fromkeys(note for part in parts for note in part.meaning.notes))
    meaning = Convention(np.dtype(np.float32), missing=(math.nan,), notes=notes)
    return Stored(Joined(called, name, SideBySide(parts), pieces, None, (), columns), meaning, **options)


def _decoded(part: Stored, values: np.ndarray) -> np.ndarray:
    """Return values with all that their file says of them applied; NaN where they are missing."""
    decoded = part.decoded(values)
    return decoded if part.factor == 1 else decoded.astype(np.float32) * np.float32(part.factor)


def _common(kinds: list[np.dtype[Any]]) -> np.dtype[Any]:
    """Return a type that holds the elements of all."""
    if any(kind.kind in "OSU" for kind in kinds):
        same = all(kind.kind == "S" for kind in kinds)
        return np.dtype(f"S{max(kind.itemsize for kind in kinds)}") if same else h5py.string_dtype()
    return np.result_type(*kinds)


def _names(part: Stored) -> dict[str, int]:
    return {} if part.kind == np.bool_ else h5py.check_enum_dtype(part.dtype) or {}


def _attributes(parts: Sequence[Stored]) -> dict[str, Any]:
    """Return what the files say of classes, the same labels or else the most classes, and of what is done to inputs."""
    labels = [part.dataset.attribute("labels") for part in parts]
    found: dict[str, Any] = {}
    if any(each is not None for each in labels):
        known = [tuple(np.asarray(each).reshape(-1).tolist()) if each is not None else None for each in labels]
        for part, each in zip(parts, known, strict=True):
            if each != known[0]:
                raise _unlike(parts[0], part, f"the labels {_some(each)}", _some(known[0]))
        found["labels"] = labels[0]
    for key in ENCODED:
        values = [_plain(part.dataset.attribute(key)) for part in parts]
        for part, value in zip(parts, values, strict=True):
            if value != values[0]:
                raise _unlike(parts[0], part, f"the attribute {key!r} {_some(value)}", _some(values[0]))
        if values[0] is not None:
            found[key] = parts[0].dataset.attribute(key)
    counts = [part.dataset.attribute("classes") for part in parts]
    numbers = [int(np.asarray(each).reshape(-1)[0]) for each in counts if each is not None and np.asarray(each).size]
    if numbers and len(numbers) == len(parts):
        found["classes"] = max(numbers)
    return found


def _agreed(called: str, parts: Sequence[Stored]) -> tuple[str, ...]:
    """Return the names of columns that all files agree on."""
    columns = [getattr(part.dataset, "columns", ()) for part in parts]
    for part, names in zip(parts, columns, strict=True):
        if names != columns[0]:
            raise _unlike(parts[0], part, f"the columns {_some(names)}", _some(columns[0]))
    return tuple(columns[0])


def _plain(value: Any) -> tuple[Any, ...] | None:
    return None if value is None else tuple(np.asarray(value).reshape(-1).tolist())


def _some(values: Sequence[Any] | None) -> str:
    return "none" if values is None else ", ".join(map(str, values[:6])) + (" ..." if len(values) > 6 else "")


def _unlike(first: Stored, other: Stored, has: str, expected: str) -> UserError:
    return other.error(f"has {has}, but that of {first.path} has {expected}; expected files of the same kind")
