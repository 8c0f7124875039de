"""A rank that dies while MPI starts, where the others are to outlive a death: none of them ever hears of it.

Under fault tolerance Open MPI's mpirun leaves it to MPI to tell the other ranks, and these are all inside ``MPI_Init``,
where they wait for the dead one.  Nothing of Python runs there.  So `dbmpi launch` looks at the ranks of its own host
until the first one has started MPI.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_BETWEEN_LOOKS = 0.2
_GRACE = 2.0
"""Seconds that mpirun is given to end by itself, or the first rank to start."""
_PROC = Path("/proc")


def wait(child: subprocess.Popen[bytes], started: Path) -> int:
    """Wait for mpirun and return its exit code; end it if one of its ranks dies before the first has started MPI.

    Parameters
    ----------
    started
        The file that the first rank makes then, if it is on this host; otherwise nothing is looked at.
    """
    seen: dict[int, bool] = {}
    missed = 0.0
    while not started.exists():
        with suppress(subprocess.TimeoutExpired):
            return child.wait(_BETWEEN_LOOKS)
        living = _ranks(child.pid)
        seen |= living
        if not any(seen.values()) or len(living) == len(seen):
            missed = time.monotonic()
        elif time.monotonic() - missed > _GRACE and not started.exists():
            sys.stderr.write("dbmpi launch: a rank has died while MPI started, and the others would wait for it\n")
            child.terminate()
            child.wait()
            return 128 + 9
    return child.wait()


def _ranks(mpirun: int) -> dict[int, bool]:
    """Return the processes that mpirun has started on this host and that live, and whether each is the first rank."""
    found = {}
    with suppress(OSError):
        children = " ".join(file.read_text() for file in (_PROC / str(mpirun)).glob("task/*/children"))
        for child in map(int, children.split()):
            with suppress(OSError):
                variables = (_PROC / str(child) / "environ").read_bytes().split(b"\0")
                rank = next((word for word in variables if word.startswith(b"OMPI_COMM_WORLD_RANK=")), b"")
                if rank:
                    found[child] = rank == b"OMPI_COMM_WORLD_RANK=0"
    return found
