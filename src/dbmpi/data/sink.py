"""The raw file below an HDF5 file that is being written."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


class Sink(io.FileIO):
    """A new file that HDF5 writes to, and that keeps an error for its owner instead of raising it.

    HDF5 cannot close a file whose last blocks it cannot write: on a full disk it would complain again for every open
    object, and once more when the program ends.  Writing therefore always seems to succeed, after an error into the
    void, and the owner asks with :meth:`check`.
    """

    def __init__(self, path: Path) -> None:
        """Make the file; raises FileExistsError if there is one."""
        super().__init__(path, "x+")
        self._abandoned = False
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raise the first error that has occurred, if any."""
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Write nothing from now on."""
        self._abandoned = True

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        place = 0
        while place < len(view) and not self._abandoned:
            try:
                place += super().write(view[place:]) or 0
            except BaseException as error:  # an interrupt, too, must not pass through HDF5
                self._fail(error)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file."""
        if not self._abandoned:
            try:
                return super().truncate(size)
            except BaseException as error:
                self._fail(error)
        return size or 0

    def synchronize(self) -> None:
        """Wait until the file is on disk."""
        os.fsync(self.fileno())

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self.abandon()


def synchronize_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk, where the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems know no fsync of a directory; the file itself has been synchronised.
        return
    finally:
        os.close(descriptor)
