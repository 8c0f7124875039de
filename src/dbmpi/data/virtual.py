"""Virtual datasets: values that lie in other files, which are followed beside the file itself and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path

import h5py

from dbmpi.checkpoint.untrusted import damage
from dbmpi.data import hdf5
from dbmpi.data.hdf5 import Dataset

_DEEPEST = 4
"""Virtual datasets over virtual datasets."""
_MOST = 100_000
"""Pieces of one."""


class VirtualDataset(Dataset):
    """A dataset whose values HDF5 reads from others.

    HDF5 gives the fill value where a file is missing, or none was named: all are checked before anything is read.
    """

    def check_storage(self, memory_bytes: int) -> None:
        """Refuse what leaves the directory of the file, is missing, or incomplete; `memory_bytes` limit chunks."""
        with self.damage():
            _check(self, memory_bytes, 0)


def _check(dataset: Dataset, memory_bytes: int, depth: int) -> None:
    from dbmpi.data.filters import check_filters
    from dbmpi.data.links import find

    path, values = Path(dataset.path), dataset.values
    pieces = values.virtual_sources()
    if depth == _DEEPEST or len(pieces) > _MOST:
        raise dataset.error(f"is virtual, in {len(pieces)} pieces and {depth} levels; expected fewer: copy it")
    covered, shapes = 0, dict[tuple[str, str], tuple[int, ...]]()
    for piece in pieces:
        try:
            points = piece.vspace.get_select_npoints()
            whole = piece.src_space.get_select_type() == h5py.h5s.SEL_ALL
            wanted = None if whole else piece.src_space.shape
        except (RuntimeError, ValueError, TypeError):
            points = -1
        if points < 0 or "%" in piece.file_name or "%" in piece.dset_name:
            raise dataset.error(
                "is virtual over a number of files that is not fixed; write it with the shapes that there are, or name "
                "the files: data.train = 'part-*.h5'"
            )
        covered += points
        where = path if piece.file_name == "." else path.parent / piece.file_name
        key = piece.file_name, piece.dset_name
        if key not in shapes:
            _check_beside(dataset, path, where, piece.file_name)
            with hdf5.open_file(where) as file:
                found = find(where, file, piece.dset_name)
                source = found if found.stored else found.parts[0]
                shapes[key] = source.values.shape
                check_filters(source)
                if isinstance(source, VirtualDataset):
                    _check(source, memory_bytes, depth + 1)
                else:
                    source.check_storage(memory_bytes)
        # Of a whole source HDF5 compares only how many values it has: other rows would be made of them.
        expected, found_shape = _box(piece.vspace) if wanted is None else wanted, shapes[key]
        if len(expected) == 1 and wanted is None:
            found_shape = (math.prod(found_shape),)
        if _without_ones(found_shape) != _without_ones(expected):
            raise dataset.error(
                f"is virtual over {where.name}, where {piece.dset_name!r} has shape {shapes[key]}; "
                f"expected {expected}: write it anew"
            )
    total = math.prod(values.shape)
    if covered < total:
        raise dataset.error(
            f"is virtual, and {total - covered} of its {total} values lie in no file; write it with the shape that "
            "there is"
        )


def _check_beside(dataset: Dataset, path: Path, where: Path, name: str) -> None:
    with damage(path, f"dataset {dataset.name!r}"):
        home = path.parent.resolve()
        inside = not Path(name).is_absolute() and where.resolve().is_relative_to(home)
    if name != "." and (not inside or ".." in Path(name).parts):
        raise dataset.error(
            f"is virtual over {name!r}, which is not beside {path.name}; files elsewhere are not followed: name them, "
            f"e.g. data.train = [{str(name)!r}]"
        )
    if not where.is_file():
        raise dataset.error(f"is virtual over {name!r}, which is not there; expected it beside {path.name}")


def _box(space: h5py.h5s.SpaceID) -> tuple[int, ...]:
    """Return the shape of what is selected in a `space`; how many values, where that has no shape."""
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return tuple(int(length) for length in space.shape)
    if not space.is_regular_hyperslab():
        return (int(space.get_select_npoints()),)
    _, _, counts, blocks = space.get_regular_hyperslab()
    return tuple(int(count) * int(block) for count, block in zip(counts, blocks, strict=True))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def is_virtual(values: h5py.Dataset) -> bool:
    """Return whether `values` are read from other datasets."""
    return bool(values.is_virtual)
