"""Slots for unpacked chunks in memory that all ranks of a host share."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
from mpi4py import MPI

from dbmpi.data.unpacked import Slots, Unpacked
from dbmpi.mpi import blocking, failures, waiting
from dbmpi.mpi import window as windows
from dbmpi.mpi.blocking import Collective
from dbmpi.mpi.window import Window


class ChunkSlots(Collective):
    """The slots of one host, which its workers use for one dataset (collective).

    Where the host's ``/dev/shm`` is too small, there are none, and each worker unpacks chunks for itself.

    Parameters
    ----------
    comm
        All ranks.
    unpacked
        Reads the dataset on this rank; None for a rank that does not.

    Attributes
    ----------
    nbytes
        Memory that the slots of this host take.
    """

    def __init__(self, comm: MPI.Intracomm, unpacked: Unpacked | None) -> None:
        self._node = blocking.on_this_host(comm, "the other ranks to share unpacked chunks")
        self._window: Window | None = None
        self._unpacked = unpacked
        count, each = (0, 0) if unpacked is None else (unpacked.slots_needed, unpacked.nbytes)
        wanted = np.array([Slots.size(count, each) if count else 0], np.int64)
        self.nbytes = int(waiting.allreduce(self._node, wanted, MPI.MAX, "the sizes of chunks")[0])
        if windows.missing(self._node, self.nbytes if self._node.rank == 0 else 0) > 0:
            self.nbytes = 0
        taking = np.zeros(self._node.size, np.int64)
        waiting.complete(
            self._node.Iallgather(np.array([unpacked is not None], np.int64), taking), "the ranks that read"
        )
        if not self.nbytes:
            return
        self._window = Window.allocate(self._node, self.nbytes if self._node.rank == 0 else 0)
        memory = self._window.near(0)
        assert memory is not None
        if self._node.rank == 0:
            memory[:] = 0
        self._window.sync()
        waiting.barrier(self._node, "the slots for chunks")
        self._window.sync()
        if unpacked is not None:
            part = int(taking[: self._node.rank].sum())
            unpacked.share(Slots(memory[: self.nbytes], count, each, part, int(taking.sum())))

    def free(self) -> None:
        """Free the memory (collective); a second call does nothing."""
        if self._window is None or failures.dead(self._node):
            return  # nothing collective is possible once a rank has died
        if self._unpacked is not None:
            self._unpacked.share(None)
        self._window.free()
        blocking.free(self._node)
        self._window = None


def share_chunks(comm: MPI.Intracomm, unpacked: Unpacked | None, stack: ExitStack) -> None:
    """Let the ranks of each host share the chunks that they unpack (collective).

    Parameters
    ----------
    comm, unpacked
        As for :class:`ChunkSlots`.
    stack
        Frees the memory.
    """
    any_reads = np.array([unpacked is not None], np.int64)
    if waiting.allreduce(comm, any_reads, MPI.MAX, "the other ranks to open the data")[0]:
        stack.enter_context(ChunkSlots(comm, unpacked))
