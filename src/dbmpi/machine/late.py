"""What can still be done where NumPy or Numba was loaded before dbmpi, and what is lost.

They have read the environment already.  OpenBLAS's number of threads can still be changed by its own functions, and
Numba's by its configuration; which kernels OpenBLAS uses, and how long its idle threads spin, cannot.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from dbmpi.machine import openblas, threads

_FIX = "import dbmpi before numpy"


def adapt(preparation: threads.Preparation, theirs: Mapping[str, str], inherited: Mapping[str, str]) -> tuple[str, ...]:
    """Let libraries that are loaded use as many threads as this rank has; say on a line each what is lost.

    Parameters
    ----------
    preparation
        What was decided about threads.
    theirs
        The environment as the user has set it: what is in there the libraries have heeded.
    inherited
        The environment as the libraries have read it, with what dbmpi had set in a process before this one.
    """
    found: list[str] = []
    if "numba" in sys.modules:
        _set_numba(inherited)
    if "numpy" in sys.modules:
        found += _set_blas(preparation, theirs, inherited)
    return tuple(found)


def _set_numba(inherited: Mapping[str, str]) -> None:
    """Tell Numba by its configuration: it takes a changed environment for a wish to read all of it anew."""
    import numba

    ours = threads.unset("NUMBA_NUM_THREADS", "NUMBA_CACHE_DIR")
    threads.put({name: inherited[name] for name in ours if name in inherited})
    directory = ours.get("NUMBA_CACHE_DIR")
    if directory and not numba.config.CACHE_DIR:  # type: ignore[attr-defined]
        numba.config.CACHE_DIR = directory  # type: ignore[attr-defined]


def _set_blas(
    preparation: threads.Preparation, theirs: Mapping[str, str], inherited: Mapping[str, str]
) -> Iterator[str]:
    number = preparation.threads
    libraries = openblas.loaded()
    if not libraries and not any(
        name in theirs or inherited.get(name) == str(number) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    ):
        yield (
            f"NumPy was loaded before dbmpi, and its BLAS is not OpenBLAS: it may start a thread for each core in "
            f"every rank ({number} would be right): {_FIX}, or set OMP_NUM_THREADS={number}"
        )
    for library in libraries:
        # Fewer are somebody's wish; the variables were read when it was loaded.
        if library.threads > number and not any(name in theirs for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")):
            library.set_threads(number)
    if any(library.threads > 1 for library in libraries) and "OPENBLAS_THREAD_TIMEOUT" not in inherited:
        yield (
            "NumPy was loaded before dbmpi, so idle threads of OpenBLAS spin on cores that kernels need, which has "
            f"made small layers up to 100 x slower: {_FIX}, or set OPENBLAS_THREAD_TIMEOUT=4"
        )
