"""Statistics of arrays of any size, in bounded memory: least, mean, largest, deviation, percentiles, zeros."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.array_blocks import StoredNumbers
from dbmpi.checkpoint.distribution import Distribution
from dbmpi.checkpoint.finite import finite_or_none
from dbmpi.checkpoint.untrusted import chunk_bytes, elsewhere, unwritten

BLOCK = 2**16
"""Elements added together: their float64 copies stay in the caches."""
_ROW = 2**12
_CANCELLED = 1e-3
"""Share of the sum of squares below which that of the deviations from the mean is not computed as a difference."""
PIECE = 2**20
"""Elements of a data file read at a time, in whole chunks: a call of HDF5 costs as much as some thousand elements."""
PERCENTS = (1, 50, 99)
"""Percentiles that are shown."""
LARGEST_CHUNK = 2**28
"""Bytes; a larger chunk of a data file is not read."""


class Statistics:
    """Of the finite values added so far; the others are counted.

    Attributes
    ----------
    count, non_finite : int
        Values added, and how many of them are NaN or infinite.
    minimum, maximum, mean : float
        Of the finite values; NaN if there are none.
    distribution : Distribution
        Of the finite values: percentiles, zeros, histograms.
    """

    def __init__(self) -> None:
        self.distribution = Distribution()
        self.count = 0
        self.non_finite = 0
        self.minimum = math.nan
        self.maximum = math.nan
        self.mean = math.nan
        self._squares = 0.0
        self._scratch: np.ndarray | None = None

    @property
    def deviation(self) -> float:
        """Standard deviation of the finite values (divided by their number); NaN if there are none."""
        return math.sqrt(self._squares / self._finite) if self._finite else math.nan

    def add(self, values: np.ndarray) -> None:
        """Add `values` of any shape; sums are float64."""
        flat = values.reshape(-1)
        self.distribution.add(flat)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(flat), BLOCK):
                self._add_block(flat[start : start + BLOCK])

    @property
    def _finite(self) -> int:
        return self.count - self.non_finite

    def _add_block(self, block: np.ndarray) -> None:
        before = self._finite
        self.count += len(block)
        if len(block) == 0:
            return
        least, most = float(block.min()), float(block.max())
        if not (math.isfinite(least) and math.isfinite(most)):  # NaN goes through both
            finite = block[np.isfinite(block)]
            self.non_finite += len(block) - len(finite)
            if len(finite) == 0:
                return
            block, least, most = finite, float(finite.min()), float(finite.max())
        if self._scratch is None:
            self._scratch = np.empty(BLOCK)
        size = len(block)
        values = self._scratch[: -(-size // _ROW) * _ROW]
        values[:size], values[size:] = block, 0.0
        total, squares = float(values.sum()), _sum_of_squares(values)
        mean = total / size
        deviations = squares - mean * total
        if not deviations > _CANCELLED * squares:
            values[:size] -= mean
            deviations = _sum_of_squares(values)
        if before == 0:
            self.minimum, self.maximum = least, most
            self.mean, self._squares = mean, deviations
            return
        self.minimum = min(self.minimum, least)
        self.maximum = max(self.maximum, most)
        # Two sets of values together (Chan, Golub, LeVeque: Updating formulae, 1979):
        # S = S1 + S2 + (m2 - m1)^2 n1 n2 / (n1 + n2),  m = m1 + (m2 - m1) n2 / (n1 + n2)
        difference = mean - self.mean
        share = size / self._finite
        self._squares += deviations + difference * difference * before * share
        self.mean += difference * share


def _sum_of_squares(values: np.ndarray) -> float:
    """Return the sum of squares of `values`, by rows: for long ones BLAS would start threads, which spin afterwards."""
    rows = values.reshape(-1, _ROW)
    return float(np.vecdot(rows, rows).sum())


def of_array(array: StoredNumbers) -> Statistics:
    """Return the statistics of an `array` of a checkpoint; raises Damaged if some of it is not what was written."""
    statistics = Statistics()
    for _, values in array.blocks():
        statistics.add(values)
    return statistics


def of_dataset(dataset: h5py.Dataset) -> Statistics | str:
    """Return the statistics of a `dataset` of numbers, or why there are none."""
    if dataset.dtype.kind not in "iufb" or dataset.shape is None:
        return "no numbers"
    if elsewhere(dataset):
        return "the values lie in other files, which are not followed"
    if chunk_bytes(dataset) > LARGEST_CHUNK:
        return f"its chunks are larger than {LARGEST_CHUNK // 2**20} MiB"
    if unwritten(dataset):
        return "not all of it was written"
    statistics = Statistics()
    buffer = np.empty(0, dataset.dtype)
    for box in boxes_of(dataset.shape, dataset.chunks or (1,) * dataset.ndim, PIECE):
        shape = tuple(part.stop - part.start for part in box)
        size = math.prod(shape)
        if len(buffer) < size:
            buffer = np.empty(size, dataset.dtype)
        dataset.read_direct(buffer[:size].reshape(shape), box)
        statistics.add(buffer[:size])
    return statistics


def boxes_of(shape: tuple[int, ...], chunks: tuple[int, ...], elements: int) -> Iterator[tuple[slice, ...]]:
    """Cut an array of a `shape` into boxes of whole `chunks`, of at most `elements` or one chunk, in C order."""
    if 0 in shape:
        return
    box = list(chunks)
    for axis in reversed(range(len(shape))):
        fitting = max(1, elements // math.prod(box))
        box[axis] = min(-(-shape[axis] // chunks[axis]), fitting) * chunks[axis]
    steps = [range(0, length, step) for length, step in zip(shape, box, strict=True)]
    for corner in itertools.product(*steps):
        yield tuple(
            slice(start, min(start + step, length)) for start, step, length in zip(corner, box, shape, strict=True)
        )


def as_dict(found: Statistics | str) -> dict[str, Any]:
    """Return the statistics `found` for JSON, which has no NaN; or the reason for having none under ``"not_read"``."""
    if isinstance(found, str):
        return {"not_read": found}
    spread = found.distribution
    percentiles = [min(max(value, found.minimum), found.maximum) for value in spread.percentiles(PERCENTS)]
    numbers = {"min": found.minimum, "mean": found.mean, "max": found.maximum, "std": found.deviation}
    return {
        **{name: finite_or_none(value) for name, value in numbers.items()},
        "percentiles": {
            str(percent): finite_or_none(value) for percent, value in zip(PERCENTS, percentiles, strict=True)
        },
        "percentiles_exact": spread.exact,
        "zeros": spread.zeros,
        "non_finite": found.non_finite,
    }
