"""Samples that are made of what a file holds when they are read: columns of a table, sparse rows, texts, several files.

Each is a :class:`Derived`, whose values are :class:`Rows`: what is read looks like a dataset of one row a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbmpi.data.hdf5 import Dataset

Selection = slice | np.ndarray
"""Of rows: a range, or numbers in increasing order."""


class Rows:
    """What a derived dataset gives: a shape, a type, and rows.

    Parameters
    ----------
    shape
        With the sample first.
    dtype
        Of the elements.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = tuple(int(length) for length in shape), dtype

    @property
    def scattered(self) -> bool:
        """Whether scattered rows are read about as fast as consecutive ones."""
        return False

    @property
    def any_order(self) -> bool:
        """Whether they may be asked for in any order, and several times."""
        return False

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        """Return some rows, ``(rows, *sample)``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Derived(Dataset):
    """A dataset that is made of others; it has no attributes but those that are given."""

    values: Any
    """:class:`Rows`, or an array."""
    parts: tuple[Dataset, ...] = ()
    """The datasets of HDF5 that are read for it."""
    attributes: Mapping[str, Any] | None = None
    """That count for it."""
    notes: tuple[str, ...] = ()
    """What the user may want to know."""
    columns: tuple[str, ...] = ()
    """Names of the inputs, if they have some."""
    byte_scale: float | None = None
    """Factor on bytes; None for that of pixels."""
    stored = False
    """No attribute of HDF5 says what the values stand for."""

    def attribute(self, key: str) -> Any:
        """Return the attribute called `key`, or None where there is none."""
        return (self.attributes or {}).get(key)

    @property
    def scattered(self) -> bool:
        """Whether scattered rows are read about as fast as consecutive ones."""
        return isinstance(self.values, Rows) and self.values.scattered

    @property
    def any_order(self) -> bool:
        """Whether they may be asked for in any order, and several times."""
        return isinstance(self.values, Rows) and self.values.any_order

    @property
    def file_bytes(self) -> int:
        """Size of the files."""
        return max((part.file_bytes for part in self.parts), default=0)

    def read(self, selection: Any) -> np.ndarray:
        """Return the values of a `selection`; Damaged where a file is damaged."""
        with self.damage():
            return np.asarray(self.values[selection])

    def check_storage(self, memory_bytes: int) -> None:
        """Refuse what :meth:`Dataset.check_storage` does for each of the parts, with so many `memory_bytes`."""
        for part in self.parts:
            part.check_storage(memory_bytes)
