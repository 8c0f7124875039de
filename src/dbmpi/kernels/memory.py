"""Arrays that are aligned, converted and flattened for kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

CACHE_LINE = 64
"""Bytes of a cache line, and of the widest vector: a vector that crosses a line costs two accesses."""
PAGE = 4096
"""Bytes after which lines fall into the same sets of the first cache again."""
SAFE = 1e12
"""Float32 between 1 / SAFE and SAFE can be squared, or used as a divisor twice, without loss of precision."""


def aligned_empty(shape: int | tuple[int, ...], dtype: Any = np.float32, line: int | None = None) -> np.ndarray:
    """Return an uninitialised C-contiguous array that starts at a cache line.

    NumPy aligns to 16 bytes only.  It requests huge pages for large arrays, and so does this function.

    Parameters
    ----------
    shape, dtype
        As NumPy's.
    line
        Number of the line in a page that the array starts at.  Large arrays of NumPy all start at the same one, so that
        a dozen of them that are read together push one another out of the first cache: give them different ones.
    """
    wanted = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64))
    period = CACHE_LINE if line is None else PAGE
    memory = np.empty(size * wanted.itemsize + period, np.uint8)
    start = ((line or 0) * CACHE_LINE - memory.ctypes.data) % period
    aligned: np.ndarray = memory[start : start + size * wanted.itemsize].view(wanted).reshape(shape)
    return aligned


def widened(target: np.ndarray, dtype: Any) -> AbstractContextManager[np.ndarray]:
    """Yield an array of `dtype` that is rounded into `target` at the end: `target` itself where that is its dtype."""
    return nullcontext(target) if target.dtype == dtype else _rounded(target, dtype)


@contextmanager
def _rounded(target: np.ndarray, dtype: Any) -> Iterator[np.ndarray]:
    wide = np.empty(target.shape, dtype)
    yield wide
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        target[...] = wide


Rows = tuple[np.ndarray, tuple[int, int]]
"""An array (maps, rows, columns, samples) as kernels take it that may be a part of a larger one: see `rows_of`."""


def rows_of(array: np.ndarray) -> Rows:
    """Return an array (maps, rows, columns, samples), which may be a part of a larger one, as kernels take it.

    A kernel is compiled once for such arrays, whether they have gaps or not, and knows that rows have none.

    Returns
    -------
    elements : 1-D array
        From the first element to the last one, with the gaps between them; the same memory.
    steps : (int, int)
        Elements from map to map, and from row to row.

    Raises
    ------
    ValueError
        If a row, columns by samples, is not one piece.
    """
    maps, rows, columns, samples = array.shape
    if array.flags.c_contiguous:
        return array.reshape(-1), (rows * columns * samples, columns * samples)
    plane, row = (stride // array.itemsize for stride in array.strides[:2])
    if array.strides[2:] != (samples * array.itemsize, array.itemsize) or not plane >= row >= columns * samples:
        raise ValueError(f"given an array {array.shape} with strides {array.strides}, expected rows without gaps")
    size = (maps - 1) * plane + (rows - 1) * row + columns * samples
    return as_strided(array, (size,), (array.itemsize,)), (plane, row)
