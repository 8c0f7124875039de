"""Two checkpoints beside one another: how far each array has moved, and which settings differ.

The *update-to-weight ratio* of an array, or of all arrays of a layer together, is ``|w2 - w1| / |w1|``: the Euclidean
norm of the difference over that of the first values.  Elements that are not finite in both are counted and left out of
both norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from dbmpi.checkpoint.array_blocks import StoredNumbers
from dbmpi.checkpoint.finite import finite_or_none
from dbmpi.checkpoint.statistics import Statistics
from dbmpi.errors import Damaged

BLOCK = 2**16
"""Elements compared together: their float64 copies stay in the caches."""
_SAFE = (1e-140, 1e140)
"""Magnitudes whose squares, and the sum of them, are normal numbers."""


class Comparison:
    """Of two arrays of one shape, or, by `join`, of several such pairs.

    Attributes
    ----------
    count : int
        Pairs of elements.
    change_norm, norm : float
        Euclidean norms of the differences, and of the first values.
    largest, position : float, int
        The difference of the largest magnitude, and its flat position; 0 and -1 where nothing differs.
    changed : int
        Pairs that differ, where two NaN do not.
    zeros : (int, int)
        Elements that are zero, in the first and in the second array.
    non_finite : int
        Pairs whose difference is NaN or infinite.
    """

    def __init__(self) -> None:
        self.count = self.changed = self.non_finite = 0
        self.change_norm = self.norm = self.largest = 0.0
        self.position = -1
        self.zeros = (0, 0)
        self._scratch: np.ndarray | None = None

    @property
    def ratio(self) -> float:
        """The update-to-weight ratio; 0 where nothing has changed, and infinite where all first values are zero."""
        if self.change_norm == 0:
            return 0.0
        return self.change_norm / self.norm if self.norm else math.inf

    def add(self, first: np.ndarray, second: np.ndarray, start: int = 0) -> None:
        """Add pairs: two arrays ``(n,)`` of numbers, `first` and `second`, from the flat position `start` on."""
        with np.errstate(over="ignore", invalid="ignore"):
            for offset in range(0, len(first), BLOCK):
                part = slice(offset, offset + BLOCK)
                self._add_block(first[part], second[part], start + offset)

    def join(self, other: Comparison) -> None:
        """Add the pairs of another comparison, of another array, so that no position is known any more.

        Parameters
        ----------
        other
            The comparison.
        """
        self.count += other.count
        self.changed += other.changed
        self.non_finite += other.non_finite
        self.change_norm = math.hypot(self.change_norm, other.change_norm)
        self.norm = math.hypot(self.norm, other.norm)
        self.zeros = (self.zeros[0] + other.zeros[0], self.zeros[1] + other.zeros[1])
        if abs(other.largest) > abs(self.largest):
            self.largest = other.largest

    def _add_block(self, first: np.ndarray, second: np.ndarray, start: int) -> None:
        size = len(first)
        self.count += size
        self.changed += int(np.count_nonzero(first != second))
        zeros = [size - int(np.count_nonzero(values)) for values in (first, second)]
        self.zeros = (self.zeros[0] + zeros[0], self.zeros[1] + zeros[1])
        if self._scratch is None:
            self._scratch = np.empty((3, BLOCK))  # new arrays of this size may cost more than what is done with them
        before, change, magnitude = self._scratch[:, :size]
        before[:], change[:] = first, second
        change -= before
        at = int(np.argmax(np.abs(change, out=magnitude)))  # NaN counts as the largest
        if not math.isfinite(magnitude[at]):
            bad = ~np.isfinite(change)
            self.non_finite += int(np.count_nonzero(bad))
            self.changed -= int(np.count_nonzero(np.isnan(first) & np.isnan(second)))
            change[bad] = before[bad] = magnitude[bad] = 0.0
            at = int(np.argmax(magnitude))
        if magnitude[at] > abs(self.largest):
            self.largest, self.position = float(change[at]), start + at
        self.change_norm = math.hypot(self.change_norm, _norm(change, float(magnitude[at]), magnitude))
        most = float(np.abs(before, out=magnitude).max())
        self.norm = math.hypot(self.norm, _norm(before, most, magnitude))

    def as_dict(self, shape: Sequence[int] = ()) -> dict[str, Any]:
        """Return the numbers for JSON.

        Parameters
        ----------
        shape
            Of the arrays, from which the index of the largest difference follows; empty where that is not known.
        """
        index = np.unravel_index(self.position, tuple(shape)) if self.position >= 0 and shape else ()
        return {
            "size": self.count,
            "update_to_weight": finite_or_none(self.ratio),
            "change_norm": finite_or_none(self.change_norm),
            "weight_norm": finite_or_none(self.norm),
            "largest_change": finite_or_none(self.largest),
            "largest_change_at": [int(axis) for axis in index],
            "changed": self.changed,
            "zeros": list(self.zeros),
            "non_finite": self.non_finite,
        }


def of_arrays(first: StoredNumbers, second: StoredNumbers) -> Comparison:
    """Compare the arrays `first` and `second`, of one shape; raises Damaged if some of one is not what was written."""
    found = Comparison()
    for (start, before), (_, after) in zip(first.blocks(), second.blocks(), strict=True):
        found.add(before, after, start)
    return found


def of_differences(first: StoredNumbers, second: StoredNumbers) -> Statistics:
    """Return the statistics of the array `second` minus the array `first`; raises as :func:`of_arrays` does."""
    found = Statistics()
    for (_, before), (_, after) in zip(first.blocks(), second.blocks(), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            found.add(after.astype(np.float64) - before)
    return found


def pairs(
    first: Sequence[StoredNumbers], second: Sequence[StoredNumbers]
) -> Iterator[tuple[StoredNumbers, StoredNumbers]]:
    """Yield the arrays of `first` and `second` that have a name and a shape in common, in the order of the first."""
    others = {array.name: array for array in second}
    for array in first:
        other = others.get(array.name)
        if other is not None and other.shape == array.shape:
            yield array, other


def compare(first: Sequence[StoredNumbers], second: Sequence[StoredNumbers]) -> dict[str, Any]:
    """Compare the arrays of two checkpoints by their names.

    Parameters
    ----------
    first, second
        The arrays, e.g. of :func:`dbmpi.checkpoint.array_blocks.parameters`.

    Returns
    -------
    dict
        For JSON: ``layers``, each with its ``arrays``; names ``only_then`` and ``only_now``; and ``shapes``, those of
        arrays with a name in common that do not fit.
    """
    before = {array.name: array for array in first}
    after = {array.name: array for array in second}
    layers = []
    for layer, members in groupby(pairs(first, second), key=lambda pair: pair[0].layer):
        whole, arrays = Comparison(), []
        for one, other in members:
            entry: dict[str, Any] = {"name": one.name, "shape": list(one.shape)}
            try:
                found = of_arrays(one, other)
                whole.join(found)
                entry |= found.as_dict(one.shape)
            except Damaged as error:
                entry["damaged"] = str(error)
            arrays.append(entry)
        numbers = whole.as_dict()
        del numbers["largest_change_at"]
        layers.append({"name": layer, **numbers, "arrays": arrays})
    return {
        "layers": layers,
        "only_then": [name for name in before if name not in after],
        "only_now": [name for name in after if name not in before],
        "shapes": [
            {"name": name, "then": list(array.shape), "now": list(after[name].shape)}
            for name, array in before.items()
            if name in after and after[name].shape != array.shape
        ],
    }


def _norm(values: np.ndarray, largest: float, scratch: np.ndarray) -> float:
    """Return the Euclidean norm of `values`, without an overflow on the way.

    Parameters
    ----------
    values, largest
        The values, and the largest magnitude of them.
    scratch
        As long as the values; it is overwritten.
    """
    if largest == 0:
        return 0.0
    scale = 1.0 if _SAFE[0] < largest < _SAFE[1] else largest
    scaled = values if scale == 1.0 else np.divide(values, scale, out=scratch)
    return scale * math.sqrt(float(np.square(scaled, out=scratch).sum()))
