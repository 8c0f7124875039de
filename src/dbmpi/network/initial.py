"""Initial weights that depend on the seed and on a weight's position alone.

The generator is counter-based (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): value
number i of a tensor is a function of (seed, tensor, i).  Any range of a tensor can therefore be made by itself, by any
rank, and is the same however the vector is cut.
"""

from __future__ import annotations

import math

import numpy as np

_PER_COUNTER = 4  # 64-bit words that Philox makes of one counter
_CHUNK = 1 << 16


def fill_uniform(out: np.ndarray, seed: int, tensor: int, start: int, deviation: float) -> None:
    """Fill `out` with values number ``start, start + 1, ...`` of a tensor, uniform around zero.

    Parameters
    ----------
    out : 1-D array
        float32 or float64.
    seed, tensor : int
        The stream; both at least 0 and below 2**64.
    start : int
        Number of the first value.
    deviation : float
        Standard deviation; the values lie within ``sqrt(3) * deviation``.
    """
    limit = math.sqrt(3.0) * deviation
    for first in range(0, out.size, _CHUNK):
        piece = out[first : first + _CHUNK]
        counter, skipped = divmod(start + first, _PER_COUNTER)
        words = np.random.Philox(key=[seed, tensor], counter=counter).random_raw(skipped + piece.size)[skipped:]
        # the 53 highest bits, as a fraction of one
        fraction = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        piece[:] = (2.0 * fraction - 1.0) * limit


def weight_deviation(inputs: int, activation: str) -> float:
    """Return the standard deviation of initial weights that keeps the size of activations from layer to layer.

    `inputs` is the number of inputs of a unit, `activation` the name of its activation.

    ``sqrt(1 / inputs)`` (LeCun et al., "Efficient BackProp", 1998, section 4.6), and ``sqrt(2 / inputs)`` for units
    that are off half of the time (He et al., "Delving deep into rectifiers", ICCV 2015, section 2.2).
    """
    return math.sqrt((2.0 if activation == "relu" else 1.0) / inputs)
