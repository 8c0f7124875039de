"""Finding a dataset inside of a file by its name: links within the file are followed, others are refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import h5py

from dbmpi.checkpoint.untrusted import damage, elsewhere, lies_inside, link
from dbmpi.data.hdf5 import Dataset
from dbmpi.errors import UserError

_MOST_LINKS = 16
"""Soft links on the way to one dataset; more are taken for a circle."""
_SHOWN = 8
_MOST_SEEN = 200
"""Members of a file that are visited for a suggestion."""


def find(path: Path, file: h5py.File, name: str, setting: str = "") -> Dataset:
    """Return a dataset that lies in this very file.

    Parameters
    ----------
    path, file
        The file, open.
    name
        Name or path of the dataset in it, e.g. ``"/entry/data/x"``.
    setting
        Of the configuration, by which another dataset can be named.

    Raises
    ------
    UserError
        If there is no such dataset, or the way there or its values leave the file.
    """
    with damage(path, f"dataset {name!r}"):
        found = _resolved(path, file, name, setting)
        if isinstance(found, h5py.Group):
            sparse = any(key in found.attrs for key in ("MATLAB_sparse", "h5sparse_format")) or _sparse(found)
            kind = "a sparse matrix; store it densely" if sparse else f"a group that holds {_members(found)}"
            raise UserError(f"{path}: {name!r} is {kind}; expected a dataset{_way_on(setting, found)}")
        if not isinstance(found, h5py.Dataset):
            raise UserError(f"{path}: {name!r} is a {type(found).__name__.lower()}; expected a dataset")
        dataset = Dataset(path, name, found)
        if elsewhere(found):
            raise dataset.error(
                f"{elsewhere(found)}: its values lie in other files, which are not followed; copy them into one file, "
                f"e.g. with h5py: new[{name!r}] = old[{name!r}][...]"
            )
        return dataset


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


def _resolved(path: Path, file: h5py.File, name: str, setting: str) -> Any:
    """Return the object that a name stands for.  Each step of the way is checked before it is taken."""
    node: Any = file
    todo, links = _steps(name), 0
    walked: list[str] = []
    while todo:
        part = todo.pop(0)
        kind = link(node, part)
        if kind is None:
            expected = f"; expected {name!r}" + _way_on(setting, file)
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
                f"file, e.g. with h5py: del file[{name!r}]; file[{name!r}] = other['...'][...]"
            )
        node = node[part]
        walked.append(part)
    return node


def _steps(name: str) -> list[str]:
    return [step for step in name.split("/") if step not in ("", ".")]


def _way_on(setting: str, group: h5py.Group) -> str:
    if not setting:
        return ""
    datasets = _datasets(group)
    found = f", one of {', '.join(datasets)}" if datasets else ""
    return f"; name the dataset by {setting}{found}"


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


def _sparse(group: h5py.Group) -> bool:
    return {"data", "indices", "indptr"} <= set(group) or {"data", "ir", "jc"} <= set(group)
