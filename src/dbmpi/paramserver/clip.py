"""Clipping: the gradient of a replica is scaled down where its norm is too large."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from dbmpi.index.layout import Stretch
from dbmpi.kernels import updates

_TINY = 2.0**-600
"""Makes squares of all numbers small enough for sums, and is exact."""


class Clip:
    """Scales gradients down to a largest norm: Pascanu et al., "On the difficulty of training RNNs", ICML 2013.

    The norm is that of the whole gradient of a replica, whose partitions add up their squares.  A gradient whose norm
    is not larger keeps its bits.

    Parameters
    ----------
    largest
        The largest norm.
    stretches
        The pieces of the worker's own vector.  Those of which another partition pushes the same gradient do not count.
    add_up
        Returns the sum of what all partitions of the replica pass to it, the same on all of them.
    """

    def __init__(self, largest: float, stretches: Iterable[Stretch], add_up: Callable[[float], float]) -> None:
        self._largest = largest
        self._add_up = add_up
        self._ranges: list[range] = []
        for stretch in stretches:
            if not stretch.pushed:
                continue
            start, stop = stretch.local, stretch.local + stretch.length
            if self._ranges and self._ranges[-1].stop == start:
                start = self._ranges.pop().start
            self._ranges.append(range(start, stop))

    def __call__(self, gradient: np.ndarray) -> float:
        """Scale the worker's own vector `gradient`, together with the other partitions (collective).

        Returns
        -------
        float
            The norm before that, the same on all partitions; not finite where an element of any of them is not.
        """
        norm = self._norm(gradient[one.start : one.stop] for one in self._ranges)
        if norm == math.inf:  # a square may have overflowed, of float64 above 1e154
            parts = (np.multiply(gradient[one.start : one.stop], _TINY, dtype=np.float64) for one in self._ranges)
            norm = self._norm(parts) / _TINY
        if self._largest < norm < math.inf:
            updates.scale(gradient, self._largest / norm)
        return norm

    def _norm(self, parts: Iterable[np.ndarray]) -> float:
        return math.sqrt(self._add_up(sum(map(updates.sum_of_squares, parts), 0.0)))
