"""Finding a dataset inside of a file by its name: links within the file are followed, others are refused."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import h5py

from dbmpi.checkpoint.untrusted import damage, elsewhere, lies_inside, link
from dbmpi.data.hdf5 import Dataset
from dbmpi.data.sparse import is_sparse, sparse_matrix
from dbmpi.data.tables import array_elements, frame_columns, is_frame, is_frame_table, table_columns
from dbmpi.data.texts import categorical, is_categorical, matlab_text
from dbmpi.data.virtual import VirtualDataset, is_virtual
from dbmpi.errors import UserError

ANY_BYTES = 2**62
"""More than there is."""
_MOST_LINKS = 16
"""Soft links on the way to one dataset; more are taken for a circle."""
_SHOWN = 8
_MOST_SEEN = 200
"""Members of a file that are visited for a suggestion."""


def find(
    path: Path,
    file: h5py.File,
    name: str,
    setting: str = "",
    *,
    leave_out: Collection[str] = (),
    memory_bytes: int = ANY_BYTES,
) -> Dataset:
    """Return a dataset that lies in this very file, or beside it where it is virtual.

    Parameters
    ----------
    path, file
        The file, open.
    name
        Name or path of the dataset in it, e.g. ``"/entry/data/x"``, or of a column, ``"table/x"``.
    setting
        Of the configuration, by which another dataset can be named.
    leave_out
        Columns that a whole table does not stand for, as :func:`home` returns them.
    memory_bytes
        Most that a sparse matrix may take in memory.

    Raises
    ------
    UserError
        If there is no such dataset, or the way there or its values leave the file.
    """
    with damage(path, f"dataset {name!r}"):
        found, column = _resolved(path, file, name, setting)
        shown = name[: -len("/".join(column))].rstrip("/") if column else name
        if isinstance(found, h5py.Group):
            if is_frame(found):
                return frame_columns(path, shown, found, "/".join(column), leave_out)
            if is_frame_table(found) and isinstance(link(found, "table"), h5py.HardLink):
                found = found["table"]
            elif is_categorical(found):
                return categorical(path, name, found, lambda part: part.check_storage(memory_bytes))
            elif is_sparse(found):
                return sparse_matrix(path, name, found, memory_bytes)
            else:
                raise UserError(f"{path}: {name!r} is {_described(found)}; expected a dataset{_way_on(setting, found)}")
        if not isinstance(found, h5py.Dataset):
            raise UserError(f"{path}: {name!r} is a {type(found).__name__.lower()}; expected a dataset")
        dataset = VirtualDataset(path, shown, found) if is_virtual(found) else Dataset(path, shown, found)
        if elsewhere(found) and not is_virtual(found):
            raise dataset.error(
                f"{elsewhere(found)}: its values lie in other files, which are not followed; copy them into one file, "
                f"e.g. with h5py: new[{name!r}] = old[{name!r}][...]"
            )
        return _understood(dataset, column, leave_out, setting)


def _understood(dataset: Dataset, column: tuple[str, ...], leave_out: Collection[str], setting: str) -> Dataset:
    """Return a dataset as numbers or texts, one a sample, where its type is none of those."""
    kind = dataset.values.dtype
    if kind.names is not None and kind.kind == "V":
        if not column and setting not in ("", "data.inputs"):
            raise dataset.error(
                f'is a table of columns; name one of them, e.g. {setting} = "{dataset.name}/{kind.names[-1]}"'
            )
        way_on = f"; name columns by {setting}, e.g. ['{dataset.name}/{kind.names[0]}', ...]" if setting else ""
        return table_columns(dataset, column, leave_out, way_on=way_on)
    if kind.subdtype is not None:
        return array_elements(dataset)
    matlab = dataset.text("MATLAB_class")
    return (matlab and matlab_text(dataset, matlab)) or dataset


def home(path: Path, file: h5py.File, name: str) -> str:
    """Return the path of a column within a `file` open at `path`, for `leave_out`; empty where `name` is no column."""
    with damage(path, f"dataset {name!r}"):
        try:
            found, column = _resolved(path, file, name, "")
        except UserError:
            return ""
        if isinstance(found, h5py.Group) and is_frame_table(found):
            return f"{found.name}/table/{'/'.join(column)}" if column else ""
        return f"{found.name}/{'/'.join(column[:1] if isinstance(found, h5py.Dataset) else column)}" if column else ""


def holds(path: Path, file: h5py.File, name: str) -> bool:
    """Return whether an open `file` at `path` has a member `name`, or a link that leaves it under that name."""
    with damage(path, f"dataset {name!r}"):
        try:
            _resolved(path, file, name, "")
        except _Missing:
            return False
        except UserError:
            return True
        return True


class _Missing(UserError):
    """There is nothing of that name."""


def _resolved(path: Path, file: h5py.File, name: str, setting: str) -> tuple[Any, tuple[str, ...]]:
    """Return the object that a name stands for, and what is left of it: the column of a table.

    Each step of the way is checked before it is taken.
    """
    node: Any = file
    todo, links = _steps(name), 0
    walked: list[str] = []
    while todo:
        if (isinstance(node, h5py.Dataset) and node.dtype.names) or is_frame(node):
            return node, tuple(todo)
        if is_frame_table(node) and todo[0] != "table" and isinstance(link(node, "table"), h5py.HardLink):
            node = node["table"]
            continue
        part = todo.pop(0)
        kind = link(node, part)
        if kind is None:
            expected = f"; expected {name!r}" + _way_on(setting, file)
            what = _described(file)
            if "Keras" in what:
                raise _Missing(f"{path}: is {what}{expected}")
            raise _Missing(f"{path}: has no dataset {name!r}; found {_members(file)}{expected}")
        if isinstance(kind, h5py.SoftLink):
            links += 1
            if links > _MOST_LINKS:
                raise UserError(f"{path}: the links of {name!r} lead in a circle; store the dataset itself")
            target = str(kind.path)
            if target.startswith("/"):
                node, walked = file, []
            todo = _steps(target) + todo
            if not walked and todo and link(node, todo[0]) is None:
                raise UserError(
                    f"{path}: {name!r} is a link to {target!r}, where there is nothing; found {_members(file)}"
                    f"{_way_on(setting, file)}"
                )
            continue
        if not isinstance(kind, h5py.HardLink):
            where = f" ({kind.filename})" if isinstance(kind, h5py.ExternalLink) else ""
            raise UserError(
                f"{path}: {name!r} is a link to another file{where}, which is not followed; copy the dataset into this "
                f'file, or name that file itself, e.g. data.train = {{inputs = "other.h5:/x", targets = "y.h5:/y"}}'
            )
        node = node[part]
        walked.append(part)
    return node, ()


def _steps(name: str) -> list[str]:
    return [step for step in name.split("/") if step not in ("", ".")]


def _way_on(setting: str, group: h5py.Group) -> str:
    if not setting:
        return ""
    datasets = _datasets(group)
    found = f", one of {', '.join(datasets)}" if datasets else ""
    return f"; name the dataset by {setting}{found}"


def _described(group: h5py.Group) -> str:
    """Say what a group is, where it is known but no data."""
    if {"layer_names", "keras_version", "model_config"} & set(group.attrs) or "model_weights" in group:
        return "a model that Keras has stored, whose weights are no samples"
    if "_index" in group.attrs:
        return f"a table of anndata with the columns {_members(group)}"
    return f"a group that holds {_members(group)}"


def _members(group: h5py.Group) -> str:
    return ", ".join(map(repr, itertools.islice(group, _SHOWN))) or "nothing"


def _datasets(group: h5py.Group) -> list[str]:
    """Return the paths and shapes of some datasets, e.g. for a suggestion; hard links alone, and not for long."""
    found: list[str] = []
    todo = [group]
    seen = 0
    for here in todo:
        for key in itertools.islice(here, max(_MOST_SEEN - seen, 0)):
            seen += 1
            member = here[key] if lies_inside(here, key) else None
            if isinstance(member, h5py.Group):
                todo.append(member)
            elif isinstance(member, h5py.Dataset) and member.attrs.get("CLASS") != b"DIMENSION_SCALE":
                found.append(f"{str(member.name).lstrip('/')!r} {member.shape}")
    return found[:_SHOWN]
