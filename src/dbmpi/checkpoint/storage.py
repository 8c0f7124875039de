"""Bytes of arrays to and from a file, and a file that HDF5 can lose without a crash.

The arrays of a checkpoint are contiguous in C order, so a range of the flat vector is a range of bytes, wherever in a
row it begins and ends: it is transferred at its offset, which HDF5 tells, with one call of the operating system and
without a copy.  HDF5 itself writes what lies around the arrays.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

_CONVERTED_AT_ONCE = 2**20


def write_at(descriptor: int, offset: int, values: np.ndarray) -> None:
    """Write the contiguous `values` to the bytes from `offset` of a file; OSError if the disk is full."""
    left = values.view(np.uint8).data
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def read_at(descriptor: int, offset: int, dtype: np.dtype[Any], out: np.ndarray) -> None:
    """Fill the contiguous vector `out` (n,) from values of `dtype` at the bytes from `offset` of a file."""
    if out.dtype == dtype:
        left = out.view(np.uint8).data
        while left:
            count = os.preadv(descriptor, [left], offset)
            if count == 0:
                raise OSError("the file ends in the middle of an array")
            left, offset = left[count:], offset + count
        return
    buffer = np.empty(min(len(out), _CONVERTED_AT_ONCE), dtype)
    for start in range(0, len(out), _CONVERTED_AT_ONCE):
        part = out[start : start + _CONVERTED_AT_ONCE]
        read_at(descriptor, offset + start * dtype.itemsize, dtype, buffer[: len(part)])
        part[:] = buffer[: len(part)]


class NewFile(io.RawIOBase):
    """A new file that h5py writes to as a file object, and that keeps an error to itself until it is asked.

    When HDF5 cannot write what it holds back until the closing, e.g. on a full disk, it is left with a file that it
    can neither close nor forget, and the process crashes, at the latest when it ends (h5py issue 914).  So HDF5 is
    told that all went well, nothing more is written, and :meth:`check` raises the error.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._position = 0
        self._size = 0
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self._error is not None:
            raise self._error

    def write_at(self, offset: int, values: np.ndarray) -> None:
        """Write the contiguous `values` to the bytes from `offset`; OSError at once."""
        write_at(self._descriptor, offset, values)
        self._size = max(self._size, offset + values.nbytes)

    def sync(self) -> None:
        """Bring the file to disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; without effect the second time."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    # What follows is called by h5py.

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        """Write at the position; an error is kept."""
        view = memoryview(data)
        if self._error is None:
            try:
                write_at(self._descriptor, self._position, np.frombuffer(view, np.uint8))
            except BaseException as error:  # also an interruption: it must not be thrown into HDF5
                self._error = error
        self._position += view.nbytes
        self._size = max(self._size, self._position)
        return view.nbytes

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read from the position; what could not be written reads as zeros."""
        view = memoryview(buffer).cast("B")
        count = min(view.nbytes, max(self._size - self._position, 0))
        data = os.pread(self._descriptor, count, self._position)
        view[:count] = data.ljust(count, b"\0")
        self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        """Give the file its size; an error is kept."""
        self._size = self._position if size is None else size
        if self._error is None:
            try:
                os.ftruncate(self._descriptor, self._size)
            except BaseException as error:
                self._error = error
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True
