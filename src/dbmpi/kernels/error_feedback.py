"""Rounding to bfloat16 that keeps what it leaves, for pushes between hosts.

It runs on the thread that calls it, as transfers may have threads of their own.
"""

from __future__ import annotations

import numpy as np

from dbmpi.kernels.compile import kernel

LARGEST = float(np.array([0x7F7F0000], np.uint32).view(np.float32)[0])
"""The largest bfloat16 that is finite."""
_HALF, _ODD, _WIDTH = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
_QUIET = np.uint32(0x400000)
"""The bit that keeps NaN from becoming infinity when the lower half is cut off."""


@kernel
def round_with_error(values: np.ndarray, error: np.ndarray, out: np.ndarray) -> None:
    """Round the sum of values and of what earlier roundings have left, and keep what this one leaves.

    ``out = nearest(values + error);  error = values + error - out``

    What would be rounded to infinity is the largest bfloat16, and leaves the rest.  A value that is not finite is
    written as it is, and leaves alone what was kept: that is always finite.

    Parameters
    ----------
    values : (n,) float32 array
        Contiguous.
    error : (n,) float32 array
        What is kept; contiguous, finite, updated.
    out : (n,) uint16 array
        Contiguous; filled with the bits of the bfloat16.

    Notes
    -----
    Seide et al., "1-bit stochastic gradient descent and its application to data-parallel distributed training of speech
    DNNs", Interspeech 2014, section 3.2.
    """
    largest = np.float32(LARGEST)
    for i in range(values.size):
        value, kept = values[i], error[i]
        finite = value - value == 0
        total = np.float32(min(max(value + kept, -largest), largest)).view(np.uint32)
        # Numba computes with 64 bits, at half the speed, unless it is told at every step that 32 are enough.
        nearest = np.uint32(np.uint32(total + _HALF + np.uint32(np.uint32(total >> _WIDTH) & _ODD)) >> _WIDTH)
        whole = np.float32(value).view(np.uint32)
        if np.isnan(value):
            whole = np.uint32(whole | _QUIET)
        out[i] = np.uint16(nearest if finite else np.uint32(whole >> _WIDTH))
        left = (value - np.uint32(nearest << _WIDTH).view(np.float32)) + kept
        error[i] = min(max(left, -largest), largest) if finite else kept


def compile_error_feedback() -> None:
    """Call the kernel once."""
    few = np.zeros(1, np.float32)
    round_with_error(few, few.copy(), np.zeros(1, np.uint16))
