"""Dropout: random masks that are a function of a unit's position and a sample's number.

The generator is counter-based: Philox4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011).  Every worker that computes a unit draws the same mask for it, and the backward pass draws it again.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dbmpi.kernels.compile import inlined, parallel_kernel

CHUNK = 64
"""Samples whose random numbers are made together: of four words, each from a quarter as many counters."""

_LANES = CHUNK // 4
_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@parallel_kernel
def drop(
    values: np.ndarray, units: np.ndarray, key: np.uint64, threshold: int, scale: float, result: np.ndarray
) -> None:
    """Set `result` to the values, scaled, where their random number is not below a threshold, and else to zero.

    Parameters
    ----------
    values, result : arrays (units, samples)
        May be the same.
    units : int64 array (units,)
        Number of each unit in its whole layer, which its random numbers depend on.
    key : uint64
        The stream.
    threshold : int
        Of 32-bit random numbers, those below it drop a value.
    scale : float
    """
    samples = values.shape[1]
    factor, zero = values.dtype.type(scale), values.dtype.type(0)
    least = np.uint32(threshold)
    for unit in prange(units.size):
        words = np.empty(CHUNK, np.uint32)
        for start in range(0, samples, CHUNK):
            fill_words(np.uint64(units[unit]), np.uint64(start // CHUNK), key, words)
            row, target = values[unit, start : start + CHUNK], result[unit, start : start + CHUNK]
            for sample in range(row.size):
                target[sample] = zero if words[sample] < least else row[sample] * factor


@inlined
def fill_words(unit: np.uint64, chunk: np.uint64, key: np.uint64, words: np.ndarray) -> None:
    """Fill `words` with the 32-bit random numbers of a unit for the samples from ``CHUNK * chunk`` on.

    Parameters
    ----------
    unit, chunk, key : uint64
        Number of the unit in its layer; number of the chunk of samples; the stream.
    words : (CHUNK,) uint32 array
        Number ``lane + w * CHUNK / 4`` is word `w` of the counter (lane, chunk, low half of unit, high half of
        unit).
    """
    for lane in range(_LANES):
        x0, x1 = np.uint64(lane), chunk & _WORD
        x2, x3 = unit & _WORD, unit >> _SHIFT
        key_0, key_1 = key & _WORD, key >> _SHIFT
        # 32-bit words in 64-bit integers: both halves of their products are needed, and these are vector instructions.
        for _ in range(10):
            product_0, product_1 = _MULTIPLIER_0 * x0, _MULTIPLIER_1 * x2
            x0, x2 = (product_1 >> _SHIFT) ^ x1 ^ key_0, (product_0 >> _SHIFT) ^ x3 ^ key_1
            x1, x3 = product_1 & _WORD, product_0 & _WORD
            key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
        words[lane] = x0
        words[lane + _LANES] = x1
        words[lane + 2 * _LANES] = x2
        words[lane + 3 * _LANES] = x3
