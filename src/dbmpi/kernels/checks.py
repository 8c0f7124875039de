"""Copies that notice numbers which are not finite, in the same pass over memory."""

from __future__ import annotations

import numpy as np
from numba import prange

from dbmpi.kernels.compile import exact_parallel_kernel


@exact_parallel_kernel
def copy_finite(target: np.ndarray, source: np.ndarray) -> bool:
    """Copy `source` to `target`, vectors of one dtype and length, and return whether all of it is finite."""
    wrong = 0
    for i in prange(source.size):
        value = source[i]
        target[i] = value
        wrong += value - value != 0  # NaN for what is not finite
    return wrong == 0
