"""Measure how fast a rank reaches the memory of another, and choose the faster transport."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from mpi4py import MPI

from dbmpi.errors import UserError
from dbmpi.mpi import failures, waiting
from dbmpi.mpi.window import Transport, Window

_BYTES = 1 << 20
_ROUNDS = 4
_FLAG = 0
_DATA = 64
TRANSPORTS: tuple[Transport, ...] = ("rma", "p2p")


@dataclass(frozen=True)
class Speed:
    """The speed of one transport between two ranks; the same on all ranks."""

    get_bytes: float
    """Bytes fetched a second."""
    put_bytes: float
    """Bytes put a second, each piece with its flag seen by the target."""
    flag_seconds: float
    """Time to load a flag."""
    correct: bool
    """Whether what was fetched is what had been put."""
    shared: bool
    """Whether ranks of one host shared the memory."""

    @property
    def seconds(self) -> float:
        """Time to put and to fetch one piece of the size that was measured with."""
        return _BYTES / self.put_bytes + _BYTES / self.get_bytes

    def __str__(self) -> str:
        return (
            f"get {self.get_bytes / 1e9:.2g} GB/s, put {self.put_bytes / 1e9:.2g} GB/s, "
            f"a flag in {1e6 * self.flag_seconds:.0f} us"
        )


def transport_between(
    comm: MPI.Intracomm, wanted: Literal["auto", "rma", "p2p"], memories: np.ndarray
) -> tuple[Transport, tuple[str, ...]]:
    """Return the transport that is wanted, with "auto" the faster one if ranks share no memory (collective).

    Parameters
    ----------
    comm
        All ranks.
    wanted
        The setting.
    memories
        For each rank the lowest rank that it shares memory with.

    Returns
    -------
    tuple
        The transport, and remarks on it for the user.

    Raises
    ------
    UserError
        On all ranks, if one-sided operations are wanted where ranks of several hosts may outlive others: such an
        operation does not return in Open MPI where its target has died.
    """
    if failures.tolerated() and len(set(memories.tolist())) > 1:
        if wanted == "rma":
            raise UserError(
                'server.transport = "rma": with fault tolerance (mpirun --with-ft ulfm, which dbmpi launch sets for '
                "train) a rank would wait for ever for one that has died on another host; set server.transport = "
                '"p2p" or "auto", or start with dbmpi launch --no-fault-tolerance, so that any death ends the run'
            )
        return "p2p", ()
    if wanted != "auto":
        return wanted, ()
    if len(set(memories.tolist())) == 1:
        return "rma", ()
    transport, why = choose(comm, memories)
    return transport, (why,)


def choose(comm: MPI.Intracomm, memories: np.ndarray) -> tuple[Transport, str]:
    """Return the faster transport between rank 0 and one that shares no memory with it, and why (collective).

    Parameters
    ----------
    comm
        All ranks.
    memories
        For each rank the lowest rank that it shares memory with.
    """
    other = int(np.flatnonzero(memories != memories[0])[0])
    speeds = {transport: measure(comm, transport, 0, other) for transport in TRANSPORTS}
    best = min(speeds, key=lambda transport: speeds[transport].seconds)
    measured = "; ".join(f"{transport}: {speed}" for transport, speed in speeds.items())
    return best, f"without shared memory transport = {best!r} (ranks 0 and {other}: {measured})"


def measure(comm: MPI.Intracomm, transport: Transport, target: int, origin: int, *, shared: bool = False) -> Speed:
    """Let a rank put and get data and load flags, all in the memory of another (collective).

    Parameters
    ----------
    comm
        All ranks.
    transport
        How they reach memory that they do not share.
    target, origin
        The rank whose memory it is, and the one that uses it.
    shared
        Whether ranks of one host may share the memory.
    """
    numbers = np.ones(4)
    with Window.allocate(comm, _DATA + _BYTES, shared=shared, transport=transport) as window:
        if comm.rank == origin:
            data = np.arange(_BYTES // 4, dtype=np.int32)
            back, wrong = np.empty_like(data), 0
            for number in range(-1, _ROUNDS):  # the first round opens connections
                if number == 0:
                    numbers[:] = 0
                began = time.perf_counter()
                window.put(target, _DATA, data)
                window.store(target, _FLAG, number + 2)
                waiting.until(lambda n=number: window.load(target, _FLAG) == n + 2, "the flag", seconds=60)  # type: ignore[misc]
                put = time.perf_counter()
                window.get(target, _DATA, back)
                got = time.perf_counter()
                window.load(target, _FLAG)
                numbers[:3] += (got - put, put - began, time.perf_counter() - got)
                wrong += not np.array_equal(back, data)
                data += 1
            numbers /= _ROUNDS
            numbers[3] = wrong

        def serve() -> bool:
            window.sync()
            return comm.rank == target  # as a shard does while a transfer goes on

        waiting.complete(comm.Ibcast(numbers, origin), "transfers to be measured", serve=serve)
        # Nobody closes the window while another may still need help.
        waiting.barrier(comm, "the end of the probe", serve=serve)
        get, put, flag = np.maximum(numbers[:3], 1e-9).tolist()
        return Speed(_BYTES / get, _BYTES / put, flag, not numbers[3], window.shared)
