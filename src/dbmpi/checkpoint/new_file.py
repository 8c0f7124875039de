"""A new HDF5 file that appears under its name when it is whole and on disk, and that a full disk cannot crash."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
from pathlib import Path
from typing import Any

import h5py
import numpy as np


class NewFile:
    """A file under a temporary name, until it is renamed.

    Parameters
    ----------
    path : Path
        The name that the file gets in :meth:`commit`.

    Raises
    ------
    OSError
        If no file can be made there.

    Notes
    -----
    HDF5 cannot close a file whose last blocks it cannot write: on a full disk it complains again for every open object,
    and the process crashes, at the latest when it ends (h5py issue 914).  So HDF5 is told that all went well, nothing
    more is written after an error, and :meth:`check`, which :meth:`complete` calls, raises it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = temporary_path(path)
        self._temporary.unlink(missing_ok=True)
        self._raw = _Raw(self._temporary, "x+")
        self._hdf5: h5py.File | None = None
        self._renamed = False

    def hdf5(self, **options: Any) -> h5py.File:
        """Begin the file as HDF5 with h5py's `options`; what is returned is closed here."""
        self._hdf5 = h5py.File(self._raw, "w", **options)
        return self._hdf5

    @property
    def descriptor(self) -> int:
        """Of the file, to read back what :meth:`write_at` wrote."""
        return self._raw.fileno()

    def write_at(self, offset: int, values: np.ndarray) -> None:
        """Write the contiguous `values` to the bytes from `offset`; OSError at once."""
        left = values.view(np.uint8).data
        while left:
            written = os.pwrite(self._raw.fileno(), left, offset)
            left, offset = left[written:], offset + written

    def check(self) -> None:
        """Raise the first error that HDF5 has not been told, if there was one."""
        if self._raw.error is not None:
            raise self._raw.error

    def complete(self) -> None:
        """End the file and bring it to disk."""
        assert self._hdf5 is not None
        self._hdf5.close()
        self.check()
        os.fsync(self._raw.fileno())
        self._raw.close()

    def commit(self) -> None:
        """Give the complete file its name."""
        self._temporary.replace(self.path)
        self._renamed = True
        sync(self.path.parent)

    def abort(self) -> None:
        """Leave nothing open and no temporary file; without effect after a commit or another abort."""
        if self._renamed:
            return
        self._raw.abandoned = True
        # The error that has led here is what to tell, not one more of the same disk.
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        if self._hdf5 is not None:
            self._hdf5.close()
        self._raw.close()


class _Raw(io.FileIO):
    """What HDF5 writes to; it keeps an error instead of raising it, and writes nothing any more when abandoned."""

    abandoned = False
    error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        place = 0
        while place < len(view) and not self.abandoned:
            try:
                place += super().write(view[place:]) or 0
            except BaseException as error:  # an interrupt, too, must not be thrown into HDF5
                self._fail(error)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; what could not be written reads as zeros."""
        view = memoryview(buffer).cast("B")
        count = super().readinto(view) or 0
        view[count:] = bytes(len(view) - count)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file."""
        if not self.abandoned:
            try:
                return super().truncate(size)
            except BaseException as error:
                self._fail(error)
        return size or 0

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.abandoned = True


def temporary_path(path: Path) -> Path:
    """Return the name under which `path` is written: hidden, and of no other process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for directories; there it is not needed either.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
