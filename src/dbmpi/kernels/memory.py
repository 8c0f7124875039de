"""Arrays as the processor likes them."""

from __future__ import annotations

from typing import Any

import numpy as np

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector: a vector that crosses a line costs two accesses."""


def aligned_empty(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return an uninitialised C-contiguous array that starts at a cache line.

    NumPy aligns to 16 bytes only.  It does ask for huge pages where an array is large, and so this does too.
    """
    wanted = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64))
    memory = np.empty(size * wanted.itemsize + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    aligned: np.ndarray = memory[start : start + size * wanted.itemsize].view(wanted).reshape(shape)
    return aligned
