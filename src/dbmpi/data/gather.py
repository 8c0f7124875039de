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
    if rows.dtype in (np.uint8, np.float32):
        return rows
    with np.errstate(over="ignore"):
        return rows.astype(np.float32, copy=False)


def taken(rows: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
    """Return the `rows` at some `positions`, or as they are."""
    found: np.ndarray = rows if positions is None else rows[positions]
    return found


def innermost(rows: np.ndarray, positions: np.ndarray | None, factor: float = 1.0) -> np.ndarray:
    """Return the `rows` (n, features) at some `positions` as (features, samples), times a `factor`."""
    return gather(rows, np.arange(len(rows)) if positions is None else positions, np.float32(factor))
