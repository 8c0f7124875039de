"""Chunks whose filters are undone without HDF5, which lets one thread of a process read at a time."""

from __future__ import annotations

import zlib
from contextlib import suppress
from functools import cache
from typing import Any

import h5py
import numpy as np

from dbmpi.kernels.files import unshuffle

_DEFLATE, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE
_WORDS = (1, 2, 4, 8)


class Unknown(Exception):
    """A chunk that is not packed as expected: HDF5 says what is wrong, or knows more."""


class Packing:
    """Filters in the order in which they were applied: deflate, shuffle, or both.

    Parameters
    ----------
    filters
        Their numbers.
    itemsize
        Bytes of an element.
    nbytes
        Of a chunk when it is unpacked.
    """

    def __init__(self, filters: tuple[int, ...], itemsize: int, nbytes: int) -> None:
        self._filters, self._itemsize, self._nbytes = filters, itemsize, nbytes

    @classmethod
    def of(cls, filters: tuple[int, ...], itemsize: int, nbytes: int) -> Packing | None:
        """Return the packing by `filters` of elements of `itemsize` bytes, chunks of `nbytes`; None: HDF5 knows it."""
        return cls(filters, itemsize, nbytes) if {*filters} <= {_DEFLATE, _SHUFFLE} and itemsize in _WORDS else None

    def undone(self, packed: np.ndarray) -> np.ndarray:
        """Return the bytes of a chunk, uint8 ``(nbytes,)``.

        Parameters
        ----------
        packed
            As it lies in the file, uint8.

        Raises
        ------
        Unknown
            If it is damaged, or has another size.
        OSError
            If it is larger than it should be; HDF5 would unpack it whatever its size.
        """
        for number in reversed(self._filters):
            if number == _DEFLATE:
                packed = np.frombuffer(_inflated(packed, self._nbytes), np.uint8)
            elif len(packed) == self._nbytes:
                words = np.empty(len(packed) // self._itemsize, f"u{self._itemsize}")
                unshuffle(packed, words)
                packed = words.view(np.uint8)
            else:
                raise Unknown
        if len(packed) < self._nbytes:
            raise Unknown
        return packed


def _inflated(packed: np.ndarray, most: int) -> bytes | bytearray:
    """Return what `packed` holds, up to so many bytes."""
    fast = _libdeflate()
    if fast is not None:
        with suppress(fast.DeflateError):  # what it cannot unpack may be larger, or damaged: zlib knows
            return fast.zlib_decompress(packed, most)  # type: ignore[no-any-return]
    try:
        found = zlib.decompressobj().decompress(packed.data, most + 1)
    except zlib.error as wrong:
        raise Unknown from wrong
    if len(found) > most:
        raise OSError(f"a chunk has more than {most} bytes when it is unpacked")
    return found


@cache
def _libdeflate() -> Any:
    """Return the package of libdeflate, which takes half the time of zlib; None where it is not installed."""
    try:
        import deflate
    except ImportError:
        return None
    return deflate
