"""Which checkpoints of a run are whole, which of them stay, and which is left where a run cannot write."""

from __future__ import annotations

from collections.abc import Iterable
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
    test_loss: float | None = None
    """Of the last evaluation before it, if there was one."""
    test_step: int = 0
    """Step of that."""


def whole(folder: Path) -> list[Whole]:
    """Return the checkpoints in the directory `folder` that can be read, the newest first."""
    found = []
    for path in directory.checkpoints(folder) if folder.is_dir() else ():
        with suppress(UserError, OSError):
            found.append(read(path))
    return sorted(found, reverse=True)


def read(path: Path) -> Whole:
    """Read a checkpoint, once in each state of its file; raises UserError or OSError if that is impossible.

    Parameters
    ----------
    path
        Of the file.
    """
    status = path.stat()
    return _read(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1024)
def _read(path: Path, state: tuple[int, ...]) -> Whole:
    """Read a checkpoint in a `state` of its file: a run asks at every checkpoint, while all workers rest."""
    with Checkpoint.open(path) as checkpoint:
        info = checkpoint.info
        return Whole(info.created, info.step, path, info.test_loss, info.test_step)


def kept(folder: Path) -> str:
    """Name the newest checkpoint in the directory `folder`, for the message of a run that cannot write or continue."""
    try:
        found = whole(folder)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    return f"the last checkpoint is {found[0].path}" if found else "there is no earlier checkpoint"


def remove_unused(path: Path, identity: str = "") -> list[Path]:
    """Delete files of shards beside a checkpoint that are none of its own; return them.

    Parameters
    ----------
    path
        Of the checkpoint.  If it is there and cannot be read, its files cannot be told from others, and all stay.
    identity
        Only files with this one are deleted, if it is given.
    """
    unused = [file for file in directory.shard_files(path) if identity in ("", directory.identity_of(file))]
    if unused and path.exists():
        try:
            with Checkpoint.open(path) as checkpoint:
                own = {file.name for file in checkpoint.files}
        except UserError:
            return []
        unused = [file for file in unused if file.name not in own]
    for file in unused:
        file.unlink(missing_ok=True)
    return unused


def clean(folder: Path) -> list[Path]:
    """Delete the files that killed runs have left in the directory `folder` of checkpoints; return their names.

    Beside those that :func:`dbmpi.checkpoint.directory.clean` deletes they are files of shards that were to become
    another checkpoint of a step of which there is one.
    """
    removed = directory.clean(folder)
    for path in directory.checkpoints(folder) if folder.is_dir() else ():
        if not directory.damaged_path(path).exists():
            removed += remove_unused(path)
    return removed


def later_than(others: list[Whole], created: str) -> str:
    """Return `created`, or a moment after the newest of the others: the clock of another host may have been fast."""
    newest = max((other.created for other in others), default="")
    if created > newest:
        return created
    return (datetime.fromisoformat(newest) + timedelta(microseconds=1)).isoformat(timespec="microseconds")


def best(candidates: Iterable[Whole]) -> Whole | None:
    """Return the checkpoint with the lowest test loss; None if no one has any.

    An evaluation counts for the first checkpoint after it: of several with the same one, that is closest to what was
    evaluated.

    Parameters
    ----------
    candidates
        In any order.
    """
    tested = [(one.test_loss, one.step - one.test_step, one) for one in candidates if one.test_loss is not None]
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
    candidates = list(others)
    with suppress(UserError):
        candidates.append(read(newest))
    found = best(candidates)
    if found is not None and directory.read_pointer(newest.parent, directory.BEST) != found.path:
        directory.replace_pointer(found.path, directory.BEST)
    older = [other.path for other in others[max(keep, 1) - 1 :] if found is None or other.path != found.path]
    for path in older:
        directory.remove(path)
    return older
