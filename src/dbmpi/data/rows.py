"""A dataset as rows, one a sample, whatever the order of its axes in the file and whatever its numbers stand for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dbmpi.data import hdf5
from dbmpi.data.conventions import Convention
from dbmpi.data.gather import narrow
from dbmpi.data.hdf5 import Dataset

_TEXT_BYTES = 256 << 20
"""Texts of any length are read so few at a time that they take no more than this, were each as long as the file."""
_FEWEST_TEXTS = 16


KEPT = (np.uint8, np.int8, np.uint16, np.int16, np.bool_)
"""Types of integers that take less room than float32: they stay what they are until a batch is made of them."""


class Stored:
    """Rows of a dataset.

    Parameters
    ----------
    dataset
        Lies in the file itself.
    meaning
        What its numbers stand for.
    channels_last
        Whether the last axis of a row is to become its first.
    replacement
        Value for every missing one; None where those are errors.
    integers
        Whether integers are to stay what they are, for an objective of the user's own.
    """

    def __init__(
        self,
        dataset: Dataset,
        meaning: Convention,
        *,
        channels_last: bool = False,
        replacement: float | None = None,
        integers: bool = False,
    ) -> None:
        self.dataset, self.meaning = dataset, meaning
        self.path, self.name, self.error = dataset.path, dataset.name, dataset.error
        self._replacement, self._integers = replacement, integers
        self._shape = tuple(int(length) for length in dataset.values.shape)
        self._axis = len(self._shape) - 1 if meaning.reversed_axes else 0
        self._channels_last = channels_last and len(self._shape) > 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the sample first."""
        shape = self._shape[::-1] if self.meaning.reversed_axes else self._shape
        if self._axis_moved:
            return (shape[1], shape[0])
        return (shape[0], shape[-1], *shape[1:-1]) if self._channels_last else shape

    @property
    def _axis_moved(self) -> bool:
        """Whether the samples of a matrix are its last axis, for the user too: a row vector."""
        return self._axis != (len(self._shape) - 1 if self.meaning.reversed_axes else 0)

    @property
    def scattered(self) -> bool:
        """Whether scattered rows are read about as fast as consecutive ones."""
        return self._axis == 0 and self.dataset.scattered

    @property
    def any_order(self) -> bool:
        """Whether they may be asked for in any order, and several times."""
        return self._axis == 0 and self.dataset.any_order

    @property
    def kind(self) -> np.dtype[Any]:
        """Type of the stored numbers."""
        return self.meaning.kind

    @property
    def samples(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def as_stored(self) -> bool:
        """Whether rows are kept as they are stored: small integers, to be multiplied by the factor when used."""
        if self._integers:
            return self.kind.kind in "iub" and self.meaning.plain and self.meaning.scale == 1
        return self.kind in KEPT and self.meaning.plain

    @property
    def kept(self) -> np.dtype[Any]:
        """Type of the rows that :meth:`decoded` returns, once they are narrowed."""
        if self.as_stored:
            return np.dtype(np.uint8) if self.kind == np.bool_ and not self._integers else self.kind
        return np.dtype(np.float32)

    @property
    def factor(self) -> float:
        """Factor that remains to be applied after :meth:`decoded`."""
        return self.meaning.scale if self.as_stored else 1.0

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the dataset, as the file declares it."""
        return self.dataset.values.dtype  # type: ignore[no-any-return]

    def as_column(self, samples: int) -> None:
        """Take a matrix of one row for one of one column, if it has so many `samples` then."""
        if len(self._shape) == 2 and self.shape[0] == 1 != samples == self.shape[1]:
            self._axis = 1 - self._axis

    def reopened(self, fresh: Mapping[tuple[str, str], Dataset]) -> Stored:
        """Return the same dataset of files that were opened again, whose datasets are the `fresh` ones."""
        again = copy.copy(self)
        again.dataset = self.dataset.reopened(fresh)
        return again

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(first sample, stored rows)`` over the whole dataset, about hdf5.BLOCK_BYTES at a time."""
        rows = self._rows_at_once()
        chunks = getattr(self.dataset.values, "chunks", None)
        chunk = chunks[self._axis] if chunks else 0
        if chunk and rows > chunk:
            rows -= rows % chunk
        for start in range(0, self.samples, rows):
            yield start, self.read(slice(start, start + rows))

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return stored rows: a range, or some in increasing order."""
        values = self.dataset.read((*(slice(None),) * self._axis, rows))
        if values.dtype != self.kind and self.kind.kind in "iufb":
            # Another byte order, bits that are truth values, or integers whose sign is given by an attribute.
            values = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False)).view(self.kind)
        if self._axis_moved:
            return values.T if self._axis else values
        if self.meaning.reversed_axes:
            values = values.T
        return np.moveaxis(values, -1, 1) if self._channels_last else values

    def missing(self, rows: np.ndarray) -> np.ndarray | None:
        """Return where in stored rows there is no value; None where nothing is missing for sure."""
        meaning = self.meaning
        if meaning.plain and self._replacement is None:
            return None
        wrong = np.zeros(rows.shape, bool)
        for mark in meaning.missing:
            wrong |= rows == mark
        if rows.dtype.kind == "f" and (self._replacement is not None or any(map(math.isnan, meaning.missing))):
            wrong |= np.isnan(rows)
        if meaning.least is not None:
            wrong |= rows < meaning.least
        if meaning.most is not None:
            wrong |= rows > meaning.most
        return wrong

    def decoded(self, rows: np.ndarray) -> np.ndarray:
        """Return values of stored rows: as they are stored, or else float32 with the factor applied.

        Missing values are NaN, or their replacement.
        """
        if self.as_stored:
            return rows if self.kept == rows.dtype else np.ascontiguousarray(rows).view(self.kept)
        meaning, values = self.meaning, rows
        wrong = self.missing(rows)
        if meaning.scale != 1 or meaning.offset != 0:
            values = rows * np.float64(meaning.scale) + meaning.offset
        values = narrow(values.astype(np.float32) if values.dtype.kind in "iub" else values)
        if wrong is not None and wrong.any():
            values = values.copy() if values is rows else values
            values[wrong] = np.nan if self._replacement is None else self._replacement
        return values

    def count(self, wrong: Callable[[np.ndarray], np.ndarray], full: bool) -> tuple[int, int, Any]:
        """Return how many rows are wrong, the number of the first of these, and that row; without `full`, of one block.

        `wrong` returns the positions of the wrong ones among stored rows.
        """
        count, first, row = 0, -1, None
        for start, rows in self.blocks():
            positions = wrong(rows)
            if len(positions) and not count:
                first, row = start + int(positions[0]), rows[positions[0]]
            count += len(positions)
            if not full:
                break
        return count, first, row

    def scan(self, full: bool) -> None:
        """Raise UserError where a value is missing, NaN, infinite or too large for float32.

        Without `full`, only the first block is read.
        """
        bad, first, row = self.count(lambda rows: hdf5.not_finite(self.decoded(rows)), full)
        missing = self.missing(row) if bad and self._replacement is None else None
        if missing is not None and missing.any():
            index = np.argwhere(missing)[0].tolist()
            shown = row[tuple(index)]
            raise self.error(
                f": value {index} of sample {first} is missing: it is {shown}, which {self._marks()}; {bad} of "
                f"{self.samples} samples lack values; leave them out, or set data.missing to the number to take "
                "instead, e.g. 0.0"
            )
        if bad:
            raise self.error(
                f": sample {first} holds NaN, infinity or a number too large for float32; {bad} of {self.samples} "
                f"samples do; expected finite numbers (data.missing is taken instead of NaN, if it is set)"
            )

    def _marks(self) -> str:
        meaning, marks = self.meaning, []
        if meaning.missing:
            marks.append(f"marks gaps ({', '.join(f'{mark:g}' for mark in meaning.missing[:4])})")
        if meaning.least is not None or meaning.most is not None:
            marks.append(f"is outside of the valid range {meaning.least} ... {meaning.most}")
        return " or ".join(marks)

    def _rows_at_once(self) -> int:
        features = max(1, math.prod(self.shape[1:]))
        if self.kind.hasobject:
            file_bytes = max(1, self.dataset.file_bytes)
            return max(_FEWEST_TEXTS, min(1 << 16, _TEXT_BYTES // file_bytes) // features)
        return max(1, hdf5.BLOCK_BYTES // (features * self.kind.itemsize))


def narrowed(stored: Stored, rows: np.ndarray) -> np.ndarray:
    """Return stored `rows` of inputs as they are kept in memory, ``(samples, features)``."""
    decoded = np.ascontiguousarray(stored.decoded(rows).reshape(len(rows), -1))
    return decoded if stored.as_stored else narrow(decoded)


def in_place(stored: Stored) -> np.ndarray | None:
    """Return a given array as the rows (samples, features) that kernels read, where it is as they take it.

    `stored` are the inputs whose values it is; None where they have to be read.
    """
    values = stored.dataset.values
    flags = values.flags
    if values.dtype not in (*KEPT[:-1], np.float32) or not (flags.c_contiguous and flags.aligned and flags.writeable):
        return None
    if stored.shape != values.shape or stored.kept != values.dtype:
        return None
    flat: np.ndarray = np.asarray(values).reshape(len(values), -1)
    return flat
