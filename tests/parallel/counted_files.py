"""A rank that counts its file-system operations up to its first step, by whose they are: ``python THIS OUT ARGUMENTS``.

Counted are Python's own calls, and files that h5py opens, each as one.  The moment at which a rank has started is the
first step of a worker, and the first look of a shard.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

FUNCTIONS = (
    *("stat", "lstat", "access", "listdir", "scandir", "mkdir", "unlink", "rename", "replace", "readlink", "link"),
    *("statvfs", "rmdir", "symlink", "utime", "chmod", "truncate"),
)
SYSTEM = ("/proc", "/sys", "/dev")
"""What the kernel makes up, and no file server sees."""

counts: Counter[str] = Counter()
switch = {"on": True}
"""Whether operations are counted."""


def whose(path: Any, frame: FrameType | None) -> str:
    """Return whose an operation is: that of an import, the kernel cache, a library or the system, or else its place."""
    place, cached = "", False
    while frame is not None:
        file = frame.f_code.co_filename
        if "importlib" in file and "metadata" not in file:
            return "imports"
        cached = cached or file.endswith(("kernels/store.py", "machine/kernel_cache.py", "core/caching.py"))
        if not place and "/dbmpi/" in file and "counted_files" not in file:
            place = f"{file.partition('/src/dbmpi/')[2] or file}:{frame.f_lineno}"
        if not place and "site-packages" in file and "h5py" not in file:
            return "libraries"
        frame = frame.f_back
    if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(SYSTEM):
        return "system"
    if cached or "blas" in place:
        return "kernel cache"
    return place or "Python"


def note(name: str, path: Any) -> None:
    if switch["on"] and (path is None or isinstance(path, str | bytes | os.PathLike)):
        owner = whose(path, sys._getframe(2))
        if owner in ("imports", "kernel cache", "libraries", "system", "Python"):
            counts[owner] += 1
        else:
            counts[f"own: {owner} {name} {Path(os.fsdecode(path)).name if path is not None else ''}"] += 1


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        note(name, arguments[0] if arguments else None)
        return function(*arguments, **more)

    return call


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        note("open", arguments[0])


def main(out: str, arguments: list[str]) -> int:
    for name in FUNCTIONS:
        setattr(os, name, counted(name, getattr(os, name)))
    sys.addaudithook(hear)
    from dbmpi.cli.main import main as command
    from dbmpi.mpi import world

    started = world.start

    def start(**more: Any) -> Any:
        comm = started(**more)
        switch["on"] = False  # these are imports, and nothing else
        import h5py

        from dbmpi.downpour import run, shard

        switch["on"] = True
        h5py.File.__init__ = counted_file(h5py.File.__init__)
        run.downpour = stop(out, comm.rank, run.downpour)
        shard.Shard.serve = stop(out, comm.rank, shard.Shard.serve)
        return comm

    world.start = start
    return command(arguments)


def counted_file(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, name: Any, *arguments: Any, **more: Any) -> Any:
        note("h5py", name)
        return function(self, name, *arguments, **more)

    return call


def stop(out: str, rank: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Write the counts when the function is called first, and count no more."""

    def call(*arguments: Any, **more: Any) -> Any:
        if switch["on"]:
            switch["on"] = False
            Path(f"{out}.{rank}").write_text(json.dumps(counts))
        return function(*arguments, **more)

    return call


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
