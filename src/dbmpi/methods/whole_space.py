"""A space of few parameters: every rank holds all vectors whole, and no operation needs the others.

With few parameters an iteration is not arithmetic but what surrounds it: threads that are woken, sums that are prepared
to be added in any order, waiting for other ranks.  Here is none of that.  All ranks do the same with the same numbers,
in the order of the source: so what they compute has the same bits, on different processors, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dbmpi.kernels import rows, sums
from dbmpi.methods.local_space import LocalSpace
from dbmpi.methods.space import Order


class WholeSpace(LocalSpace):
    """Whole vectors, whose products are summed in their order, in float64.

    Parameters
    ----------
    size
        Elements of a vector.
    dtype
        float32 or float64, of vectors for which nothing else is said.
    """

    def __init__(self, size: int, dtype: np.dtype[np.floating] | type[np.floating] | str) -> None:
        super().__init__(size, dtype)

    def combine(self, target: str, terms: Sequence[tuple[float, str]]) -> None:
        """Set `target` to the sum of ``coefficient * vector`` over the `terms`."""
        if not terms:
            raise ValueError("nothing to combine: give at least one term (coefficient, name)")
        table = self._table([name for _, name in terms])
        factors = np.array([coefficient for coefficient, _ in terms], np.float64)
        rows.combine(self._changing(target), factors, table)
        self._wrote(target)

    def advance(self, point: str, origin: str, step: float, direction: str) -> None:
        """Set ``origin = point`` and then ``point = point + step * direction``.

        Parameters
        ----------
        point, origin, step, direction
            As for `Space`.
        """
        if origin in (point, direction):
            raise ValueError(f"the origin {origin!r} must be a vector of its own")
        self.copy(point, origin)
        self.axpy(step, direction, point)

    def dots(self, pairs: Sequence[tuple[str, str]], maxima: Sequence[str] = ()) -> np.ndarray:
        """Return the dot products of all pairs, then the largest magnitudes of the vectors in `maxima`."""
        numbers: dict[str, int] = {}
        for pair in pairs:
            for name in pair:
                numbers.setdefault(name, len(numbers))
        result = np.empty(len(pairs) + len(maxima))
        if pairs:
            chosen = np.array([(numbers[left], numbers[right]) for left, right in pairs])
            rows.products(self._table(list(numbers)), chosen, result)
        result[len(pairs) :] = [self._magnitude(name) for name in maxima]
        return result

    def norms(self, names: Sequence[str], order: Order = "max") -> np.ndarray:
        """Return the largest magnitude of each of `names`, or with ``order="one"`` the sum of its magnitudes."""
        if order not in ("max", "one"):
            raise ValueError(f"a norm has order 'max' or 'one', not {order!r}")
        largest = [self._magnitude(name) for name in names]
        if order == "max":
            return np.array(largest)
        return np.array(
            [
                math.fsum(np.abs(self._get(name)).tolist()) if size <= 2.0**sums.HIGHEST else math.nan
                for name, size in zip(names, largest, strict=True)
            ]
        )

    def _magnitude(self, name: str) -> float:
        return float(np.abs(self._get(name)).max(initial=0.0))

    def _table(self, names: Sequence[str]) -> np.ndarray:
        """Return copies of vectors, as the rows of a float64 array."""
        vectors = [self._get(name) for name in names]
        return np.concatenate(vectors, dtype=np.float64).reshape(len(names), -1 if self._size else 0)
