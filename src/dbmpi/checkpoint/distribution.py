"""How the values of an array of any size are distributed, in bounded memory and one pass: percentiles and histograms.

A small array is kept, and its percentiles are exact.  The values of a large one are counted by the upper half of the
bits of a float32: sign, exponent and the first seven bits of the mantissa.  Such a bin is narrow everywhere, 1/128 of
its values, whatever the range of the array, which need not be known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

KEPT = 2**16
"""Elements up to which all values are kept."""
_BLOCK = 2**17
"""Elements counted together."""
_BINS = 2**16
_INFINITE = 0x7F80
"""The bin of infinity: those above it are of NaN."""
_NEGATIVE = 0x8000


class Distribution:
    """Of the finite values added so far.

    Attributes
    ----------
    zeros : int
        How many of them are zero.
    """

    def __init__(self) -> None:
        self.zeros = 0
        self._size = 0
        self._kept: list[np.ndarray] = []
        self._counts: np.ndarray | None = None
        self._scratch: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def exact(self) -> bool:
        """Whether all values were kept; otherwise a percentile is off by less than 1/128 of itself."""
        return self._counts is None

    def add(self, values: np.ndarray) -> None:
        """Add `values`, one-dimensional and of any type of numbers; what is not finite as float32 is left out."""
        self._size += len(values)
        if self._size <= KEPT:
            self.zeros += len(values) - int(np.count_nonzero(values))
            self._kept.append(values.copy())
            return
        if self._counts is None:
            self._counts = np.zeros(_BINS, np.int64)
            for kept in self._kept:
                self._count(kept, False)
            self._kept = []
        for start in range(0, len(values), _BLOCK):
            self._count(values[start : start + _BLOCK], True)

    def percentiles(self, percents: Sequence[float]) -> list[float]:
        """Return the values below which so many `percents` of all lie; NaN if there are none."""
        if self._counts is None:
            finite = self._finite()
            return np.percentile(finite, percents).tolist() if len(finite) else [math.nan] * len(percents)
        edges, counts = _in_order(self._counts)
        after = np.cumsum(counts)
        if after[-1] == 0:
            return [math.nan] * len(percents)
        found = []
        for percent in percents:
            rank = percent / 100 * float(after[-1] - 1)
            place = int(np.searchsorted(after, rank, "right"))
            share = (rank - float(after[place] - counts[place]) + 0.5) / float(counts[place])
            low, high = edges[place], edges[place + 1]
            found.append(0.0 if low * high == 0 else float(low + (high - low) * min(share, 1.0)))
        return found

    def histogram(self, edges: np.ndarray) -> np.ndarray:
        """Return how many values lie between each two of the ascending `edges`, float64.

        Values that were not kept are taken as spread evenly over their bins.
        """
        if self._counts is None:
            return np.histogram(self._finite(), edges)[0].astype(np.float64)
        narrow, counts = _in_order(self._counts)
        # A value at an outer edge lies within, though its bin may not.
        below = np.interp(edges, narrow, np.concatenate([[0], np.cumsum(counts)]))
        below[0], below[-1] = 0, counts.sum()
        return np.asarray(np.diff(below))

    def _finite(self) -> np.ndarray:
        values: np.ndarray = np.concatenate([np.empty(0), *self._kept])
        return np.asarray(values[np.isfinite(values)])

    def _count(self, block: np.ndarray, count_zeros: bool) -> None:
        assert self._counts is not None
        with np.errstate(over="ignore"):  # a float64 beyond float32 counts among the infinite ones
            narrow = np.ascontiguousarray(block, np.float32)
        if self._scratch is None:  # a new array for every block may cost more than the counting
            self._scratch = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.intp)
        upper, bins = (array[: len(block)] for array in self._scratch)
        bins[:] = np.right_shift(narrow.view(np.uint32), 16, out=upper)
        counts = np.bincount(bins, minlength=_BINS)
        self._counts += counts
        if count_zeros and counts[0] + counts[_NEGATIVE]:
            self.zeros += len(block) - int(np.count_nonzero(block))


@cache
def _edges() -> np.ndarray:
    """Return the edges of the bins of finite values, ascending, float64."""
    positive = (np.arange(_INFINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    positive[-1] = 2 * positive[-2] - positive[-3]  # the last bin ends at infinity
    return np.concatenate([-positive[::-1], positive[1:]])


def _in_order(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ascending edges of the bins of finite values, and how many values are in each."""
    negative = counts[_NEGATIVE : _NEGATIVE + _INFINITE]
    return _edges(), np.concatenate([negative[::-1], counts[:_INFINITE]])
