"""Rows of a file or array to batches with the sample innermost."""

from __future__ import annotations

import numpy as np

GATHER_ROWS = 64
"""Rows of a block: their transposition stays in the caches."""
CACHE_LINE = 64
"""Bytes."""


def gather(rows: np.ndarray, indices: np.ndarray, scale: np.float32) -> np.ndarray:
    """Return ``rows[indices].T * scale`` as float32 ``(features, len(indices))``, C-contiguous.

    `rows` is uint8 or float32 ``(n, features)``.  Blocks of rows pass through a buffer whose rows are an odd number of
    cache lines apart: rows a power of two apart would fall into the same few cache sets and make the transposition
    several times slower.
    """
    features, samples = rows.shape[1], len(indices)
    result = np.empty((features, samples), np.float32)
    line = CACHE_LINE // rows.itemsize
    stride = (-(-features // line) | 1) * line
    buffer = np.empty((min(GATHER_ROWS, samples), stride), rows.dtype)[:, :features]
    for start in range(0, samples, GATHER_ROWS):
        part = indices[start : start + GATHER_ROWS]
        block = buffer[: len(part)]
        block[...] = rows[part]
        np.multiply(block.T, scale, out=result[:, start : start + len(part)])
    return result


def narrow(rows: np.ndarray) -> np.ndarray:
    """Return rows as they are kept in memory: uint8, or float32 of this machine's byte order."""
    if rows.dtype == np.uint8:
        return rows
    with np.errstate(over="ignore"):
        return rows.astype(np.float32, copy=False)
