"""Try what the parameter server lives on: ``mpirun -n 2 python -m dbmpi.mpi.selftest``.

Every rank puts data into the memory of rank 0 and raises a flag; rank 0 looks at it and answers by a flag; everybody
gets the data back.  Rank 0 prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from mpi4py import MPI

from dbmpi.errors import UserError
from dbmpi.mpi import waiting, world
from dbmpi.mpi.window import Transport, Window

_BYTES = 4 << 20
_THREADS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


def main() -> int:
    """Run the exchange over shared memory, by RMA and by messages, and return 0 if all data arrived."""
    try:
        comm = world.start()
    except UserError as error:
        print(f"dbmpi: {error}", file=sys.stderr)
        return 2
    found: dict[str, object] = {"ranks": comm.size, "thread_level": _THREADS[MPI.Query_thread()]}
    ways: tuple[tuple[str, bool, Transport], ...] = (
        ("shared", True, "rma"),
        ("rma", False, "rma"),
        ("p2p", False, "p2p"),
    )
    for way, shared, transport in ways:
        correct, is_shared, seconds = exchange(comm, shared, transport)
        found[way] = {"correct": correct, "shared": is_shared, "put_gb_per_s": _BYTES / max(seconds, 1e-9) / 1e9}
    if comm.rank == 0:
        print(json.dumps(found), flush=True)
    return 0


def exchange(comm: MPI.Intracomm, shared: bool, transport: Transport = "rma") -> tuple[bool, bool, float]:
    """Push to rank 0 and fetch from it (collective).

    Returns
    -------
    tuple
        Whether all data arrived whole on all ranks, whether the memory was shared, and the seconds of a put.
    """
    flags, size = 8 * comm.size, comm.size * _BYTES
    with Window.allocate(comm, flags + size, shared=shared, transport=transport) as window:
        mine = flags + comm.rank * _BYTES
        sent = np.full(_BYTES // 4, comm.rank + 0.5, np.float32)
        begin = time.perf_counter()
        window.put(0, mine, sent)
        window.store(0, 8 * comm.rank, 1)
        seconds = time.perf_counter() - begin

        correct = True
        if comm.rank == 0:
            for rank in range(comm.size):
                _await(window, 8 * rank, 1, f"the flag of rank {rank}")
                window.sync()
                part = window.local[flags + rank * _BYTES : flags + (rank + 1) * _BYTES].view(np.float32)
                correct &= bool(np.all(part == rank + 0.5))
                window.store(0, 8 * rank, 2)
        else:
            _await(window, 8 * comm.rank, 2, "the answer of rank 0")
        received = np.empty_like(sent)
        window.get(0, mine, received)
        correct &= bool(np.array_equal(received, sent))

        def serve() -> bool:
            window.sync()
            return False

        mine_correct = np.array([correct], np.int64)
        all_correct = waiting.allreduce(comm, mine_correct, MPI.MIN, "the other ranks' results", serve=serve)
        slowest = waiting.allreduce(comm, np.array([seconds]), MPI.MAX, "the other ranks' times", serve=serve)
        return bool(all_correct[0]), window.shared, float(slowest[0])


def _await(window: Window, offset: int, value: int, what: str) -> None:
    """Wait until a flag on rank 0 has a value, and let MPI serve the others meanwhile."""

    def arrived() -> bool:
        window.sync()
        return window.load(0, offset) == value

    waiting.until(arrived, what, seconds=20)


if __name__ == "__main__":
    sys.exit(main())
