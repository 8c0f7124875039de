"""What a process decides before NumPy, Numba and MPI are loaded, in one call that comes by itself.

:mod:`dbmpi.machine.early` makes the call at the right moment in every program that imports dbmpi.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from dbmpi.errors import UserError
from dbmpi.machine import blas, bytecode, early, kernel_cache, late, mpi_library, threads

_SLOW = {
    "NUMBA_BOUNDSCHECK": "kernels check every index",
    "NUMBA_DEBUGINFO": "kernels are compiled for a debugger",
}
"""Numba's settings for finding mistakes, and what they cost; off where they are 0 or empty."""


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
    """Choose threads, BLAS kernel, MPI's settings and the caches of code for this process; return what was chosen.

    A second call returns what the first one chose.  Never raises: what is not possible is one of the `losses`.  The
    first process of a node takes some seconds, to compare BLAS kernels.
    """
    global _prepared  # noqa: PLW0603 - the environment, too, belongs to the whole process
    with _lock:
        if _prepared is None:
            early.leave()
            _prepared = _prepare(dict(os.environ))
        return _prepared


def _prepare(inherited: Mapping[str, str]) -> Prepared:
    theirs = threads.without_prepared(inherited)
    losses = [f"{name}={theirs[name]}: {cost}; unset it" for name, cost in _SLOW.items() if _is_on(theirs.get(name))]
    if (level := theirs.get("NUMBA_OPT", "")).isdecimal() and int(level) < 3:
        losses.append(f"NUMBA_OPT={level}: kernels are hardly optimised; unset it")
    early_enough = "numpy" not in sys.modules
    preparation = threads.prepare()
    kernel_cache.prepare()
    losses += kernel_cache.notes()
    with contextlib.suppress(OSError, UserError):
        bytecode.prepare()
    chosen = blas.prepare()
    mpi_library.prepare()
    if not early_enough or "numba" in sys.modules:
        losses += late.adapt(preparation, theirs, inherited)
    losses += chosen.losses
    return Prepared(f"{preparation.line}; {chosen}", tuple(losses))


def _is_on(value: str | None) -> bool:
    return (value or "").strip() not in ("", "0")
