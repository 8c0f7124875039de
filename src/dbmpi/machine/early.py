"""The last moment at which threads and caches can be chosen: just before NumPy, Numba or MPI is loaded.

These libraries read the environment once, when they are loaded.  Importing :mod:`dbmpi` puts a finder in front of
Python's own that does nothing but wait for the first of them, and then prepares everything.  So every entry point is
equally fast: a command, a function of the package, or any of its modules; in whatever order a program imports
them after dbmpi.  Where NumPy was loaded before dbmpi, it waits for the modules of dbmpi that compute or start MPI, and
:mod:`dbmpi.machine.environment` then does what is still possible.

It imports nothing, as it is loaded with the package itself.
"""

from __future__ import annotations

import sys

AWAITED = frozenset({"numpy", "numba", "mpi4py", "dbmpi.kernels", "dbmpi.mpi.world"})
"""Modules before which the process is prepared: the libraries, and those of dbmpi that use them."""


class _Finder:
    """Finds no module, but sees which one is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Prepare the process before the first module of `AWAITED` is loaded."""
        if name in AWAITED:
            from dbmpi.machine import environment

            environment.prepare()


_finder = _Finder()


def watch() -> None:
    """Prepare this process when it is time to; without effect the second time."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def leave() -> None:
    """Stop watching: everything is prepared, or this program does not need it."""
    if _finder in sys.meta_path:
        # A new list: an import that is going on walks through the old one, and would miss the next finder.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not _finder]
