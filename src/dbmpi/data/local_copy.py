"""Copies of data files on each host's own disk, made before a run opens them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.checkpoint.new_file import temporary_path
from dbmpi.config.data import DataParts, DataPlace
from dbmpi.data.location import files_of
from dbmpi.errors import UserError
from dbmpi.machine import capacity
from dbmpi.mpi import blocking, waiting
from dbmpi.mpi.world import together

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import Run


def with_local_copies(run: Run, comm: MPI.Intracomm) -> Run:
    """Return a run that reads copies in ``data.copy_to``, which are there then (collective).

    Parameters
    ----------
    run
        The run; returned as it is where it asks for no copies.
    comm
        All ranks; the first one of each host copies.

    Raises
    ------
    UserError
        On every rank, if a file cannot be copied.
    """
    directory, data = run.data.copy_to, run.data
    if directory is None:
        return run
    node = blocking.on_this_host(comm, "the other ranks to copy the data")
    with together(comm, "copying the data", seconds=waiting.LONG_SECONDS):
        if node.rank == 0:
            for place in (data.train, data.test):
                _located(place, directory, copy=True)
    with together(comm, "finding the copies of the data"):
        found = {"train": _located(data.train, directory), "test": _located(data.test, directory)}
    blocking.free(node)
    return run.model_copy(update={"data": data.model_copy(update=found)})


def _located(place: DataPlace | None, directory: Path, *, copy: bool = False) -> DataPlace | None:
    """Return the same place among the copies, after making them if asked to."""
    if place is None:
        return None
    if isinstance(place, DataParts):
        parts = {name: _located(getattr(place, name), directory, copy=copy) for name in DataParts.model_fields}
        return place.model_copy(update=parts)
    found = []
    for within in files_of(place):
        target = copy_of(within.file, directory)
        if copy and not target.exists():
            _copy(within.file, target)
        found.append(Path(f"{target}:{within.inside}") if within.inside else target)
    return found[0] if len(found) == 1 else tuple(found)


def copy_of(file: Path, directory: Path) -> Path:
    """Return where the copy of a `file` is in a `directory`; another place once the file has changed."""
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be copied: {error.strerror}") from None
    same = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()
    return directory / f"{hashlib.sha256(same).hexdigest()[:16]}-{file.name}"


def _copy(file: Path, target: Path) -> None:
    """Copy a file; the target appears when it is whole."""
    temporary = temporary_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        size, free = file.stat().st_size, shutil.disk_usage(target.parent).free
        if size > free:
            raise UserError(
                f"{file}: takes {capacity.shown(size)}, but {capacity.shown(free)} are free in {target.parent}; set "
                "data.copy_to to another directory, or leave it out"
            )
        shutil.copyfile(file, temporary)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{file}: cannot be copied to {target.parent}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
