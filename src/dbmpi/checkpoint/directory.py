"""The directory of a run's checkpoints: their names, ``latest`` and ``best``, and when files are deleted.

A file has its name only when it is whole: it is written under a temporary name, brought to disk, and renamed.  Where
each shard writes a file of its own, the one with the name of the checkpoint comes last, and goes first.
``latest`` and ``best`` are relative symbolic links, so that the directory can be moved; where a file system has no
links they are text files with the name in it.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from dbmpi.checkpoint.new_file import sync, temporary_path
from dbmpi.machine import processes

LATEST, BEST = "latest", "best"
POINTERS = (LATEST, BEST)
"""Names under which a directory of checkpoints has one of them a second time."""
ABANDONED_SECONDS = 600.0
"""A temporary file of an unknown process that has not changed for this long belongs to a killed run."""

_NAME = re.compile(r"step-(\d{9,18})\.h5")
_SHARD = re.compile(r"(?P<stem>step-\d{9,18})-shard-(?P<number>\d+)-of-(?P<shards>\d+)-(?P<id>[0-9a-f]{8,16})\.h5")
_NOTE = re.compile(r"\.(?P<stem>step-\d{9,18})-(?P<id>[0-9a-f]{8,16})\.begun")
_TEMPORARY = re.compile(r"\.(?:step-\d[0-9a-z-]*\.h5|latest|best)\.(?P<host>.+)-(?P<process>\d{1,9})\.tmp")


def checkpoint_path(run_directory: Path, step: int) -> Path:
    """Return the path that a run gives the checkpoint of a step: ``<run_directory>/checkpoints/step-000000123.h5``."""
    return run_directory / "checkpoints" / f"step-{step:09d}.h5"


def checkpoints_directory(path: Path) -> Path:
    """Return the directory with the checkpoints of a run directory, or `path` if it is that directory itself."""
    below = path / "checkpoints"
    return below if below.is_dir() else path


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint's `path`, or None where it is not named like a checkpoint."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def shard_path(path: Path, shard: int, shards: int, identity: str) -> Path:
    """Return the path of the file of a shard of the checkpoint `path`.

    Parameters
    ----------
    path
        Of the checkpoint.
    shard, shards
        Number of the shard, and how many there are.
    identity
        Hexadecimal digits of this checkpoint, so that one of the same step gets other files.
    """
    return path.with_name(f"{path.stem}-shard-{shard}-of-{shards}-{identity}.h5")


def is_shard_file(name: str) -> bool:
    """Return whether a file of this `name`, without a directory, is one of a shard."""
    return _SHARD.fullmatch(name) is not None


def identity_of(file: Path) -> str:
    """Return the identity in the name of the `file` of a shard; empty if it is none."""
    match = _SHARD.fullmatch(file.name)
    return match["id"] if match else ""


def shard_files(path: Path) -> list[Path]:
    """Return the files of shards of the same step as the checkpoint `path`."""
    return [file for file in path.parent.glob(f"{path.stem}-shard-*.h5") if is_shard_file(file.name)]


def whole_path(file: Path) -> Path | None:
    """Return the path of the checkpoint that the `file` of a shard was written for; None if it is not named so."""
    match = _SHARD.fullmatch(file.name)
    return file.with_name(f"{match['stem']}.h5") if match else None


def note_path(path: Path, identity: str) -> Path:
    """Return the path of the note that files of an `identity` are or were to be part of the checkpoint `path`."""
    return path.with_name(f".{path.stem}-{identity}.begun")


def notes(directory: Path) -> list[tuple[Path, str]]:
    """Return the path of the checkpoint, and the identity, of each note in a `directory`."""
    matches = [_NOTE.fullmatch(path.name) for path in directory.iterdir()] if directory.is_dir() else ()
    return [(directory / f"{match['stem']}.h5", match["id"]) for match in matches if match]


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory, the last written first."""
    found = []
    for path in directory.iterdir():
        step = step_of(path)
        if step is not None:
            try:
                found.append((path.stat().st_mtime_ns, step, path))
            except FileNotFoundError:  # deleted meanwhile by the run that writes here
                continue
    return [path for _, _, path in sorted(found, reverse=True)]


def read_pointer(directory: Path, name: str = LATEST) -> Path | None:
    """Return the file that ``latest``, or another `name`, in a `directory` names; None without a usable one.

    It need not exist.
    """
    pointer = directory / name
    try:
        if pointer.is_symlink():
            target = os.readlink(pointer)
        else:
            with pointer.open("rb") as file:
                target = file.read(256).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return directory / target if _NAME.fullmatch(target) else None


def replace_pointer(path: Path, name: str = LATEST) -> None:
    """Let ``latest``, or another `name`, name the file `path` beside it, at one stroke.

    A reader finds the old one or the new one.
    """
    pointer = path.with_name(name)
    temporary = temporary_path(pointer)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(path.name)
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        temporary.write_text(path.name + "\n", encoding="ascii")
        sync(temporary)
    temporary.replace(pointer)
    sync(path.parent)


def set_aside(path: Path) -> None:
    """Give the damaged checkpoint `path` another name, so that it counts no more and can still be examined."""
    with suppress(OSError):  # it only counts on
        path.replace(damaged_path(path))


def damaged_path(path: Path) -> Path:
    """Return the name that the checkpoint `path` gets when it is damaged."""
    return path.with_name(f"{path.name}.damaged")


def clean(directory: Path) -> list[Path]:
    """Delete the temporary files that killed runs have left in a directory of checkpoints; return their names.

    Called before a run starts to write.  A file is left alone while the process that writes it may live: on this
    host the process is looked up, on another one the file's last change decides.
    """
    removed: list[Path] = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match and _is_abandoned(path, match["host"], int(match["process"])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    if host == socket.gethostname() and (
        process == os.getpid() or not processes.lives(process, processes.started(process))
    ):
        return True
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:
        return False
