"""Finding a dataset inside of a file by its name: links within the file are followed, others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py

from dbmpi.data.hdf5 import damage
from dbmpi.errors import UserError

_MOST_LINKS = 16
"""Soft links on the way to one dataset; more are taken for a circle."""
_SHOWN = 8
_MOST_LOOKED_AT = 200
"""Members of a file that are looked at for a suggestion."""


def find(path: Path, file: h5py.File, name: str, setting: str = "") -> h5py.Dataset:
    """Return a dataset that lies in this very file, by its name or path, e.g. ``"/entry/data/x"``.

    Parameters
    ----------
    setting
        Of the configuration, by which another dataset can be named.

    Raises
    ------
    UserError
        If there is no such dataset, or the way there or its values leave the file.
    """
    with damage(path, f"dataset {name!r}"):
        return _found(path, _resolved(path, file, name, setting), name, setting)


def holds(path: Path, file: h5py.File, name: str) -> bool:
    """Return whether there is anything of this name, without following a link that leaves the file."""
    with damage(path, f"dataset {name!r}"):
        try:
            _resolved(path, file, name, "")
        except _Missing:
            return False
        except UserError:
            return True
        return True


def _found(path: Path, place: Any, name: str, setting: str) -> h5py.Dataset:
    """Return what was found, if it is a dataset whose values lie in the file."""
    if isinstance(place, h5py.Group):
        sparse = any(key in place.attrs for key in ("MATLAB_sparse", "h5sparse_format")) or _sparse(place)
        kind = "a sparse matrix; store it densely" if sparse else f"a group that holds {_members(place)}"
        raise UserError(f"{path}: {name!r} is {kind}; expected a dataset{_way_on(setting, place)}")
    if not isinstance(place, h5py.Dataset):
        raise UserError(f"{path}: {name!r} is a {type(place).__name__.lower()}; expected a dataset")
    elsewhere = "is virtual" if place.is_virtual else "has external storage" if place.external else ""
    if elsewhere:
        raise UserError(
            f"{path}: dataset {name!r} {elsewhere}: its values lie in other files, which are not followed; copy them "
            f"into one file, e.g. with h5py: new[{name!r}] = old[{name!r}][...]"
        )
    return place


class _Missing(UserError):
    """There is nothing of that name."""


def _resolved(path: Path, file: h5py.File, name: str, setting: str) -> Any:
    """Return what a name stands for.  Each step of the way is looked at before it is taken."""
    place: Any = file
    todo, links = [part for part in name.split("/") if part not in ("", ".")], 0
    walked: list[str] = []
    while todo:
        part = todo.pop(0)
        link = place.get(part, getlink=True) if isinstance(place, h5py.Group) else None
        if link is None:
            expected = f"; expected {name!r}" + _way_on(setting, file)
            raise _Missing(f"{path}: has no dataset {name!r}; found {_members(file)}{expected}")
        if isinstance(link, h5py.SoftLink):
            links += 1
            if links > _MOST_LINKS:
                raise UserError(f"{path}: the links of {name!r} lead in a circle; store the dataset itself")
            target = str(link.path)
            if target.startswith("/"):
                place, walked = file, []
            todo = [step for step in target.split("/") if step not in ("", ".")] + todo
            if not walked and not _holds_member(place, todo):
                raise UserError(
                    f"{path}: {name!r} is a link to {target!r}, where there is nothing; found {_members(file)}"
                    f"{_way_on(setting, file)}"
                )
            continue
        if not isinstance(link, h5py.HardLink):
            where = f" ({link.filename})" if isinstance(link, h5py.ExternalLink) else ""
            raise UserError(
                f"{path}: {name!r} is a link to another file{where}, which is not followed; copy the dataset into this "
                f"file, e.g. with h5py: del file[{name!r}]; file[{name!r}] = other['...'][...]"
            )
        place = place[part]
        walked.append(part)
    return place


def _holds_member(place: Any, steps: list[str]) -> bool:
    """Return whether the first step leads anywhere."""
    return not steps or (isinstance(place, h5py.Group) and place.get(steps[0], getlink=True) is not None)


def _way_on(setting: str, group: h5py.Group) -> str:
    if not setting:
        return ""
    datasets = _datasets(group)
    found = f", one of {', '.join(datasets[:_SHOWN])}" if datasets else ""
    return f"; name the dataset by {setting}{found}"


def _members(group: h5py.Group) -> str:
    return ", ".join(repr(key) for _, key in zip(range(_SHOWN), group, strict=False)) or "nothing"


def _datasets(group: h5py.Group) -> list[str]:
    """Return the paths and shapes of some datasets, e.g. for a suggestion; hard links alone, and not for long."""
    found: list[str] = []
    todo, looked_at = [group], 0
    while todo and len(found) < _SHOWN and looked_at < _MOST_LOOKED_AT:
        here = todo.pop(0)
        for key in here:
            looked_at += 1
            if looked_at > _MOST_LOOKED_AT:
                break
            member = here[key] if isinstance(here.get(key, getlink=True), h5py.HardLink) else None
            if isinstance(member, h5py.Group):
                todo.append(member)
            elif isinstance(member, h5py.Dataset) and member.attrs.get("CLASS") != b"DIMENSION_SCALE":
                found.append(f"{str(member.name).lstrip('/')!r} {member.shape}")
    return found


def _sparse(group: h5py.Group) -> bool:
    return {"data", "indices", "indptr"} <= set(group) or {"data", "ir", "jc"} <= set(group)
