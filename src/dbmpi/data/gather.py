"""Rows of a file or array to batches with the sample innermost."""

from __future__ import annotations

import numpy as np

from dbmpi.kernels.gather import gather_rows


def gather(rows: np.ndarray, indices: np.ndarray, scale: np.float32) -> np.ndarray:
    """Return ``rows[indices].T * scale`` as float32 ``(features, len(indices))``, C-contiguous.

    `rows` is uint8 or float32 ``(n, features)``; the indices are int64 and in range.
    """
    result = np.empty((rows.shape[1], len(indices)), np.float32)
    gather_rows(rows, indices, float(scale), result)
    return result


def narrow(rows: np.ndarray) -> np.ndarray:
    """Return rows as they are kept in memory: uint8, or float32 of this machine's byte order."""
    if rows.dtype == np.uint8:
        return rows
    with np.errstate(over="ignore"):
        return rows.astype(np.float32, copy=False)
