"""Terms of a loss that need no targets, over arrays ``(maps, rows, columns, samples)``; sums are in float64.

A layer's outputs may be a part of a larger array: kernels take them as :func:`dbmpi.kernels.memory.rows_of` gives them.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dbmpi.kernels.compile import parallel_kernel
from dbmpi.kernels.losses import add_up
from dbmpi.kernels.memory import Rows


@parallel_kernel
def squared_error(estimate: np.ndarray, value_rows: Rows, factor: float) -> float:
    """Return ``sum (estimate - value)^2``; each estimate becomes ``factor * (estimate - value)``.

    Parameters
    ----------
    estimate : array (maps, rows, columns, samples)
    value_rows
        The values that are estimated.
    factor : float
    """
    values, steps = value_rows
    maps, rows, columns, samples = estimate.shape
    flat, length, scale = estimate.reshape(-1), columns * samples, estimate.dtype.type(factor)
    sums = np.empty(maps * rows, np.float64)
    for line in prange(maps * rows):
        mine = flat[line * length : (line + 1) * length]
        first = line // rows * steps[0] + line % rows * steps[1]
        value = values[first : first + length]
        total = 0.0
        for i in range(length):
            error = mine[i] - value[i]
            total += np.float64(error) * np.float64(error)
            mine[i] = error * scale
        sums[line] = total
    return float(add_up(sums))


@parallel_kernel
def total(value_rows: Rows, shape: tuple[int, int, int, int]) -> float:
    """Return the sum of the values in `value_rows`, an array of this shape."""
    values, steps = value_rows
    maps, rows, columns, samples = shape
    length = columns * samples
    sums = np.empty(maps * rows, np.float64)
    for line in prange(maps * rows):
        first = line // rows * steps[0] + line % rows * steps[1]
        value = values[first : first + length]
        of_line = 0.0
        for i in range(length):
            of_line += np.float64(value[i])
        sums[line] = of_line
    return float(add_up(sums))
