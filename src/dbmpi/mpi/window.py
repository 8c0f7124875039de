"""Memory that every rank of a communicator can read and write: the only file that touches ``MPI.Win``.

Between ranks of one node the memory is shared, and a transfer is a plain copy.  Between nodes the same memory is
reached with Put and Get.  Flags are 64-bit words, written after the data they announce.

The separate and the unified memory models of MPI (MPI 4.1, section 12.4) are both served: a rank that reads its own
memory calls :meth:`Window.sync` first, and one that stores into a neighbour's shared memory calls it between the data
and the flag.

Over networks without remote direct memory access an MPI carries out Put, Get and atomics with the help of the target,
when it enters MPI.  The target may be a worker in the middle of a long gradient, or a shard that sleeps; so flags are
stored without waiting for it, transfers to one rank travel together, and a wait tests for its end.  Where that is too
slow, :mod:`dbmpi.mpi.transfers` does the same by messages.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Literal

import numpy as np
from mpi4py import MPI

from dbmpi.kernels.memory import CACHE_LINE
from dbmpi.mpi import blocking, failures, pieces, waiting
from dbmpi.mpi.blocking import Collective
from dbmpi.mpi.transfers import Messages, Remote

_MOST_GETS = 64
"""Gets of one thread that are on the way at a time."""
Transport = Literal["rma", "p2p"]
_OPENING, _CLOSING = "the other ranks to open their windows", "the other ranks to close their windows"
_HINTS = {"acc_single_intrinsic": "true", "which_accumulate_ops": "replace,no_op,cswap"}
"""Assurances by which Open MPI and MPICH, in this order, may use a network's own atomics; other MPIs ignore them."""


def aligned(nbytes: int) -> int:
    """Round `nbytes` up to whole cache lines: regions begin at multiples, so that two ranks' words never share one."""
    return -(-nbytes // CACHE_LINE) * CACHE_LINE


class Window(Collective):
    """A piece of memory on each rank of `comm`, open to all of them.

    Use :meth:`allocate`; free with :meth:`free` or as a context manager (both collective).  Where an exception of one
    rank alone ends the block, nothing is freed: the job is about to end.

    Parameters
    ----------
    comm
        The ranks.
    nbytes
        Size of this rank's memory.
    shared, transport
        See below.

    Attributes
    ----------
    local
        This rank's memory, uint8, zero at first.
    shared
        Whether ranks of one node reach each other's memory directly.
    transport
        How ranks reach memory that they do not share.
    busy
        Whether the last :meth:`sync` has seen another rank's transfer under way; known only with messages.
    """

    def __init__(self, comm: MPI.Intracomm, nbytes: int, shared: bool, transport: Transport) -> None:
        self._comm = comm
        self._node = blocking.on_this_host(comm, _OPENING)
        self.shared = shared
        self.busy = False
        self.transport = transport
        self._memory: MPI.Win | None = None
        self._near: dict[int, np.ndarray] = {}
        self._node_rank: dict[int, int] = {}
        size = max(aligned(nbytes), CACHE_LINE)
        if shared:
            info = MPI.Info.Create()
            info.Set("alloc_shared_noncontig", "true")
            with blocking.meeting(self._node, _OPENING):
                self._memory = MPI.Win.Allocate_shared(size, 1, info, self._node)
            info.Free()
            ranks = np.empty(self._node.size, np.int64)
            request = self._node.Iallgather(np.array([comm.rank], np.int64), ranks)
            waiting.complete(request, "the node's other ranks")
            self._node_rank = {int(rank): position for position, rank in enumerate(ranks)}
            for position, rank in enumerate(ranks):
                self._near[int(rank)] = _bytes(self._memory.Shared_query(position)[0])
            self.local = self._near[comm.rank]
            with blocking.blocking(_OPENING):
                self._memory.Lock_all(MPI.MODE_NOCHECK)
        else:
            self.local = np.zeros(size, np.uint8)
            self._near[comm.rank] = self.local
        self.local.fill(0)
        self._all_near = len(self._near) == comm.size
        self._swapping = threading.Lock()
        self._remote: Remote
        if transport == "p2p":
            self._remote = Messages(comm, self.local, partial(self._swap_near, comm.rank))
        else:
            self._remote = _OneSided(comm, self.local)
        self._open = True
        self._gets: dict[int, deque[tuple[int, MPI.Request, np.ndarray]]] = {}
        """By thread: several of this rank may have transfers on the way."""
        self.sync()
        waiting.barrier(comm, _OPENING)

    @classmethod
    def allocate(cls, comm: MPI.Intracomm, nbytes: int, *, shared: bool = True, transport: Transport = "rma") -> Window:
        """Open memory of this rank to all of a communicator (collective).

        Where the node's ``/dev/shm`` is too small for the windows of its ranks (a common default in containers), the
        memory is private, as with ``shared=False``, and even neighbours use Put and Get.

        Parameters
        ----------
        comm
            The ranks.
        nbytes
            Size of this rank's memory; every rank may give another number.
        shared
            Whether ranks of one node are to share their memory.
        transport
            How ranks reach memory that they do not share: "rma", by Put and Get, or "p2p", by two-sided messages.
        """
        return cls(comm, nbytes, shared and missing(comm, nbytes) <= 0, transport)

    def near(self, rank: int) -> np.ndarray | None:
        """Return the memory of a rank of this node, to be used in place, or None if it is on another node."""
        return self._near.get(rank)

    def sync(self) -> None:
        """Make what others stored visible here, and what was stored here visible to others (a memory barrier).

        Also lets MPI serve the operations of other nodes, which may need this rank's help; so a rank that waits for a
        flag must call it.
        """
        if not self._all_near:
            self.busy = self._remote.serve()
        if self._memory is not None:
            self._memory.Sync()
        self._remote.sync()

    def get(self, rank: int, offset: int, out: np.ndarray) -> None:
        """Copy ``out.nbytes`` bytes from `offset` of a rank's memory into the contiguous array `out`.

        Raises
        ------
        RankLost
            If the rank has died and its memory is out of reach; that of a neighbour stays.
        """
        self.begin_get(rank, offset, out)
        self.complete_gets()

    def begin_get(self, rank: int, offset: int, out: np.ndarray) -> None:
        """Begin to copy from a rank's memory; complete after this thread's next :meth:`complete_gets`.

        Parameters
        ----------
        rank, offset
            The rank, and where in its memory, in bytes.
        out
            Contiguous; filled with as many bytes as it has.

        Raises
        ------
        RankLost
            As :meth:`get`.
        """
        near = self._near.get(rank)
        if near is not None:
            np.copyto(out, near[offset : offset + out.nbytes].view(out.dtype).reshape(out.shape))
            return
        gets = self._gets.setdefault(threading.get_ident(), deque())
        for piece in pieces.divide(out):
            if len(gets) >= _MOST_GETS:
                self._complete_get(*gets.popleft())
            with failures.partner(self._comm, rank):
                request = self._remote.get(rank, offset, piece)
            gets.append((rank, request, piece))
            offset += piece.nbytes

    def complete_gets(self) -> None:
        """Wait for all copies that this thread has begun by `begin_get`.

        Raises
        ------
        RankLost
            As :meth:`get`, once the copies from all other ranks are complete, too.
        """
        lost: failures.RankLost | None = None
        for rank, request, out in self._gets.pop(threading.get_ident(), ()):
            try:
                self._complete_get(rank, request, out)
            except failures.RankLost as error:
                lost = lost or error
        if lost is not None:
            raise lost

    def put(self, rank: int, offset: int, data: np.ndarray) -> None:
        """Copy the contiguous array `data` to `offset` of a rank's memory, which sees it before a flag stored next.

        `data` must stay as it is until that flag has been stored.
        """
        near = self._near.get(rank)
        if near is not None:
            np.copyto(near[offset : offset + data.nbytes].view(data.dtype).reshape(data.shape), data)
            return
        for piece in pieces.divide(data):
            self._remote.put(rank, offset, piece)
            offset += piece.nbytes

    def load(self, rank: int, offset: int) -> int:
        """Return the flag at `offset` of a rank's memory, atomically; raises RankLost as :meth:`get` does."""
        near = self._near.get(rank)
        if near is not None:
            self.sync()
            return int(near[offset : offset + 8].view(np.int64)[0])
        with failures.partner(self._comm, rank):
            return self._remote.load(rank, offset)

    def store(self, rank: int, offset: int, value: int) -> None:
        """Set the flag at `offset` of a rank's memory to `value`, atomically, after all earlier puts to that rank.

        The rank may see it a while after the return, but sees several values of a flag in order.  Where it has died
        and shares no memory with this one, nothing is done.
        """
        near = self._near.get(rank)
        if near is not None:
            self.sync()
            near[offset : offset + 8].view(np.int64)[0] = value
            self.sync()
            return
        with suppress(failures.RankLost), failures.partner(self._comm, rank):
            self._remote.store(rank, offset, value)

    def compare_and_swap(self, rank: int, offset: int, expected: int, value: int) -> int:
        """Set a word of a rank's memory if it is as expected, atomically; return its value before.

        It does not wait for earlier puts.  Within one node no other rank's help is needed.  Between nodes this waits
        until the target enters MPI, where the network has no atomics of its own; with the transport "p2p" until it
        serves, and this rank serves others meanwhile.

        Parameters
        ----------
        rank, offset
            The rank, and where in its memory, in bytes.
        expected, value
            What the word must be, and what it becomes.
        """
        self.sync()
        if self._all_near or (rank in self._near and not self._remote.swaps_all):
            return self._swap_near(rank, offset, expected, value)
        return self._remote.compare_and_swap(rank, offset, expected, value)

    def free(self) -> None:
        """Free the memory (collective); a second call does nothing."""
        if not self._open:
            return
        self._open = False
        if failures.dead(self._comm):
            return  # nothing collective is possible then: the memory goes when the process ends
        self._remote.free()
        self._near.clear()
        self.local = np.empty(0, np.uint8)
        if self._memory is not None:
            with blocking.meeting(self._node, _CLOSING):
                self._memory.Unlock_all()
                self._memory.Free()
            self._memory = None
        blocking.free(self._node)

    def _complete_get(self, rank: int, request: MPI.Request, out: np.ndarray) -> None:
        self._remote.complete(request, rank, f"data of rank {rank}", out)

    def _swap_near(self, rank: int, offset: int, expected: int, value: int) -> int:
        """Swap a word of a rank of this node; without shared memory that is this rank, which alone reaches it."""
        if self._memory is not None:
            return _swap(self._memory, self._node_rank[rank], offset, expected, value)
        with self._swapping:
            word = self.local[offset : offset + 8].view(np.int64)
            before = int(word[0])
            if before == expected:
                word[0] = value
            return before


class _OneSided(Remote):
    """Transfers by one-sided operations."""

    swaps_all = True

    def __init__(self, comm: MPI.Intracomm, local: np.ndarray) -> None:
        super().__init__(comm)
        # To enter MPI by a probe.  A probe that finds a message does nothing else; here there is never one to find.
        self._empty = blocking.duplicate(comm, _OPENING)
        info = MPI.Info.Create()
        for key, hint in _HINTS.items():
            info.Set(key, hint)
        with blocking.meeting(comm, _OPENING):
            self._win = MPI.Win.Create(local, 1, info, comm)
            self._win.Lock_all(MPI.MODE_NOCHECK)
        info.Free()

    def get(self, rank: int, offset: int, out: np.ndarray) -> MPI.Request:
        return self._win.Rget([out, MPI.BYTE], rank, [offset, out.nbytes, MPI.BYTE])

    def load(self, rank: int, offset: int) -> int:
        request, result = self._atomic(rank, offset, 0, MPI.NO_OP)
        self.complete(request, rank, f"a flag of rank {rank}", result)
        return int(result[0])

    def compare_and_swap(self, rank: int, offset: int, expected: int, value: int) -> int:
        return _swap(self._win, rank, offset, expected, value)

    def serve(self) -> bool:
        failures.probe(self._empty, MPI.ANY_TAG)
        return False

    def sync(self) -> None:
        self._win.Sync()

    def _put(self, rank: int, offset: int, data: np.ndarray) -> MPI.Request:
        return self._win.Rput([data, MPI.BYTE], rank, [offset, data.nbytes, MPI.BYTE])

    def _store(self, rank: int, offset: int, value: int, *, after_puts: bool) -> None:
        if after_puts:
            with blocking.blocking(f"data to arrive at rank {rank}"):
                self._win.Flush(rank)
        with self._lock:
            self._leave(rank, *self._atomic(rank, offset, value, MPI.REPLACE))

    def _close(self) -> None:
        with blocking.meeting(self._comm, _CLOSING):
            self._win.Unlock_all()
            self._win.Free()
        blocking.free(self._empty)

    def _atomic(self, rank: int, offset: int, value: int, operation: MPI.Op) -> tuple[MPI.Request, np.ndarray]:
        """Begin an atomic operation on a flag; the request completes when it has been carried out at the target.

        An Accumulate would need a flush to know that, and a flush blocks.  Operations of one rank on one flag keep
        their order (MPI 4.1, section 12.7.2).
        """
        word, before = np.array([value], np.int64), np.empty(1, np.int64)
        target = [offset, 1, MPI.INT64_T]
        request = self._win.Rget_accumulate([word, MPI.INT64_T], [before, MPI.INT64_T], rank, target, operation)
        return request, before


def hosts(comm: MPI.Intracomm, what: str = "the names of the other ranks' hosts") -> np.ndarray:
    """Return for each rank of `comm` the lowest rank on its host, int64 (collective); `what` names what is awaited."""
    node = blocking.on_this_host(comm, what)
    first = waiting.allreduce(node, np.array([comm.rank], np.int64), MPI.MIN, "the node's other ranks")
    blocking.free(node)
    lowest = np.empty(comm.size, np.int64)
    waiting.complete(comm.Iallgather(first, lowest), "the names of the other ranks' hosts")
    return lowest


def missing(comm: MPI.Intracomm, nbytes: int) -> int:
    """Return how many bytes the fullest node's ``/dev/shm`` lacks for shared windows (collective); 0 or less: none.

    `nbytes` is the size of this rank's window, and `comm` are the ranks that open one each.
    """
    node = blocking.on_this_host(comm, "the other ranks to plan windows")
    need = waiting.allreduce(node, np.array([aligned(nbytes)], np.int64), MPI.SUM, "the node's other ranks")
    blocking.free(node)
    lacks = need - _shared_memory_free()
    return int(waiting.allreduce(comm, lacks, MPI.MAX, "the other ranks to plan windows")[0])


def _swap(window: MPI.Win, target: int, offset: int, expected: int, value: int) -> int:
    new, compared, before = (np.array([word], np.int64) for word in (value, expected, 0))
    with blocking.blocking(f"a flag of rank {target} of its window to be swapped"):
        window.Compare_and_swap([new, MPI.INT64_T], [compared, MPI.INT64_T], [before, MPI.INT64_T], target, offset)
        window.Flush(target)
    return int(before[0])


def _bytes(memory: MPI.buffer) -> np.ndarray:
    return np.asarray(memory, np.uint8)


def _shared_memory_free() -> int:
    """Bytes that shared memory can still take on this node, with a tenth left for others."""
    try:
        disk = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize * 9 // 10
