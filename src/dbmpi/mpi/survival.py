"""Try what a rank's death does: ``mpirun -n 3 python -m dbmpi.mpi.survival``.

The last rank kills itself.  Where this MPI lets the others live and tells them, rank 0 prints one line of JSON; where
it does not, they end with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from dbmpi.errors import UserError
from dbmpi.mpi import failures, waiting, world
from dbmpi.mpi.tags import Tag

_SECONDS = 10.0


def main() -> int:
    """Let the last rank die, and wait for MPI's report of it; return 0, or 2 if MPI cannot be started."""
    try:
        comm = world.start()
    except UserError as error:
        print(f"dbmpi: {error}", file=sys.stderr)
        return 2
    waiting.barrier(comm, "the other ranks")
    if comm.rank == comm.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)

    def reported() -> bool:
        failures.probe(comm, Tag.DEPARTURE)  # MPI hears of a death when it is entered
        return bool(failures.dead(comm))

    waiting.until(reported, "MPI to report a rank that has died", seconds=_SECONDS)
    if comm.rank == 0:
        print(json.dumps({"dead": failures.dead(comm)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
