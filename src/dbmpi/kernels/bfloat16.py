"""Products of bfloat16 matrices with sums in float32, and the rounding to bfloat16.

A bfloat16 number is the upper half of a float32: its sign, its 8 bits of exponent, and 7 of its bits of mantissa.
Arrays of them are arrays of uint16 here, as NumPy has no such type.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dbmpi.kernels import matmul
from dbmpi.kernels.compile import exact_parallel_kernel

BFLOAT16 = np.dtype(np.uint16)
"""The dtype of the arrays that hold bfloat16 numbers."""
ENGINES = ("float32", "avx512_bf16", "amx")
"""What can multiply, from the slowest to the fastest."""


def rounded(values: np.ndarray, out: np.ndarray) -> None:
    """Round float32 to bfloat16: to the nearest, to even between two; NaN stays NaN.

    Parameters
    ----------
    values : float32 array
        C-contiguous; another one is copied first.
    out : uint16 array
        C-contiguous, of the same shape.
    """
    _round(_flat(np.ascontiguousarray(values)), _flat(out))


def widened(values: np.ndarray, out: np.ndarray) -> None:
    """Write bfloat16 numbers as float32, which holds each of them exactly.

    Parameters
    ----------
    values : uint16 array
        C-contiguous; another one is copied first.
    out : float32 array
        C-contiguous, of the same shape.
    """
    _widen(_flat(np.ascontiguousarray(values)), _flat(out).view(np.uint32))


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
    """Write ``a @ b`` into `out`, or add it to what is there.

    Parameters
    ----------
    a, b : (m, k) and (k, n) uint16 arrays
        bfloat16 numbers, C- or F-contiguous (a transposed view is).
    out : (m, n) float32 array
        C-contiguous; must not overlap the others.  Sums are float32.
    add : bool
        Add to `out`, instead of replacing it.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    matmul.product(_wide(a), _wide(b), out, add)


def engine() -> str:
    """Return which of `ENGINES` multiplies on this processor; by ``float32`` bfloat16 brings no speed."""
    return "float32"


def reason() -> str:
    """Return why it is not a faster one; empty if it is the fastest."""
    return "there are no kernels of AMX and AVX512-BF16 yet"


def _wide(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix as float32, in the order in memory that it has."""
    if not matrix.flags.c_contiguous:
        return _wide(matrix.T).T
    wide = np.empty(matrix.shape, np.float32)
    widened(matrix, wide)
    return wide


def _flat(array: np.ndarray) -> np.ndarray:
    """Return an array as one axis; the same memory."""
    if not array.flags.c_contiguous:
        raise ValueError(f"given an array {array.shape} with strides {array.strides}, expected a C-contiguous one")
    return array.reshape(-1)


@exact_parallel_kernel
def _round(values: np.ndarray, out: np.ndarray) -> None:
    bits, half, one, width = values.view(np.uint32), np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for i in prange(bits.size):
        value = bits[i]
        # Numba computes with 64 bits, at half the speed, unless it is told at every step that 32 are enough.
        rounded_up = np.uint32(value + half + np.uint32(np.uint32(value >> width) & one))
        if values[i] != values[i]:
            rounded_up = np.uint32(value | np.uint32(0x400000))
        out[i] = np.uint16(np.uint32(rounded_up >> width))


@exact_parallel_kernel
def _widen(values: np.ndarray, bits: np.ndarray) -> None:
    for i in prange(values.size):
        bits[i] = np.uint32(values[i]) << np.uint32(16)
