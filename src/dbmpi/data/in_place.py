"""Rows of datasets that lie in a file as they are in memory: the file is mapped, and rows are copied out of it.

HDF5's own selection of scattered rows takes many times longer than the rows themselves.  Where no filter changes the
bytes, it is enough to know where the dataset, or each of its chunks, begins.  All processes of a host share what is
mapped: it is the system's cache.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import h5py
import numpy as np

from dbmpi.kernels.files import copy_rows
from dbmpi.kernels.mapped import MappedFile
from dbmpi.machine import capacity

_MOST_RUNS = 1024
"""Runs of bytes of a row; where chunks cut it into more, HDF5 reads it."""
_SHORTEST = 64
"""Bytes of a run in the mean, at least; likewise."""
_MOST_BLOCKS = 1 << 26
_TRIED = 3
"""Rows that are compared with what HDF5 reads."""


class InPlace:
    """A dataset of fixed-size numbers without filters.

    Parameters
    ----------
    file
        Mapped.
    shape, dtype
        Of the dataset.
    blocks, length, runs
        Where the rows are, all inside the file, as :func:`dbmpi.kernels.files.copy_rows` takes it.
    """

    def __init__(
        self,
        file: MappedFile,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        blocks: np.ndarray,
        length: int,
        runs: np.ndarray,
    ) -> None:
        self._file, self._shape, self._dtype = file, shape, dtype
        self._blocks, self._length, self._runs = blocks, length, runs
        self._columns = [(int(column), int(stride)) for column, stride in np.unique(runs[:, :2], axis=0)]

    @classmethod
    def of(cls, values: h5py.Dataset) -> InPlace | None:
        """Return the rows of an HDF5 dataset; None where they must be read by HDF5.

        Parameters
        ----------
        values
            Open, of a file that is not written to.
        """
        if not _is_plain(values):
            return None
        place = _contiguous(values) if values.chunks is None else _chunked(values)
        if place is None:
            return None
        try:
            file = MappedFile(values.file.id.get_vfd_handle())
        except (OSError, ValueError):  # not every file system can
            return None
        blocks, length, runs = place
        if int(blocks.min()) < 0 or int(blocks.max()) + length * int(runs[:, 1].max()) > len(file.memory):
            return None  # damaged
        if values.nbytes > capacity.available() / 2:
            file.read_singly()
        found = cls(file, values.shape, values.dtype, *place)
        tried = np.unique(np.linspace(0, len(values) - 1, _TRIED).astype(np.int64))
        rows = found.rows(tried)
        return found if rows is not None and rows.tobytes() == values[tried].tobytes() else None

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self._blocks.nbytes

    def expect(self, start: int, stop: int) -> None:
        """Let the system read the rows from `start` to `stop` into its cache, without waiting for it."""
        for block in range(start // self._length, -(-stop // self._length)):
            first, last = max(start - block * self._length, 0), min(stop - block * self._length, self._length)
            for column, stride in self._columns:
                begin = int(self._blocks[block, column]) + first * stride
                self._file.expect(begin, begin + (last - first) * stride)

    def rows(self, indices: np.ndarray) -> np.ndarray | None:
        """Return some rows, in any order; None where the file has become too short for them.

        Parameters
        ----------
        indices
            Of the rows, int64, in range; repeated ones are allowed.
        """
        result = np.empty((len(indices), *self._shape[1:]), self._dtype)
        flat = result.reshape(len(indices), -1).view(np.uint8)
        indices = np.ascontiguousarray(indices, np.int64)
        copy_rows(self._file.memory, self._blocks, self._length, self._runs, indices, flat)
        return result if self._file.whole else None


def _is_plain(values: h5py.Dataset) -> bool:
    """Whether the bytes of values lie in the one file of a dataset as NumPy has them in memory."""
    properties, dtype = values.id.get_create_plist(), values.dtype
    return bool(
        values.size
        and dtype.kind in "iufb"
        and values.file.driver == "sec2"
        and not (values.is_virtual or values.external or properties.get_nfilters())
        and properties.get_layout() in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED)
        and is_as_in_memory(values)
    )


def is_as_in_memory(values: h5py.Dataset) -> bool:
    """Whether the numbers of `values` have the same bits in the file as in memory, also their byte order."""
    return bool(values.id.get_type().equal(h5py.h5t.py_create(values.dtype, logical=True)))


def _contiguous(values: h5py.Dataset) -> tuple[np.ndarray, int, np.ndarray] | None:
    offset = values.id.get_offset()
    if offset is None:
        return None
    size = math.prod(values.shape[1:]) * values.dtype.itemsize
    return np.array([[offset]], np.int64), len(values), np.array([[0, size, 0, 0, size]], np.int64)


def _chunked(values: h5py.Dataset) -> tuple[np.ndarray, int, np.ndarray] | None:
    chunk = values.chunks
    grid = [-(-length // step) for length, step in zip(values.shape, chunk, strict=True)]
    runs = _runs(values.shape[1:], chunk[1:], values.dtype.itemsize)
    if runs is None or math.prod(grid) > _MOST_BLOCKS or values.id.get_num_chunks() < math.prod(grid):
        return None
    blocks = np.full(grid, -1, np.int64)

    def note(info: Any) -> None:
        position = tuple(start // step for start, step in zip(info.chunk_offset, chunk, strict=True))
        if all(at < count for at, count in zip(position, grid, strict=True)):  # what is damaged may say anything
            blocks[position] = info.byte_offset

    try:
        values.id.chunk_iter(note)
    except (AttributeError, OverflowError):  # an old HDF5, or a damaged file
        return None
    if (blocks < 0).any():
        return None
    return blocks.reshape(grid[0], -1), chunk[0], runs


def _runs(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> np.ndarray | None:
    """Return the runs of bytes that make up a row of that `shape`, cut into parts of chunks; None for too many."""
    shape, chunk = (*shape, 1), (*chunk, 1)
    cut = max((axis for axis, (whole, part) in enumerate(zip(shape, chunk, strict=True)) if part < whole), default=0)
    inner = math.prod(shape[cut + 1 :])
    outer, grid = shape[:cut], [-(-whole // part) for whole, part in zip(shape, chunk, strict=True)]
    count = math.prod(outer) * grid[cut]
    if count > _MOST_RUNS or math.prod(shape) * itemsize < count * _SHORTEST > _SHORTEST:
        return None
    stride, found = math.prod(chunk) * itemsize, []
    for position in itertools.product(*map(range, outer), range(grid[cut])):
        start = position[cut] * chunk[cut]
        parts = [*(divmod(at, part) for at, part in zip(position[:cut], chunk[:cut], strict=True)), (position[cut], 0)]
        column = np.ravel_multi_index([block for block, _ in parts], grid[: cut + 1])
        inside = [within for _, within in parts]
        first = int(np.ravel_multi_index(inside, chunk[: cut + 1])) * inner
        target = int(np.ravel_multi_index([*position[:cut], start], shape[: cut + 1])) * inner
        length = min(chunk[cut], shape[cut] - start) * inner
        found.append((int(column), stride, first * itemsize, target * itemsize, length * itemsize))
    return np.array(found, np.int64)
