"""A rank that dies while MPI starts, where the others are to outlive a death: none of them ever hears of it.

Under fault tolerance Open MPI's mpirun leaves it to MPI to tell the other ranks, and these are all inside ``MPI_Init``,
where they wait for the dead one.  Nothing of Python runs there.  So `dbmpi launch` looks at the ranks of its own host
until the first one has started MPI.
"""

from __future__ import annotations

import signal
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
    complete = time.monotonic()
    while not started.exists():
        with suppress(subprocess.TimeoutExpired):
            return child.wait(_BETWEEN_LOOKS)
        if not _some_are_missing(child.pid):
            complete = time.monotonic()
        elif time.monotonic() - complete > _GRACE and not started.exists():
            sys.stderr.write("dbmpi launch: a rank has died while MPI started, and the others would wait for it\n")
            child.terminate()
            child.wait()
            return 128 + signal.SIGKILL
    return child.wait()


def _some_are_missing(mpirun: int) -> bool:
    """Whether fewer ranks live on this host than mpirun has started here, if the first one is among them."""
    living, expected, first = 0, 0, False
    with suppress(OSError):
        children = " ".join(file.read_text() for file in (_PROC / str(mpirun)).glob("task/*/children"))
        for child in children.split():
            with suppress(OSError, KeyError, ValueError):
                text = (_PROC / child / "environ").read_bytes().decode(errors="replace")
                variables = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
                expected = int(variables["OMPI_COMM_WORLD_LOCAL_SIZE"])
                living += 1
                # The ranks of a host are counted from 0 in their order: only that of the first has one that agrees.
                first |= variables["OMPI_COMM_WORLD_RANK"] == variables["OMPI_COMM_WORLD_LOCAL_RANK"]
    return first and living < expected
