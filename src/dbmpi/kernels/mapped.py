"""Files mapped into memory: one that becomes shorter is an error, and not the end of the process.

Linux sends SIGBUS to a process that touches a page of a mapped file where the file has no longer a byte, or where the
disk fails.  The handler here puts a page of zeros in its place and makes a note, so that the reader goes on, asks, and
says what happened.  Only the pages of files that were mapped here are treated so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import weakref
from functools import cache

import numpy as np

from dbmpi.kernels.llvm.bus_errors import Handler

_MOST = 1 << 16
"""Files that are mapped at a time; Linux allows about as many mappings."""
_FLAGS = 0x4 | 0x08000000
"""SA_SIGINFO | SA_ONSTACK"""


class MappedFile:
    """A file, mapped for reading.

    Parameters
    ----------
    descriptor
        Of the open file, which may be closed afterwards.  It must not be empty.

    Attributes
    ----------
    memory : (bytes,) uint8 array
        The file, read-only.  It stays mapped as long as there is this array or one made from it.

    Raises
    ------
    OSError
        If the file system cannot map it, or too many are mapped.
    """

    def __init__(self, descriptor: int) -> None:
        # Opened once more: a lock on the file that the caller opened would last as long as what is mapped.
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = mmap.mmap(own, 0, prot=mmap.PROT_READ)
        finally:
            os.close(own)
        self.memory = np.frombuffer(mapped, np.uint8)
        self._mapped, self._guard = mapped, _guard()
        self._entry = self._guard.watch(self.memory)
        weakref.finalize(mapped, self._guard.forget, self._entry)  # before its pages are given back

    @property
    def whole(self) -> bool:
        """Whether all that was read until now was there: ask when it has been read."""
        return not self._guard.table[self._entry, 2] and self._mapped.size() >= len(self.memory)

    def expect(self, start: int, stop: int) -> None:
        """Let the system read the bytes from `start` to `stop` into its cache, without waiting for it."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapped.madvise(mmap.MADV_WILLNEED, first, stop - first)

    def read_singly(self) -> None:
        """Let the system read no more than what is asked for: there is no order in it."""
        self._mapped.madvise(mmap.MADV_RANDOM)


class _Guard:
    """The handler of SIGBUS, and the table of files that it looks into."""

    def __init__(self) -> None:
        self.table = np.zeros((_MOST, 3), np.int64)
        """Of each file: its first address, the one behind its last, and whether a byte was not there."""
        self._unused, self._lock = list(reversed(range(_MOST))), threading.Lock()
        self._previous = ctypes.create_string_buffer(256)  # larger than any `struct sigaction`
        self._handler = Handler(self.table, ctypes.addressof(self._previous))
        action = _Action(self._handler.address, flags=_FLAGS)
        if ctypes.CDLL(None, use_errno=True).sigaction(signal.SIGBUS, ctypes.byref(action), self._previous):
            raise OSError(ctypes.get_errno(), "SIGBUS cannot be handled")

    def watch(self, memory: np.ndarray) -> int:
        """Handle faults in `memory` from now on, and return its place in the table."""
        with self._lock:
            if not self._unused:
                raise OSError(f"more than {_MOST} files are mapped")
            entry = self._unused.pop()
            start = memory.ctypes.data
            self.table[entry, 2] = 0
            self.table[entry, :2] = start, start + -(-len(memory) // mmap.PAGESIZE) * mmap.PAGESIZE
        return entry

    def forget(self, entry: int) -> None:
        """Let a place in the table be used again."""
        self.table[entry] = 0
        self._unused.append(entry)  # without the lock: it may be called at any time, also from `watch`


class _Action(ctypes.Structure):
    """``struct sigaction`` of Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@cache
def _guard() -> _Guard:
    """Return the guard of this process."""
    return _Guard()
