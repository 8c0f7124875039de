"""Which checkpoints of a run are whole, which of them stay, and which is left where a run cannot write."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dbmpi.checkpoint import directory, leftovers
from dbmpi.checkpoint.judge import Criterion
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.errors import UserError


class Whole(NamedTuple):
    """A checkpoint that can be read; they sort by age."""

    created: str
    step: int
    path: Path
    test_value: float | None = None
    """The run's metric in the last evaluation before it, if there was one."""
    test_step: int = 0
    """Step of that."""
    criterion: Criterion = Criterion()
    """By which number the run compares evaluations."""


def whole(folder: Path) -> list[Whole]:
    """Return the checkpoints in the directory `folder` that can be read, the newest first."""
    found = []
    for path in directory.checkpoints(folder) if folder.is_dir() else ():
        with suppress(UserError, OSError):
            found.append(read(path))
    return sorted(found, reverse=True)


def read(path: Path, criterion: Criterion | None = None) -> Whole:
    """Read a checkpoint, once in each state of its files; raises UserError or OSError if that is impossible.

    Parameters
    ----------
    path
        Of the file.
    criterion
        By which number its evaluation counts; by default that of the run that wrote it.
    """
    return _read(path, (_state(path), *sorted(map(_state, directory.shard_files(path)))), criterion)


def _state(file: Path) -> tuple[str, int, int, int, int]:
    status = file.stat()
    return file.name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1024)
def _read(path: Path, state: tuple[object, ...], criterion: Criterion | None) -> Whole:
    """Read a checkpoint in a `state` of its files: a run asks for all of them whenever it has written one."""
    with Checkpoint.open(path) as checkpoint:
        info = checkpoint.info
        by = criterion or Criterion.stored(info.configuration)
        value = by.value(info.test_loss, info.test_accuracy, info.test_metrics)
        return Whole(info.created, info.step, path, value, info.test_step, by)


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


def best(candidates: Iterable[Whole]) -> Whole | None:
    """Return the checkpoint with the best evaluation; None if no one has any.

    An evaluation counts for the first checkpoint after it: of several with the same one, that is closest to what was
    evaluated.

    Parameters
    ----------
    candidates
        In any order, with values of the same criterion.
    """
    tested = [
        (-one.test_value if one.criterion.higher else one.test_value, one.step - one.test_step, one)
        for one in candidates
        if one.test_value is not None
    ]
    return min(tested)[2] if tested else None


def retain(newest: Path, others: list[Whole], keep: int) -> list[Path]:
    """Let ``best`` name the best checkpoint, and delete old ones; return the deleted.

    A torn one counts for nothing, and stays: it may be worth a look.

    Parameters
    ----------
    newest
        The checkpoint that was written last.
    others
        Whole ones beside it, the newest first.
    keep
        How many of all stay: the newest ones, and the best one.
    """
    others = [other for other in others if other.path.name != newest.name]
    try:
        last = read(newest)
        # Sessions before may have compared by another number.
        same = [other if other.criterion == last.criterion else read(other.path, last.criterion) for other in others]
        found = best([*same, last])
    except (UserError, OSError):  # the others may be needed
        return []
    if found is not None and directory.read_pointer(newest.parent, directory.BEST) != found.path:
        directory.replace_pointer(found.path, directory.BEST)
    older = [other.path for other in others[max(keep, 1) - 1 :] if found is None or other.path != found.path]
    for path in older:
        leftovers.remove(path)
    return older
