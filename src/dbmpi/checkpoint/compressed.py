"""Arrays that are compressed by Zstandard in the file of a shard: HDF5's filter 32015, after its shuffle filter.

The bytes of a chunk are those of some blocks of checksums, which belong to what is unpacked.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.checksums import StoredArray
from dbmpi.checkpoint.untrusted import lies_inside
from dbmpi.errors import UserError

NAME = "zstd"
CHUNK = 1 << 18
"""Elements."""
_SHUFFLE, _ZSTD = 2, 32015
_LEVEL = 1
"""Of Zstandard: higher ones gain a percent of trained parameters, at several times the time."""
_MAGIC = b"\x28\xb5\x2f\xfd"


def require() -> None:
    """Make HDF5 able to pack and unpack.

    Raises
    ------
    UserError
        If the package hdf5plugin is missing.
    """
    try:
        importlib.import_module("hdf5plugin")
    except ImportError:
        raise UserError(
            "a compressed checkpoint needs the package hdf5plugin: pip install 'dbmpi[compression]', or set "
            'checkpoint.compression = "none"'
        ) from None


def create(file: h5py.File, name: str, size: int, dtype: np.dtype[Any]) -> None:
    """Create a compressed array.

    Parameters
    ----------
    file
        The open file.
    name
        Of the array.
    size, dtype
        Its number of elements, and their type.
    """
    if size == 0:
        file.create_dataset(name, (0,), dtype)
        return
    filters = {"shuffle": True, "compression": _ZSTD, "compression_opts": (_LEVEL,)}
    file.create_dataset(name, (size,), dtype, chunks=(min(CHUNK, size),), **filters)


class CompressedArray(StoredArray):
    """An array in the file of a shard; see :class:`StoredArray`.

    Parameters
    ----------
    descriptor
        Returns that of the open file.
    name
        Of the array in the file.
    dtype, elements
        Of the array.
    begin, sums, file
        As for `StoredArray`.
    """

    def __init__(
        self,
        descriptor: Callable[[], int],
        name: str,
        dtype: np.dtype[Any],
        elements: int,
        begin: int,
        sums: np.ndarray,
        file: str,
    ) -> None:
        super().__init__(descriptor, 0, elements * dtype.itemsize, begin, sums, file)
        self._name, self._dtype, self._elements = name, dtype, elements

    def fill(self, first: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `first` on, chunk by chunk."""
        if not out:
            return
        require()
        with io.FileIO(os.dup(self._descriptor()), "r") as raw, h5py.File(raw, "r") as file:
            dataset = self._checked(file)
            nbytes = dataset.chunks[0] * self._dtype.itemsize
            chunk = np.empty(dataset.chunks[0], self._dtype)
            position = first
            while position < first + len(out):
                number = position // nbytes
                start = number * dataset.chunks[0]
                values = chunk[: min(len(chunk), self._elements - start)]
                _check_frame(raw.fileno(), dataset, start, nbytes)
                dataset.read_direct(values, np.s_[start : start + len(values)])
                data = values.view(np.uint8)[position - number * nbytes :][: first + len(out) - position]
                out[position - first : position - first + len(data)] = data.data
                position += len(data)

    def _checked(self, file: h5py.File) -> h5py.Dataset:
        """Return the dataset, if it is what it should be."""
        above, dataset = file, None
        for part in self._name.split("/"):
            dataset = above[part] if lies_inside(above, part) else None
            above = dataset
        if (
            not isinstance(dataset, h5py.Dataset)
            or dataset.shape != (self._elements,)
            or dataset.dtype != self._dtype
            or dataset.chunks != (min(CHUNK, self._elements),)
            or dataset.is_virtual
        ):
            raise OSError(f"expected a compressed array of {self._elements} {self._dtype}")
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
        if filters != [_SHUFFLE, _ZSTD]:
            raise OSError(f"expected the filters shuffle and Zstandard, found {filters}")
        return dataset


def _check_frame(descriptor: int, dataset: h5py.Dataset, start: int, nbytes: int) -> None:
    """Raise OSError if a chunk would unpack to anything but `nbytes` bytes: that much memory would be taken for it.

    The size is in the first bytes of what Zstandard has packed (RFC 8878, section 3.1.1.1).
    """
    info = dataset.id.get_chunk_info_by_coord((start,))
    if info.byte_offset is None or info.filter_mask or info.size > 2 * nbytes + 2**16:
        raise OSError("a chunk is missing, too large, or not compressed")
    head = os.pread(descriptor, min(info.size, 18), info.byte_offset)
    if len(head) < 6 or head[:4] != _MAGIC:
        raise OSError("a chunk is not one of Zstandard")
    bits = head[4]
    flag, single = bits >> 6, bits >> 5 & 1
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[bits & 3]
    width = (1 if single else 0, 2, 4, 8)[flag]
    size = int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)
    if not width or size != nbytes:
        raise OSError(f"a chunk declares {size:,} bytes, expected {nbytes:,}")
