"""Shared memory that a process without a launcher would leave behind for good.

Open MPI 5 makes a file in ``/dev/shm`` for the other ranks of the host, and leaves it to mpirun to remove it.  Without
mpirun nobody does, however the process ends.  Nobody needs its name either: it is removed as soon as MPI has started,
and the memory goes with the process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_SEGMENT = "sm_segment."


def remove(
    environment: Mapping[str, str], memory: Path = Path("/dev/shm"), maps: Path = Path("/proc/self/maps")
) -> list[Path]:
    """Remove the names of Open MPI's segments that this process has mapped, if it has no launcher; return them.

    Parameters
    ----------
    environment
        Under a launcher of Open MPI it names the session of PMIx.
    """
    removed: list[Path] = []
    if "OMPI_COMM_WORLD_SIZE" in environment or "PMIX_RANK" in environment:
        return removed
    with suppress(OSError):
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
        fields = [line.split(maxsplit=5) for line in lines]
        mapped = {(field[5], int(field[4])) for field in fields if len(field) == 6}
        for name, number in sorted(mapped):
            path = Path(name)
            if path.parent == memory and path.name.startswith(_SEGMENT):
                with suppress(OSError):
                    found = path.lstat()
                    if (found.st_uid, found.st_ino) == (os.geteuid(), number):
                        path.unlink()
                        removed.append(path)
    return removed
