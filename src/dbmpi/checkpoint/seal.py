"""A checksum behind the end of an HDF5 file, by which damage is found before HDF5 looks at it.

HDF5 verifies what it reads, but for the descriptions of views: damaged ones may crash it.  It ignores what follows a
file, and cuts it off where a program changes the file: such a file has no seal any more.
"""

from __future__ import annotations

import os
import zlib

from dbmpi.checkpoint.checksums import read_at

_MARK = b"dbmpi seal "
_LENGTH = len(_MARK) + 8
_AT_ONCE = 1 << 20


def add(descriptor: int) -> None:
    """Write a seal behind the file that is open as `descriptor`, which must be readable, too."""
    size = os.fstat(descriptor).st_size
    os.pwrite(descriptor, _MARK + b"%08x" % _sum(descriptor, size), size)


def is_broken(descriptor: int) -> bool:
    """Return whether the file that is open as `descriptor` has a seal, and is not what was sealed."""
    size = os.fstat(descriptor).st_size - _LENGTH
    if size < 0:
        return False
    found = os.pread(descriptor, _LENGTH, size)
    return found.startswith(_MARK) and found != _MARK + b"%08x" % _sum(descriptor, size)


def _sum(descriptor: int, size: int) -> int:
    total, buffer = 0, memoryview(bytearray(min(size, _AT_ONCE)))
    for start in range(0, size, _AT_ONCE):
        part = buffer[: size - start]
        read_at(descriptor, start, part)
        total = zlib.crc32(part, total)
    return total
