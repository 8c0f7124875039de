"""Checksums of what a checkpoint holds: a CRC-32 for every block of every dataset, so that any range can be verified.

``/checksums/<path>`` belongs to ``/<path>``.  Its n-th number is the CRC-32 (that of zlib) of the text
``<path> <dtype> <shape>``, e.g. ``parameters/dense1/bias <f4 (500,)``, followed by the n-th block of `BLOCK` bytes of
the dataset, as they lie in the file.  Because of the text, arrays that were exchanged or reshaped differ, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

try:  # the same numbers, found about ten times as fast
    from zlib_ng.zlib_ng import crc32
except ImportError:  # on a rare processor
    from zlib import crc32

GROUP = "checksums"
BLOCK = 2**18
"""Bytes that have a checksum of their own; the last block of an array is smaller."""


_PIECE = 16 * BLOCK
"""Bytes that are read before they are verified: whole blocks."""


class Mismatch(Exception):
    """The first and last byte of a block that is not what was written."""


class WrittenSums:
    """The checksums of an array that is being written, in ranges of any order.

    Parameters
    ----------
    path, dtype, shape
        Of the dataset.
    """

    def __init__(self, path: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._start = start(path, dtype, shape)
        self._nbytes = math.prod(shape) * dtype.itemsize
        blocks = -(-self._nbytes // BLOCK)
        self._sums = np.zeros(blocks, np.uint32)
        self._known = np.zeros(blocks, bool)

    def wrote(self, offset: int, data: memoryview) -> None:
        """Note that the bytes `data` were written from `offset` of the array on."""
        stop = offset + len(data)
        if not len(data):
            return
        first, last = -(-offset // BLOCK), stop // BLOCK
        if stop == self._nbytes:
            last = len(self._sums)
        # Of a block that is written in parts the sum is not known before all of them are there.
        self._known[offset // BLOCK : -(-stop // BLOCK)] = False
        for block in range(first, last):
            here = block * BLOCK - offset
            self._sums[block] = crc32(data[here : here + BLOCK], self._start)
            self._known[block] = True

    @property
    def found(self) -> np.ndarray:
        """The sums of all blocks, once they are complete."""
        assert self._known.all()
        return self._sums

    def complete(self, descriptor: int, offset: int) -> np.ndarray:
        """Return the sums of all blocks, uint32; those that were written in parts are read back from the file.

        `descriptor` is that of the open file, in which the complete array begins at `offset`.
        """
        buffer = memoryview(bytearray(min(BLOCK, self._nbytes)))
        for block in np.flatnonzero(~self._known).tolist():
            part = buffer[: self._nbytes - block * BLOCK]
            read_at(descriptor, offset + block * BLOCK, part)
            self._sums[block] = crc32(part, self._start)
        self._known[:] = True
        return self._sums


class StoredArray:
    """The bytes of a dataset in an open file, verified as they are read.

    Parameters
    ----------
    descriptor
        Returns that of the open file.
    offset
        Where the dataset begins in it.
    size
        Bytes of the dataset.
    begin, sums
        What :func:`start` returns, and the sums of its blocks; None where the file has none.
    file
        Its name, for messages, where it is another than the checkpoint.
    """

    def __init__(
        self,
        descriptor: Callable[[], int],
        offset: int,
        size: int,
        begin: int = 0,
        sums: np.ndarray | None = None,
        file: str = "",
    ) -> None:
        self._descriptor, self._offset, self.size = descriptor, offset, size
        self._where = f" in {file}" if file else ""
        self._start, self._sums = begin, sums
        self._verified = np.full(0 if sums is None else len(sums), False)

    def read(self, first: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `first` on; every block that they meet is verified once.

        Raises
        ------
        Mismatch
            If a block is not what was written.
        OSError
            If the file cannot be read.
        """
        stop, here = first + len(out), first
        # Piece by piece, so that the disk reads on while the piece before is verified, which a cache still holds.
        while here < stop:
            end = min(here - here % _PIECE + _PIECE, stop)
            self.fill(here, out[here - first : end - first])
            if self._sums is not None:
                self._verify_read(first, here, end, out)
            here = end

    def fill(self, first: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `first` on, unverified; the disk begins to read what follows them."""
        descriptor, at = self._descriptor(), self._offset + first
        if hasattr(os, "posix_fadvise") and len(out) == _PIECE:
            os.posix_fadvise(descriptor, at + len(out), _PIECE, os.POSIX_FADV_WILLNEED)
        read_at(descriptor, at, out)

    def _verify_read(self, first: int, start: int, stop: int, out: memoryview) -> None:
        """Verify what was read from `start` to `stop` into `out`, which begins with the byte `first`."""
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            begin, end = block * BLOCK, min((block + 1) * BLOCK, self.size)
            if not self._verified[block]:
                self._verify(block, out[begin - first : end - first] if start <= begin and end <= stop else None)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read and verify the part numbered `part` of `parts` equal ones of the array; raises as :meth:`read` does."""
        blocks = len(self._verified)
        first, last = blocks * part // parts, blocks * (part + 1) // parts
        buffer = memoryview(bytearray(min(_PIECE, self.size)))
        for start in range(first, last, _PIECE // BLOCK):
            stop = min(start + _PIECE // BLOCK, last)
            if not self._verified[start:stop].all():
                begin = start * BLOCK
                piece = buffer[: min(stop * BLOCK, self.size) - begin]
                self.fill(begin, piece)
                self._verify_read(begin, begin, begin + len(piece), piece)

    def _verify(self, block: int, data: memoryview | None) -> None:
        """Compare a block with its sum; it is read where `data` is None."""
        assert self._sums is not None
        start, end = block * BLOCK, min((block + 1) * BLOCK, self.size)
        if data is None:
            data = memoryview(bytearray(end - start))
            self.fill(start, data)
        if crc32(data, self._start) != self._sums[block]:
            raise Mismatch(f"its bytes {start:,} to {end - 1:,}{self._where} are not those that were written")
        self._verified[block] = True


def start(path: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Return the CRC-32 that those of the blocks of the dataset at `path`, with this `dtype` and `shape`, continue."""
    return crc32(f"{path} {dtype.str} {shape}".encode())


def read_at(descriptor: int, offset: int, out: memoryview) -> None:
    """Fill `out` from the bytes at `offset` of the file open as `descriptor`."""
    while out:
        count = os.preadv(descriptor, [out], offset)
        if count == 0:
            raise OSError("the file ends in the middle of an array")
        out, offset = out[count:], offset + count
