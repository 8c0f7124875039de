"""Rows of a table to a batch with the sample innermost."""

from __future__ import annotations

import numpy as np

from dbmpi.kernels.compile import kernel
from dbmpi.kernels.memory import CACHE_LINE

ROWS = 64
"""Rows of a block: they stay in the first caches while they are transposed."""


@kernel
def gather_rows(rows: np.ndarray, indices: np.ndarray, scale: float, result: np.ndarray) -> None:
    """Set ``result = rows[indices].T * scale``.

    Blocks of rows pass through a buffer whose rows are an odd number of cache lines apart: rows a power of two apart
    would fall into the same few cache sets and make the transposition several times slower.

    Parameters
    ----------
    rows : (n, features) array of float32, or of integers of 8 or 16 bits
    indices : (samples,) int64 array
        Each in ``0 ... n - 1``: they are not checked.
    scale : float
        Rounded to float32.
    result : (features, samples) float32 array
    """
    features, samples = result.shape
    factor = np.float32(scale)
    line = CACHE_LINE // rows.itemsize
    buffer = np.empty((min(ROWS, samples), (-(-features // line) | 1) * line), rows.dtype)
    for start in range(0, samples, ROWS):
        count = min(ROWS, samples - start)
        for sample in range(count):
            source, target = rows[indices[start + sample]], buffer[sample]
            for feature in range(features):
                target[feature] = source[feature]
        for feature in range(features):
            out = result[feature, start : start + count]
            for sample in range(count):
                out[sample] = np.float32(buffer[sample, feature]) * factor
