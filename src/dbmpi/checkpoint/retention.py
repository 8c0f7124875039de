"""Which checkpoints of a run are whole, which of them stay, and which is left where a run cannot write."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dbmpi.checkpoint import directory
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.errors import UserError


class Whole(NamedTuple):
    """A checkpoint that can be read; they sort by age."""

    created: str
    step: int
    path: Path


def whole(folder: Path) -> list[Whole]:
    """Return the checkpoints in the directory `folder` that can be read, the newest first."""
    found = []
    for path in directory.checkpoints(folder) if folder.is_dir() else ():
        with suppress(UserError, OSError):
            status = path.stat()
            found.append(_read(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)))
    return sorted(found, reverse=True)


@lru_cache(maxsize=1024)
def _read(path: Path, state: tuple[int, ...]) -> Whole:
    """Read a checkpoint, once in each state of its file: a run asks at every checkpoint, while all workers rest."""
    with Checkpoint.open(path) as checkpoint:
        return Whole(checkpoint.info.created, checkpoint.info.step, path)


def kept(folder: Path) -> str:
    """Name the newest checkpoint in the directory `folder`, for the message of a run that cannot write or continue."""
    try:
        found = whole(folder)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    return f"the last checkpoint is {found[0].path}" if found else "there is no earlier checkpoint"


def later_than(others: list[Whole], created: str) -> str:
    """Return `created`, or a moment after the newest of the others: the clock of another host may have been fast."""
    newest = max((other.created for other in others), default="")
    if created > newest:
        return created
    return (datetime.fromisoformat(newest) + timedelta(microseconds=1)).isoformat(timespec="microseconds")


def remove_older(newest: Path, others: list[Whole], keep: int) -> list[Path]:
    """Delete the `others`, whole checkpoints beside `newest`, but the `keep - 1` newest ones; return the deleted.

    A torn one counts for nothing, and stays: it may be worth a look.
    """
    older = [other.path for other in others if other.path.name != newest.name][max(keep, 1) - 1 :]
    for path in older:
        directory.remove(path)
    return older
