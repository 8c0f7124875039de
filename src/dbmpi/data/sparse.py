"""Sparse matrices by rows (CSR), as anndata, 10x Genomics, MATLAB and others store them; a batch of rows is dense.

Rows of row i are ``indices[indptr[i] : indptr[i + 1]]`` with the values ``data`` at the same places.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.untrusted import attribute, lies_inside
from dbmpi.data.derived import Derived, Rows, Selection
from dbmpi.data.hdf5 import Dataset, decoded
from dbmpi.errors import UserError
from dbmpi.machine import capacity

_BY_COLUMNS = "store it by rows, e.g. with SciPy or anndata: x = x.tocsr()"
MOST_SAMPLES = 2**31


class SparseRows(Rows):
    """Rows of a sparse matrix, read from what may be datasets or arrays.

    Parameters
    ----------
    called
        What messages call it.
    shape
        Rows and columns.
    indptr
        Where each row begins and ends, ``(rows + 1,)``.
    indices, data
        Columns and values of what is not 0; anything with a `dtype` that a slice is taken of.
    """

    def __init__(self, called: str, shape: tuple[int, int], indptr: np.ndarray, indices: Any, data: Any) -> None:
        kind = data.dtype.newbyteorder("=")
        super().__init__(shape, np.dtype(np.uint8) if kind == np.bool_ else kind)
        self._called, self._indptr, self._indices, self._data = called, indptr, indices, data

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        """Return some rows, dense; UserError where a column does not exist."""
        (rows,) = selection
        numbers = np.arange(*rows.indices(self.shape[0])) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        dense = np.zeros((len(numbers), self.shape[1]), self.dtype)
        begins, ends = self._indptr[numbers], self._indptr[numbers + 1]
        counts = ends - begins
        columns, values = self._entries(begins, ends)
        if len(columns) and not 0 <= columns.min() <= columns.max() < self.shape[1]:
            wrong = columns[(columns < 0) | (columns >= self.shape[1])]
            raise UserError(
                f"{self._called}: names the column {wrong[0]} in samples {numbers[0]} ff.; expected 0 to "
                f"{self.shape[1] - 1}: damaged?"
            )
        # Several values of one place are added, as SciPy does.
        np.add.at(dense, (np.repeat(np.arange(len(numbers)), counts), columns), values)
        return dense

    def _entries(self, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns and values of some rows, one after the other."""
        counts = ends - begins
        if isinstance(self._indices, np.ndarray):
            offsets = np.cumsum(counts) - counts
            where = np.repeat(begins - offsets, counts) + np.arange(int(counts.sum()))
            return self._indices[where], self._data[where].astype(self.dtype)
        # Rows that follow one another are read together.
        cuts = np.flatnonzero(begins[1:] != ends[:-1]) + 1
        runs = [*zip([0, *cuts], [*cuts, len(begins)], strict=True)] if len(begins) else []
        parts = [slice(int(begins[first]), int(ends[last - 1])) for first, last in runs]
        columns = [np.asarray(self._indices[part]) for part in parts]
        values = [np.asarray(self._data[part]).astype(self.dtype) for part in parts]
        return np.concatenate([np.empty(0, np.int64), *columns]), np.concatenate([np.empty(0, self.dtype), *values])


@dataclass(frozen=True)
class _Members:
    """Names of the three arrays, the number of rows and columns, and whether the arrays are by rows."""

    indptr: str
    indices: str
    data: str
    shape: tuple[int, int]
    by_rows: bool


def is_sparse(group: Any) -> bool:
    """Return whether a `group` is a sparse matrix, by the names of its members."""
    return isinstance(group, h5py.Group) and any(
        all(key in group for key in keys) for keys in (("data", "indices", "indptr"), ("data", "ir", "jc"))
    )


def sparse_matrix(path: Path, name: str, group: h5py.Group, memory_bytes: int) -> Derived:
    """Return a sparse matrix as rows.

    Parameters
    ----------
    path, name
        Of the file, and of the matrix as the user calls it.
    group
        The matrix.
    memory_bytes
        Most that it may take in memory; a larger one that is stored by rows is read batch by batch.

    Raises
    ------
    UserError
        If its arrays do not fit together, or it is stored by columns and too large to be turned.
    """
    found = _members(path, name, group)
    datasets = [_dataset(path, name, group, key) for key in (found.indptr, found.indices, found.data)]
    indptr_of, indices, data = datasets
    lines = found.shape[0] if found.by_rows else found.shape[1]
    called = f"{path}: the sparse matrix {name!r}"
    if indptr_of.values.shape != (lines + 1,) or lines + 1 > MOST_SAMPLES:
        raise UserError(
            f"{called} declares {lines} {'rows' if found.by_rows else 'columns'}, but {found.indptr!r} has shape "
            f"{indptr_of.values.shape}; expected one more: damaged?"
        )
    for part in datasets:
        part.check_storage(max(memory_bytes, 1))
    capacity_left = capacity.available()
    if (lines + 1) * 8 > capacity_left:
        raise UserError(f"{called} has {lines} rows, too many for the memory; cut the file into several")
    indptr = indptr_of.read(slice(None)).astype(np.int64)
    entries = int(indices.values.shape[0])
    rising = indptr[0] == 0 and bool((np.diff(indptr) >= 0).all()) and indptr[-1] <= entries
    if data.values.shape != indices.values.shape or not rising:
        raise UserError(f"{called}: {found.indptr!r} does not fit its {entries} entries; damaged?")
    nbytes = entries * (data.values.dtype.itemsize + indices.values.dtype.itemsize)
    small = nbytes <= min(memory_bytes, capacity_left // 4)
    if not found.by_rows:
        if not small:
            raise UserError(f"{called} is stored by columns, and too large to be turned; {_BY_COLUMNS}")
        return Derived(path, name, _turned(called, found.shape, indptr, indices, data), tuple(datasets), byte_scale=1.0)
    arrays = [part.read(slice(None)) if small else _Slices(part) for part in (indices, data)]
    rows = SparseRows(called, found.shape, indptr, *arrays)
    return Derived(path, name, rows, tuple(datasets), byte_scale=1.0)


class _Slices:
    """A dataset of which slices are taken, with the checks of :meth:`Dataset.read`."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset, self.dtype = dataset, dataset.values.dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._dataset.read(part)


def _turned(called: str, shape: tuple[int, int], indptr: np.ndarray, indices: Dataset, data: Dataset) -> SparseRows:
    import scipy.sparse

    rows, values = indices.read(slice(None)).astype(np.int64), data.read(slice(None))
    if len(rows) and not 0 <= rows.min() <= rows.max() < shape[0]:
        raise UserError(f"{called}: names a row outside of 0 to {shape[0] - 1}: damaged?")
    values = values.astype(np.uint8) if values.dtype == np.bool_ else values.astype(values.dtype.newbyteorder("="))
    end = int(indptr[-1])
    turned = scipy.sparse.csc_matrix((values[:end], rows[:end], indptr), shape=shape).tocsr()
    return SparseRows(called, shape, turned.indptr.astype(np.int64), turned.indices, turned.data)


def _members(path: Path, name: str, group: h5py.Group) -> _Members:
    """Return what the matrix is, by the conventions of the programs that write some."""
    if "jc" in group:  # MATLAB: by columns, which are those of the user; absent where the matrix is 0
        rows = attribute(group, "MATLAB_sparse")
        if rows is None:
            raise UserError(f"{path}: {name!r} is a sparse matrix that does not say how many rows it has; damaged?")
        columns = _dataset(path, name, group, "jc").values.shape[0] - 1
        return _Members("jc", "ir", "data", (int(rows), columns), False)
    encoding = next((attribute(group, key) for key in ("encoding-type", "h5sparse_format") if key in group.attrs), b"")
    shape = next((attribute(group, key) for key in ("shape", "h5sparse_shape") if key in group.attrs), None)
    by_rows = not decoded(encoding or b"csr").startswith("csc")
    if shape is None and "shape" in group:
        shape = _dataset(path, name, group, "shape").read(slice(None))
        if "barcodes" in group:  # 10x Genomics: features x barcodes, by columns, of which each is a sample
            shape = shape[::-1]
    numbers = np.asarray(() if shape is None else shape)
    if numbers.shape != (2,) or numbers.dtype.kind not in "iu" or (numbers < 0).any():
        raise UserError(
            f"{path}: {name!r} is a sparse matrix that does not say its shape; expected the attribute or dataset "
            "'shape', e.g. with h5py: file[...].attrs['shape'] = (rows, columns)"
        )
    return _Members("indptr", "indices", "data", (int(numbers[0]), int(numbers[1])), by_rows)


def _dataset(path: Path, name: str, group: h5py.Group, key: str) -> Dataset:
    member = group[key] if lies_inside(group, key) else None
    if not isinstance(member, h5py.Dataset) or member.ndim != 1 or member.dtype.kind not in "iufb":
        raise UserError(f"{path}: {name!r} is a sparse matrix whose {key!r} is no array of numbers; damaged?")
    return Dataset(path, f"{name}/{key}", member)
