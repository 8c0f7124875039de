"""Whether all numbers of a vector are finite, in one pass over memory, in which it may also be copied."""

from __future__ import annotations

import numpy as np
from numba import prange

from dbmpi.kernels.compile import exact_parallel_kernel, kernel

FEW = 1 << 14
"""Elements up to which the pass is one thread's: to look after threads would take longer."""


def all_finite(vector: np.ndarray) -> bool:
    """Return whether all elements of a contiguous `vector` are finite."""
    return bool(_check_few(vector) if vector.size <= FEW else _check_many(vector))


def copy_finite(target: np.ndarray, source: np.ndarray) -> bool:
    """Copy `source` to `target`, vectors of one dtype and length, and return whether all of it is finite."""
    return bool(_copy_few(target, source) if source.size <= FEW else _copy_many(target, source))


@kernel
def _check_few(vector: np.ndarray) -> bool:
    wrong = 0
    for i in range(vector.size):
        wrong += vector[i] - vector[i] != 0  # NaN for what is not finite
    return wrong == 0


@exact_parallel_kernel
def _check_many(vector: np.ndarray) -> bool:
    wrong = 0
    for i in prange(vector.size):
        wrong += vector[i] - vector[i] != 0
    return wrong == 0


@kernel
def _copy_few(target: np.ndarray, source: np.ndarray) -> bool:
    wrong = 0
    for i in range(source.size):
        value = source[i]
        target[i] = value
        wrong += value - value != 0  # NaN for what is not finite
    return wrong == 0


@exact_parallel_kernel
def _copy_many(target: np.ndarray, source: np.ndarray) -> bool:
    wrong = 0
    for i in prange(source.size):
        value = source[i]
        target[i] = value
        wrong += value - value != 0
    return wrong == 0


def compile_checks(dtype: np.dtype[np.floating]) -> None:
    """Call all kernels once for arrays of a `dtype`."""
    few = np.zeros(1, dtype)
    _check_few(few)
    _check_many(few)
    _copy_few(few, few.copy())
    _copy_many(few, few.copy())
