"""Columns of tables: compound types, as PyTables and h5py write them, and the frames of pandas."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.untrusted import LARGEST_TEXT, lies_inside
from dbmpi.data.derived import Derived, Rows, Selection
from dbmpi.data.hdf5 import Dataset, decoded
from dbmpi.errors import UserError

_TEXTS = "SUO"


class ElementArrays(Rows):
    """Elements that are arrays, as axes of their own.

    Parameters
    ----------
    dataset
        Of a type of arrays.
    """

    def __init__(self, dataset: Dataset) -> None:
        base, shape = dataset.values.dtype.subdtype
        super().__init__((*dataset.values.shape, *shape), base)
        self._dataset = dataset

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        """Return some rows."""
        return self._dataset.read(selection)


class TableColumns(Rows):
    """Columns of a compound dataset, side by side.

    Parameters
    ----------
    dataset
        Of a compound type and one axis.
    columns
        Each the way to a column: its name, and for nested ones those below it.
    single
        Whether there is one column, which keeps its type and shape.
    """

    def __init__(self, dataset: Dataset, columns: Sequence[tuple[str, ...]], single: bool) -> None:
        self._dataset, self._columns, self._single = dataset, columns, single
        kinds, shapes = zip(*(_kind(dataset.values.dtype, column) for column in columns), strict=True)
        if single:
            super().__init__((*dataset.values.shape, *shapes[0]), kinds[0])
        else:
            width = sum(int(np.prod(shape)) for shape in shapes)
            super().__init__((*dataset.values.shape, width), np.result_type(*kinds))
        self._first = list(dict.fromkeys(column[0] for column in columns))

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        """Return some rows of the columns alone."""
        rows = Dataset(self._dataset.path, self._dataset.name, _Fields(self._dataset.values, self._first)).read(
            selection
        )
        found = []
        for column in self._columns:
            values = rows
            for name in column:
                values = values[name]
            found.append(values)
        if self._single:
            return np.ascontiguousarray(found[0])
        return np.concatenate([each.reshape(len(rows), -1).astype(self.dtype) for each in found], axis=1)


class _Fields:
    """Some fields of a compound dataset."""

    def __init__(self, dataset: h5py.Dataset, names: list[str]) -> None:
        self._view, self.file = dataset.fields(names), dataset.file

    def __getitem__(self, selection: Any) -> Any:
        return self._view[selection]


class FrameColumns(Rows):
    """Columns of the blocks of a frame that pandas has stored as ``format="fixed"``.

    Parameters
    ----------
    columns
        The block and the column within it, for each.
    single
        Whether there is one column, and its samples are single numbers.
    """

    def __init__(self, columns: Sequence[tuple[Dataset, int]], single: bool) -> None:
        self._columns, self._single = columns, single
        kind = np.result_type(*(block.values.dtype.newbyteorder("=") for block, _ in columns))
        samples = columns[0][0].values.shape[0]
        super().__init__((samples,) if single else (samples, len(columns)), kind)
        self._blocks = list({block.name: block for block, _ in columns}.values())

    def __getitem__(self, selection: tuple[Selection]) -> np.ndarray:
        """Return some rows."""
        rows = {block.name: block.read(selection) for block in self._blocks}
        found = [rows[block.name][:, column] for block, column in self._columns]
        return found[0] if self._single else np.stack([each.astype(self.dtype) for each in found], axis=1)


def array_elements(dataset: Dataset) -> Derived:
    """Return a `dataset` whose elements are arrays as one of numbers."""
    return Derived(dataset.path, dataset.name, ElementArrays(dataset), (dataset,))


def table_columns(
    dataset: Dataset, column: tuple[str, ...], leave_out: Collection[str] = (), *, way_on: str = ""
) -> Derived:
    """Return one column of a table, or all that hold numbers.

    Parameters
    ----------
    dataset
        The table.
    column
        The way to the column; empty for all.
    leave_out
        Columns that are something else, as ``/table/column``.
    way_on
        Ends a message: how other columns are named.

    Raises
    ------
    UserError
        If there is no such column, or none of numbers.
    """
    kind, where = dataset.values.dtype, str(dataset.values.name)
    if len(dataset.values.shape) != 1:
        raise dataset.error(f"is a table of shape {dataset.values.shape}; expected one row for each sample")
    if column:
        _check_column(dataset, kind, column, way_on)
        name = "/".join((dataset.name, *column))
        return Derived(dataset.path, name, TableColumns(dataset, [column], True), (dataset,), byte_scale=1.0)
    index = "pandas_type" in dataset.values.parent.attrs
    names = [name for name in kind.names if f"{where}/{name}" not in leave_out and not (index and name == "index")]
    taken = [name for name in names if kind[name].base.kind in "iufb"]
    others = [name for name in names if name not in taken]
    if not taken:
        raise dataset.error(f"is a table without columns of numbers for the inputs; found {_some(kind.names)}{way_on}")
    wide = [name for name in taken for _ in range(int(np.prod(kind[name].shape)))]
    labels = wide if len(wide) == len(taken) else []
    note = f"the columns {_some(taken)} of the table {dataset.name!r} are the inputs"
    note += f"; {_some(others)} hold no numbers and are left out" if others else ""
    rows = TableColumns(dataset, [(name,) for name in taken], False)
    return Derived(dataset.path, dataset.name, rows, (dataset,), None, (note,), tuple(labels), 1.0)


def is_frame(group: Any) -> bool:
    """Return whether a `group` is a frame that pandas has stored as ``format="fixed"``."""
    return isinstance(group, h5py.Group) and _text(group.attrs.get("pandas_type")) == "frame"


def is_frame_table(group: Any) -> bool:
    """Return whether a `group` is a frame that pandas has stored as ``format="table"``."""
    return isinstance(group, h5py.Group) and _text(group.attrs.get("pandas_type")) in (
        "frame_table",
        "appendable_frame",
    )


def frame_columns(path: Path, name: str, group: h5py.Group, column: str, leave_out: Collection[str] = ()) -> Derived:
    """Return one column of a frame of pandas, or all that hold numbers.

    Parameters
    ----------
    path, name
        Of the file, and of the frame as the user calls it.
    group
        The frame.
    column
        Its name; empty for all.
    leave_out
        Columns that are something else, as ``/frame/column``.

    Raises
    ------
    UserError
        If there is no such column, or its values are pickled, which is never read.
    """
    found: dict[str, tuple[Dataset, int] | None] = {}
    for number in range(min(int(group.attrs.get("nblocks", 0)), 1000)):
        items, values = (f"block{number}_{part}" for part in ("items", "values"))
        if not (lies_inside(group, items) and lies_inside(group, values)):
            continue
        block, labels = Dataset(path, f"{name}/{values}", group[values]), group[items]
        small = labels.dtype.kind == "S" and labels.size * labels.dtype.itemsize <= LARGEST_TEXT
        numbers = block.values.dtype.kind in "iufb" and block.values.shape[1:] == labels.shape
        for position, label in enumerate(labels[()] if small else ()):
            found[decoded(label)] = (block, position) if numbers else None
    if not found:
        raise UserError(f"{path}: {name!r} is a frame of pandas whose columns have no names that are text; {_ANEW}")
    if column and column not in found:
        raise UserError(f"{path}: the frame {name!r} has no column {column!r}; expected one of {_some([*found])}")
    if column and found[column] is None:
        raise UserError(
            f"{path}: column {column!r} of the frame {name!r} is pickled by pandas, which is never read; {_ANEW}"
        )
    where = str(group.name)
    chosen = [column] if column else [each for each in found if found[each] and f"{where}/{each}" not in leave_out]
    others = [each for each in found if not found[each] and f"{where}/{each}" not in leave_out]
    columns = [place for each in chosen if (place := found[each]) is not None]
    if not columns:
        raise UserError(f"{path}: the frame {name!r} has no columns of numbers for the inputs; found {_some([*found])}")
    note = f"the columns {_some(chosen)} of the frame {name!r} are the inputs"
    note += f"; {_some(others)} hold no numbers and are left out" if others else ""
    rows = FrameColumns(columns, bool(column))
    shown = name if not column else f"{name}/{column}"
    said, labels = ((), ()) if column else ((note,), tuple(chosen))
    return Derived(path, shown, rows, tuple(dict.fromkeys(block for block, _ in columns)), None, said, labels, 1.0)


_ANEW = "store it with to_hdf(..., format='table', data_columns=True)"


def _check_column(dataset: Dataset, kind: np.dtype[Any], column: tuple[str, ...], way_on: str) -> None:
    for depth, name in enumerate(column):
        if kind.names is None or name not in kind.names:
            table = "/".join((dataset.name, *column[:depth]))
            found = f"one of {_some(kind.names)}" if kind.names else "a column of single numbers"
            raise UserError(f"{dataset.path}: the table {table!r} has no column {name!r}; expected {found}{way_on}")
        kind = kind[name]
    if kind.names is not None:
        raise dataset.error(f": column {'/'.join(column)!r} is a table; name one of its columns, {_some(kind.names)}")


def _kind(kind: np.dtype[Any], column: tuple[str, ...]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    for name in column:
        kind = kind[name]
    native = kind.base if kind.base.kind in _TEXTS or kind.base.metadata else kind.base.newbyteorder("=")
    return native, kind.shape


def _text(value: Any) -> str:
    return "" if value is None else decoded(value)


def _some(names: Sequence[str] | None) -> str:
    found = [*(names or ())]
    return ", ".join(map(repr, found[:8])) + (" ..." if len(found) > 8 else "")
