"""Labels as tools keep them apart from their text: categories of anndata and pandas, and characters of MATLAB."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.untrusted import LARGEST_TEXT, lies_inside
from dbmpi.data.derived import Derived, Rows, Selection
from dbmpi.data.hdf5 import Dataset, decoded
from dbmpi.data.labels import MOST_LABELS
from dbmpi.errors import UserError

_LONGEST = 4096
"""Characters of a label."""


class CharacterRows(Rows):
    """A character matrix of MATLAB, each row a text.

    Parameters
    ----------
    dataset
        UTF-16 units ``(characters, rows)``, as the file has them.
    """

    def __init__(self, dataset: Dataset) -> None:
        super().__init__((dataset.values.shape[1],), h5py.string_dtype())
        self._dataset = dataset

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        """Return some texts, without the spaces that fill the rows."""
        (rows,) = selection
        units = self._dataset.read((slice(None), rows)).T
        return _objects([_text(row).rstrip() for row in units])


class CellRows(Rows):
    """A cell array of MATLAB that holds texts.

    Parameters
    ----------
    dataset
        References ``(1, rows)`` or ``(rows, 1)``.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._axis = int(np.argmax(dataset.values.shape))
        super().__init__((dataset.values.shape[self._axis],), h5py.string_dtype())
        self._dataset = dataset

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        """Return some texts; UserError where a cell is something else."""
        (rows,) = selection
        references = self._dataset.read((0, rows) if self._axis else (rows, 0))
        file = self._dataset.values.file
        found = []
        for position, reference in enumerate(references):
            cell: Any = file[reference] if isinstance(reference, h5py.Reference) and reference else None
            text = isinstance(cell, h5py.Dataset) and decoded(cell.attrs.get("MATLAB_class", b"")) == "char"
            if not text or cell.size > _LONGEST or cell.dtype != np.uint16 or cell.is_virtual or cell.external:
                number = position if isinstance(rows, slice) else rows[position]
                raise self._dataset.error(f": cell {number} is no text of up to {_LONGEST} letters; expected labels")
            found.append("" if "MATLAB_empty" in cell.attrs else _text(cell[()].T.reshape(-1)))
        return _objects(found)


def matlab_text(dataset: Dataset, kind: str) -> Derived | None:
    """Return a character matrix or cell array of MATLAB as texts; None where the `dataset`, of that `kind`, is none."""
    values = dataset.values
    shape: tuple[int, ...] = values.shape or ()
    rows: Rows
    if kind == "char" and len(shape) == 2 and values.dtype == np.uint16 and shape[0] <= _LONGEST:
        rows = CharacterRows(dataset)
    elif kind == "cell" and len(shape) == 2 and min(shape) == 1 and h5py.check_ref_dtype(values.dtype) is not None:
        rows = CellRows(dataset)
    else:
        return None
    return Derived(dataset.path, dataset.name, rows, (dataset,))


def is_categorical(group: Any) -> bool:
    """Return whether a `group` holds categories and, for each sample, which one it has."""
    return isinstance(group, h5py.Group) and "codes" in group and "categories" in group


def categorical(
    path: Path, name: str, group: h5py.Group, check: Callable[[Dataset], None] = lambda dataset: None
) -> Derived:
    """Return categories as an enumeration, whose names are labels.

    Parameters
    ----------
    path, name
        Of the file, and of the group as the user calls it.
    group
        With the datasets `codes` and `categories`.
    check
        Called with both before anything is read.

    Raises
    ------
    UserError
        If its datasets are not what they should be.
    """
    parts = []
    for key in ("codes", "categories"):
        member = group[key] if lies_inside(group, key) else None
        if not isinstance(member, h5py.Dataset) or member.ndim != 1:
            raise UserError(f"{path}: {name!r} has categories, but its {key!r} is no list; damaged?")
        parts.append(Dataset(path, f"{name}/{key}", member))
        check(parts[-1])
    codes, categories = parts
    kind, count = categories.values.dtype, categories.values.shape[0]
    text = h5py.check_string_dtype(kind) is not None
    if codes.values.dtype.kind not in "iu" or not (text or kind.kind in "iub") or not 1 <= count <= MOST_LABELS:
        raise UserError(
            f"{path}: {name!r} has {count} categories of type {kind}, and codes of type {codes.values.dtype}; expected "
            f"1 to {MOST_LABELS} texts or whole numbers, and whole numbers"
        )
    if min(categories.values.id.get_storage_size(), count * kind.itemsize) > LARGEST_TEXT:
        raise UserError(f"{path}: the categories of {name!r} take more than {LARGEST_TEXT >> 20} MiB; shorten them")
    labels = [decoded(label) if text else label for label in categories.read(slice(None)).tolist()]
    base = codes.values.dtype.newbyteorder("=")
    if text:
        base = h5py.enum_dtype({label: code for code, label in enumerate(labels)}, basetype=base)
        return Derived(path, name, _Codes(codes, base), tuple(parts))
    given = {"labels": np.array(labels, np.int64), "classes": len(labels)}
    return Derived(path, name, _Codes(codes, base), tuple(parts), given)


class _Codes(Rows):
    """Codes of categories, of a type that knows what they are called."""

    def __init__(self, codes: Dataset, dtype: np.dtype[Any]) -> None:
        super().__init__(codes.values.shape, dtype)
        self._codes = codes

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        return self._codes.read(selection).astype(self.dtype)


def _text(units: np.ndarray) -> str:
    return np.ascontiguousarray(units, "<u2").tobytes().decode("utf-16-le", "replace")


def _objects(texts: list[str]) -> np.ndarray:
    found = np.empty(len(texts), object)
    found[:] = texts
    return found
