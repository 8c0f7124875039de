"""The choices of a process before NumPy, Numba and MPI are loaded: one call, which :mod:`dbmpi.machine.early` makes.

Where NumPy or Numba was loaded before dbmpi, they have read the environment already.  OpenBLAS's number of threads can
still be changed by its own functions, and Numba's by its configuration; how long idle threads of OpenBLAS spin, cannot.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from dbmpi.errors import UserError
from dbmpi.machine import early, kernel_cache, mpi_library, openblas, threads

_SLOW = {
    "NUMBA_BOUNDSCHECK": "kernels check every index",
    "NUMBA_DEBUGINFO": "kernels are compiled for a debugger",
}
"""Numba's settings for finding mistakes, and what they cost; off where they are 0 or empty."""
_FIX = "import dbmpi before numpy"


@dataclass(frozen=True)
class Prepared:
    """What was chosen for this process."""

    line: str
    """For people, on one line."""
    losses: tuple[str, ...]
    """What makes this process slower than it could be, each on one line with the way out; empty if nothing does."""

    def __str__(self) -> str:
        return self.line


_lock = threading.RLock()
_prepared: Prepared | None = None


def prepare() -> Prepared:
    """Choose threads, MPI's settings and the caches of code for this process; return what was chosen.

    A second call returns what the first one chose.  Never raises: anything impossible becomes one of the `losses`.
    """
    global _prepared  # noqa: PLW0603 - the environment, too, belongs to the whole process
    with _lock:
        if _prepared is None:
            early.leave()
            _prepared = _prepare(dict(os.environ))
        return _prepared


def _prepare(inherited: Mapping[str, str]) -> Prepared:
    theirs = threads.without_prepared(inherited)
    on = {name: value for name in _SLOW if (value := theirs.get(name, "").strip()) not in ("", "0")}
    losses = [f"{name}={value}: {_SLOW[name]}; unset it" for name, value in on.items()]
    if (level := theirs.get("NUMBA_OPT", "")).isdecimal() and int(level) < 3:
        losses.append(f"NUMBA_OPT={level}: kernels are hardly optimised; unset it")
    loaded = {"numpy", "numba"} & sys.modules.keys()
    preparation = threads.prepare()
    kernel_cache.prepare()
    losses += kernel_cache.notes()
    with contextlib.suppress(OSError, UserError):
        keep_bytecode()
    mpi_library.prepare()
    if "numba" in loaded:
        _set_numba(inherited)
    if "numpy" in loaded:
        losses += _set_blas(preparation.threads, theirs, inherited)
    return Prepared(preparation.line, tuple(losses))


def _set_numba(inherited: Mapping[str, str]) -> None:
    """Set Numba's configuration: it takes a changed environment as a request to read all of it again."""
    import numba

    ours = threads.unset("NUMBA_NUM_THREADS", "NUMBA_CACHE_DIR")
    threads.put({name: inherited[name] for name in ours if name in inherited})
    directory = ours.get("NUMBA_CACHE_DIR")
    if directory and not numba.config.CACHE_DIR:  # type: ignore[attr-defined]
        numba.config.CACHE_DIR = directory  # type: ignore[attr-defined]


def _set_blas(number: int, theirs: Mapping[str, str], inherited: Mapping[str, str]) -> Iterator[str]:
    """Let a BLAS that is loaded use `number` threads; yield what is lost.

    `theirs` is the environment as the user has set it, which libraries that are loaded have followed; `inherited` is
    all that they have read, with what dbmpi had set in a process before this one.
    """
    libraries = openblas.loaded()
    if not libraries and not any(
        name in theirs or inherited.get(name) == str(number) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    ):
        yield (
            f"NumPy was loaded before dbmpi, and its BLAS is not OpenBLAS: it may start a thread for each core in "
            f"every rank ({number} would be right): {_FIX}, or set OMP_NUM_THREADS={number}"
        )
    for library in libraries:
        # Fewer threads are somebody's choice; the variables were read when the library was loaded.
        if library.threads > number and not any(name in theirs for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")):
            library.set_threads(number)
    if any(library.threads > 1 for library in libraries) and "OPENBLAS_THREAD_TIMEOUT" not in inherited:
        yield (
            "NumPy was loaded before dbmpi, so idle threads of OpenBLAS spin on cores that kernels need, which has "
            f"made small layers up to 100 x slower: {_FIX}, or set OPENBLAS_THREAD_TIMEOUT=4"
        )


def keep_bytecode() -> Path | None:
    """Let Python keep bytecode in the user's private directory of this node, where it has no better place.

    Without bytecode every rank compiles the sources of NumPy, Numba and dbmpi whenever it starts, which doubles the
    processor time of a start: installers such as uv leave none behind, ``PYTHONDONTWRITEBYTECODE`` is usual in images
    of containers, and an installation may belong to somebody else.

    Returns
    -------
    Path or None
        The directory; None where nothing was changed, as there is bytecode, Python writes it by itself, or a
        directory was chosen already (``PYTHONPYCACHEPREFIX``).
    """
    if sys.pycache_prefix is not None:
        return None
    # Numba stands for the libraries, as the largest one; dbmpi may be installed otherwise, e.g. from a checkout.
    sources = [spec.origin for spec in (util.find_spec("numba"), __spec__) if spec is not None and spec.origin]
    if all(map(_has_bytecode, sources)):
        return None
    directory = kernel_cache.private_directory(f"bytecode-py{sys.version_info.major}{sys.version_info.minor}")
    if directory is not None:
        sys.pycache_prefix, sys.dont_write_bytecode = str(directory), False
    return directory


def _has_bytecode(source: str) -> bool:
    """Return whether the bytecode of a source is kept beside it, or is going to be."""
    kept = Path(util.cache_from_source(source))
    writable = os.access(kept.parent if kept.parent.exists() else kept.parent.parent, os.W_OK | os.X_OK)
    return kept.exists() or (writable and not sys.dont_write_bytecode)
