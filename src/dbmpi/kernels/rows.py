"""Arithmetic of few short vectors, which are the rows of a table, by one thread and in the order of the source.

The results have the same bits on every processor, since every rank of a job takes its decisions by its own.
"""

from __future__ import annotations

import numpy as np

from dbmpi.kernels.compile import kernel


@kernel
def products(table: np.ndarray, pairs: np.ndarray, result: np.ndarray) -> None:
    """Write the dot products of pairs of rows; not a number where a sum is not finite.

    Parameters
    ----------
    table : (rows, n) float64 array
        C-contiguous.
    pairs : (pairs, 2) int64 array
        Which rows to multiply.
    result : (pairs or more,) float64 array
        The first `pairs` elements are overwritten.
    """
    size = table.shape[1]
    whole = size - size % 4
    for pair in range(len(pairs)):
        left, right = table[pairs[pair, 0]], table[pairs[pair, 1]]
        # Four sums: one would wait for each of its additions.
        first = second = third = fourth = 0.0
        for i in range(0, whole, 4):
            first += left[i] * right[i]
            second += left[i + 1] * right[i + 1]
            third += left[i + 2] * right[i + 2]
            fourth += left[i + 3] * right[i + 3]
        for i in range(whole, size):
            first += left[i] * right[i]
        total = (first + second) + (third + fourth)
        result[pair] = total if np.isfinite(total) else np.nan


@kernel
def combine(target: np.ndarray, factors: np.ndarray, table: np.ndarray) -> None:
    """Write the sum of multiples of rows, added in their order and rounded once to the dtype of the `target`.

    Parameters
    ----------
    target : (n,) array
        float32 or float64.
    factors : (rows,) float64 array
        One or more.
    table : (rows, n) float64 array
        C-contiguous; its first row is overwritten.
    """
    total = table[0]
    for i in range(target.size):
        total[i] *= factors[0]
    for row in range(1, len(factors)):
        factor, source = factors[row], table[row]
        for i in range(target.size):
            total[i] += factor * source[i]
    for i in range(target.size):
        target[i] = total[i]
