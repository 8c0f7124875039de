"""Inputs that are 0 for the most part, written as a sparse matrix by rows, as anndata does."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

_CHUNK = 1 << 14
"""Entries of a chunk."""


class SparseInputs:
    """A growing sparse matrix, to which rows are assigned in their order as to a dataset.

    Parameters
    ----------
    file, name
        Where its group is made.
    features
        Number of columns.
    """

    def __init__(self, file: h5py.File, name: str, features: int) -> None:
        self._group, self._features, self._entries = file.create_group(name), features, 0
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.attrs = self._group.attrs
        self.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (0, features)})
        for part, kind in (("data", self.dtype), ("indices", np.dtype(np.int32)), ("indptr", np.dtype(np.int64))):
            self._group.create_dataset(part, (0,), kind, maxshape=(None,), chunks=(_CHUNK,))
        self._append("indptr", np.zeros(1, np.int64))

    def resize(self, rows: int, axis: int) -> None:
        """Note that there are going to be so many `rows`, which are the only `axis` that grows."""
        del axis
        self.attrs["shape"] = (rows, self._features)

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        """Append `values` (rows, features), float32: `rows` begin where the last ones ended."""
        lines, columns = np.nonzero(values)
        ends = self._entries + np.cumsum(np.bincount(lines, minlength=len(values)))
        self._append("data", values[lines, columns])
        self._append("indices", columns.astype(np.int32))
        self._append("indptr", ends)
        self._entries += len(columns)

    def _append(self, part: str, values: np.ndarray) -> None:
        dataset = self._group[part]
        start = len(dataset)
        dataset.resize(start + len(values), axis=0)
        dataset[start:] = values
