"""Try what the parameter server relies on: ``mpirun -n 2 python -m dbmpi.mpi.selftest``.

The last rank puts data into the memory of rank 0, sets a flag, and gets both back, in the ways that a run does.  Rank 0
prints one line of JSON.
"""

from __future__ import annotations

import json
import sys

from mpi4py import MPI

from dbmpi.errors import UserError
from dbmpi.mpi import transport, world
from dbmpi.mpi.window import Transport

_THREADS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}
_WAYS: dict[str, tuple[Transport, bool]] = {"shared": ("rma", True), "rma": ("rma", False), "p2p": ("p2p", False)}


def main() -> int:
    """Move data over shared memory, by RMA and by messages; return 0, or 2 if MPI cannot be started."""
    try:
        comm = world.start()
    except UserError as error:
        print(f"dbmpi: {error}", file=sys.stderr)
        return 2
    answer: dict[str, object] = {"ranks": comm.size, "thread_level": _THREADS[MPI.Query_thread()]}
    for way, (by, shared) in _WAYS.items():
        speed = transport.measure(comm, by, 0, comm.size - 1, shared=shared)
        answer[way] = {"correct": speed.correct, "shared": speed.shared, "put_gb_per_s": speed.put_bytes / 1e9}
    if comm.rank == 0:
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
