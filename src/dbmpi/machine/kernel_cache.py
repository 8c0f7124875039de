"""Where compiled kernels are kept: in a directory of this node that nobody else can write to.

A home directory is often on a network, where thousands of ranks would load the same files at once, or read-only.  The
temporary directory of the node is neither, but it is open to everybody; and as Numba unpickles the index of its cache,
a directory that somebody else can write to would let them run code as us.  Therefore the directory must be ours alone.

The standard library alone, because :func:`prepare` must run before Numba is loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from dbmpi import __version__
from dbmpi.machine import threads

VARIABLE = "NUMBA_CACHE_DIR"
"""By which Numba is told where to keep compiled code."""

_notes: list[str] = []


def prepare() -> Path | None:
    """Let Numba keep its compiled code in a private directory of this node, and return it.

    A ``NUMBA_CACHE_DIR`` of the user's stays as it is, if it can be written.  Serial and threaded kernels are kept
    apart, as are machines (a node's directory may outlive the node in a cloud), Python environments and versions of
    dbmpi.

    Returns
    -------
    Path or None
        None where nothing can be written anywhere: then kernels are compiled at each start (:func:`notes`).
    """
    theirs = threads.without_prepared(os.environ)
    given = theirs.get(VARIABLE, "").strip()
    problem = _problem(Path(given)) if given else ""
    if given and not problem:
        return Path(given)
    kind = "serial" if os.environ.get("NUMBA_NUM_THREADS", "").strip() == "1" else "threads"
    place = hashlib.blake2b("\n".join((cpu_description(), sys.prefix, sys.version)).encode(), digest_size=6).hexdigest()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    directory = private_directory(f"numba-{__version__}-{python}-{place}-{kind}")
    _notes.clear()
    if directory is None:
        tried = f"{VARIABLE}={given}, " if given else ""
        _notes.append(
            f"{tried}the temporary directory and the home directory cannot be written: kernels are compiled again at "
            f"each start, on every rank; set {VARIABLE} to a directory that can be written"
        )
        return None
    if given:
        _notes.append(f"{VARIABLE}={given} {problem}: compiled kernels are kept in {directory}")
    threads.put({VARIABLE: str(directory)})
    return directory


def notes() -> tuple[str, ...]:
    """Return what there is to say about the last :func:`prepare`, a line each."""
    return tuple(_notes)


def private_directory(name: str) -> Path | None:
    """Return the directory `name` in this user's private place on this node, made if missing (mode 0700).

    The place is ``dbmpi-<user id>`` in the temporary directory (``TMPDIR``); where somebody else has taken that name,
    the one in ``XDG_RUNTIME_DIR`` or in ``~/.cache``; and where all fail, a new directory that is deleted at the end
    of the process.  None where nothing can be written anywhere.
    """
    root = _private_root()
    if root is None:
        return None
    place = root / name
    if not _make_private(place):
        try:
            place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
        except OSError:
            return None
    return place


def private_part(directory: Path, name: str) -> Path | None:
    """Return the directory `name` of this user's alone in `directory`, which others may use; made if missing (0700).

    None where there cannot be one.
    """
    part = directory / f"{name}-{os.getuid()}"
    return part if not _problem(directory) and _make_private(part) else None


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[bool]:
    """Hold the lock of a file while the block runs; gives False if another process kept it for `seconds`.

    The lock goes with the process: one that dies does not keep it.  Where files cannot be locked, there is no wait.

    Parameters
    ----------
    path
        The file, made if missing.
    seconds
        Limit on the wait.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield True
        return
    try:
        yield _lock(descriptor, seconds)
    finally:
        os.close(descriptor)


@cache
def cpu_description() -> str:
    """Return a text that tells processors apart for which different code is compiled: model and features."""
    wanted = ("model name", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part")
    lines: dict[str, str] = {"machine": platform.machine()}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as cpuinfo:
        for line in cpuinfo:
            key, _, value = line.partition(":")
            if not line.strip():
                break  # the end of the first processor
            if key.strip() in wanted:
                lines[key.strip()] = (
                    " ".join(sorted(value.split())) if "eature" in key or "flags" in key else value.strip()
                )
    return "\n".join(f"{key}: {value}" for key, value in sorted(lines.items()))


@cache
def _private_root() -> Path | None:
    """Return the user's private place on this node; see :func:`private_directory`."""
    name = f"dbmpi-{os.getuid()}"
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:
        temporary = None
    for base in (temporary, os.environ.get("XDG_RUNTIME_DIR"), os.path.expanduser("~/.cache")):
        if base and os.path.isabs(base) and _is_safe(Path(base)) and _make_private(Path(base) / name):
            return Path(base) / name
    if temporary is None:
        return None
    try:
        made = tempfile.mkdtemp(prefix=f"{name}-")
    except OSError:
        return None
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def _problem(directory: Path) -> str:
    """Return why compiled code cannot be kept in a directory, which is made if missing; empty if it can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError:
        return "cannot be written"
    return "" if _is_safe(directory) else "can be changed by other users"


def _is_safe(base: Path) -> bool:
    """Return whether nobody else can put another directory in the place of one of ours in `base`."""
    try:
        found = base.stat()
    except OSError:
        return False
    closed = bool(found.st_mode & stat.S_ISVTX) or not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return closed and found.st_uid in (0, os.getuid())


def _make_private(directory: Path) -> bool:
    """Make a directory for us alone; return whether it now is one: ours, real, writable, closed to everybody else."""
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700)
    try:
        found = directory.lstat()
    except OSError:
        return False
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    closed = not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return ours and closed and os.access(directory, os.W_OK | os.X_OK)


def _lock(descriptor: int, seconds: float) -> bool:
    """Try to lock until it works or `seconds` are over, and sleep in between."""
    deadline = time.monotonic() + seconds
    pause = 0.005
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        except OSError:
            return True  # a file system without locks
        else:
            return True
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
