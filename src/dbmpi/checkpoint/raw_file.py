"""A file for HDF5 to write to, which never lets it see an error of the disk."""

from __future__ import annotations

import io
from typing import Any


class RawFile(io.FileIO):
    """The file that HDF5 writes to; it keeps an error instead of raising it, and writes nothing more when abandoned."""

    abandoned = False
    error: BaseException | None = None

    def check(self) -> None:
        """Raise the first error that was kept from HDF5, if there was one."""
        if self.error is not None:
            raise self.error

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view) and not self.abandoned:
            try:
                written += super().write(view[written:]) or 0
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
