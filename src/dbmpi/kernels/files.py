"""Rows that lie scattered in a file that is mapped into memory."""

from __future__ import annotations

import numpy as np

from dbmpi.kernels.compile import kernel

_AT_ONCE = 1024
"""Words that stay in the first cache while their bytes are put together."""


@kernel
def copy_rows(
    memory: np.ndarray, blocks: np.ndarray, length: int, runs: np.ndarray, indices: np.ndarray, result: np.ndarray
) -> None:
    """Copy rows of an array that lies in a file in blocks of as many rows each.

    Parameters
    ----------
    memory : (bytes,) uint8 array
        The file.
    blocks : (n, columns) int64 array
        Where in the file each block begins; blocks of a line hold the same rows.
    length : int
        Rows of a block.
    runs : (runs, 5) int64 array
        The runs of bytes that make up a row: column of the block, bytes of a row in that block, first byte of the run
        in the row of the block and in the result, and its length.
    indices : (samples,) int64 array
        Each in ``0 ... n * length - 1``: they are not checked, nor are `blocks` and `runs`.
    result : (samples, bytes) uint8 array
    """
    for sample in range(len(indices)):
        block, row = divmod(indices[sample], length)
        for number in range(len(runs)):
            column, stride, first, target, count = runs[number]
            address = blocks[block, column] + row * stride + first
            source, place = memory[address : address + count], result[sample, target : target + count]
            for byte in range(count):
                place[byte] = source[byte]


@kernel
def unshuffle(packed: np.ndarray, words: np.ndarray) -> None:
    """Undo the filter "shuffle" of HDF5: first come the first bytes of all words, then the second ones, and so on.

    Parameters
    ----------
    packed : (n * itemsize,) uint8 array
    words : (n,) array of unsigned integers
        The least byte of a word is its first.
    """
    for start in range(0, len(words), _AT_ONCE):
        part = words[start : start + _AT_ONCE]
        for byte in range(words.itemsize):
            first = byte * len(words) + start
            plane, shift = packed[first : first + len(part)], np.uint64(8 * byte)
            for i in range(len(part)):
                before = np.uint64(part[i]) if byte else np.uint64(0)
                part[i] = before | np.uint64(plane[i]) << shift
