"""The workers of a replica, as one of them sees the others: how it waits for them, and the shelves they share.

Where all workers are ranks of one node, each puts what others need on *shelves* in memory that all can read: they copy
it from there, once, without MPI's help.  A shelf serves one purpose and is used again in every step; flags say when
its owner has filled it, and when each reader is done with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.kernels.memory import CACHE_LINE
from dbmpi.mpi import blocking, pieces, waiting
from dbmpi.mpi.blocking import Collective
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.mpi.window import Window


class Group(Collective):
    """The workers of a replica.

    Parameters
    ----------
    comm
        The workers in order; None for one alone.
    shared
        Whether to use memory that ranks of one node share; if not, everything travels as messages.

    Attributes
    ----------
    rank, size
        This worker's number, and the number of workers.
    near
        Whether there are shelves.
    window
        The memory of the shelves, once `reserve` has opened it.
    serve
        Called while this worker waits for others, for this rank's other duties.
    """

    def __init__(self, comm: MPI.Intracomm | None, *, shared: bool = True) -> None:
        self._comm = comm if comm is not None and comm.size > 1 else None
        self.rank = 0 if self._comm is None else self._comm.rank
        self.size = 1 if self._comm is None else self._comm.size
        self.serve: Callable[[], bool] | None = None
        self.near = False
        self.window: Window | None = None
        self._closing: MPI.Intracomm | None = None
        """The same workers, for the window alone: one that is given up may leave an operation on `comm` unfinished."""
        if self._comm is not None and shared:
            from mpi4py import MPI

            node = blocking.on_this_host(self._comm, "the other partitions")
            smallest = waiting.allreduce(self._comm, np.array([node.size]), MPI.MIN, "the other partitions")
            self.near = int(smallest[0]) == self.size
            blocking.free(node)
        self._shelves: list[Shelf] = []
        self._capacity = (0, 0)

    @property
    def comm(self) -> MPI.Intracomm:
        """The workers, of which there are several."""
        assert self._comm is not None
        return self._comm

    def complete(self, request: pieces.Operation, what: str) -> None:
        """Wait for a non-blocking `request`; `what` is waited for, for the message if it never comes."""
        waiting.complete(request, what, serve=self.serve)

    def shelf(self, fixed: int = 0, each: int = 0) -> Shelf:
        """Return a new shelf for `fixed` elements and, for each sample, `each` more; all workers ask alike."""
        self._shelves.append(Shelf(self, len(self._shelves), fixed, each))
        return self._shelves[-1]

    def reserve(self, samples: int, itemsize: int) -> None:
        """Let the shelves hold so many samples, of `itemsize` bytes an element (collective; nothing is under way)."""
        if not self.near or (samples <= self._capacity[0] and itemsize <= self._capacity[1]):
            return
        from dbmpi.mpi.window import Window, aligned

        self.free()
        position = len(self._shelves) * (1 + self.size) * CACHE_LINE
        for shelf in self._shelves:
            shelf.filled, shelf.start = 0, position
            position += aligned((shelf.fixed + shelf.each * samples) * itemsize)
        self._closing = blocking.duplicate(self.comm, "the other partitions")
        self.window = Window.allocate(self._closing, position)
        self.near = self.window.shared
        self._capacity = (samples, itemsize)

    def sum(self, shelf: Shelf, values: np.ndarray, members: Sequence[int], what: str) -> np.ndarray:
        """Return the sum of the members' `values`, added in their order; a new array, the same on all members.

        Called by all workers where there are shelves, and with messages by the members at least.

        Parameters
        ----------
        shelf
            With ``fixed`` elements for `values`.
        values
            This worker's summand, of the same shape and dtype on all members.
        members
            Numbers of the workers whose values count.
        what
            What is waited for, for the message if it never comes.
        """
        if self.near:
            shelf.fill(values.shape, values.dtype)[...] = values
            shelf.offer()
            total = np.zeros(values.shape, values.dtype)
            for member in members if self.rank in members else ():
                total += shelf.take(member, values.shape, values.dtype)
            shelf.release()
            return total
        if len(members) == self.size:
            from mpi4py import MPI

            return waiting.allreduce(self.comm, values, MPI.SUM, what, serve=self.serve)
        return self._sum_by_messages(values, members, what) if self.rank in members else np.zeros_like(values)

    def _sum_by_messages(self, values: np.ndarray, members: Sequence[int], what: str) -> np.ndarray:
        """Let the first member add up, and send the result to the others."""
        first, *others = members
        if self.rank != first:
            total = np.empty_like(values)
            self.complete(pieces.isend(self.comm, values, first, Tag.SUMS), what)
            self.complete(pieces.irecv(self.comm, total, first, Tag.SUMS), what)
            return total
        buffers = {member: np.empty_like(values) for member in others}
        for request in [pieces.irecv(self.comm, into, member, Tag.SUMS) for member, into in buffers.items()]:
            self.complete(request, what)
        total = values.copy()
        for buffer in buffers.values():
            total += buffer
        for request in [pieces.isend(self.comm, total, member, Tag.SUMS) for member in others]:
            self.complete(request, what)
        return total

    def free(self) -> None:
        """Free the memory of the shelves (collective)."""
        if self.window is not None:
            assert self._closing is not None
            self.window.free()
            blocking.free(self._closing)
            self.window = self._closing = None
            self._capacity = (0, 0)


class Shelf:
    """Memory that each worker of a node fills and all others read: one purpose's, used in turns.

    In every turn each worker calls `clear` or `fill`, then `offer`, then `take` where it needs something, and
    `release`.

    Parameters
    ----------
    group
        The workers.
    number
        Counts the shelves.
    fixed, each
        Elements, and elements for each sample.

    Attributes
    ----------
    filled
        How often this worker has offered it.
    start
        Where it begins in the window of each worker, in bytes.
    """

    def __init__(self, group: Group, number: int, fixed: int, each: int) -> None:
        self.fixed, self.each = fixed, each
        self.filled = self.start = 0
        self._group, self._number = group, number

    def clear(self, takers: Iterable[int] | None = None) -> None:
        """Wait until the takers, by default all others, need no more of this worker's last turn."""
        group, before = self._group, self.filled
        for other in self._others if takers is None else takers:
            what = f"partition {other} of the replica to take what it needs"
            waiting.until(partial(self._reached, group.rank, 1 + other, before), what, serve=group.serve)

    def fill(self, shape: tuple[int, ...], dtype: np.dtype[np.floating]) -> np.ndarray:
        """Return this worker's memory as an array of a `shape` and `dtype`, when no other reads its last turn."""
        self.clear()
        return self.array(self._group.rank, shape, dtype)

    def offer(self) -> None:
        """Let the others read what this worker has filled, perhaps nothing."""
        self.filled += 1
        self._window.store(self._group.rank, self._flag(0), self.filled)

    def take(self, owner: int, shape: tuple[int, ...], dtype: np.dtype[np.floating], first: int = 0) -> np.ndarray:
        """Return a worker's array, to be read, when it has been offered in this turn.

        Parameters
        ----------
        owner, shape, dtype, first
            As for `array`.
        """
        what = f"partition {owner} of the replica"
        waiting.until(partial(self._reached, owner, 0, self.filled), what, serve=self._group.serve)
        return self.array(owner, shape, dtype, first)

    def release(self, owners: Iterable[int] | None = None) -> None:
        """Let the owners, by default all others, fill their memory again."""
        for other in self._others if owners is None else owners:
            self._window.store(other, self._flag(1 + self._group.rank), self.filled)

    def array(self, owner: int, shape: tuple[int, ...], dtype: np.dtype[np.floating], first: int = 0) -> np.ndarray:
        """Return an array in a worker's memory, without waiting.

        Parameters
        ----------
        owner
            Number of the worker.
        shape, dtype
            Of the array.
        first
            Elements before it.
        """
        memory = self._window.near(owner)
        assert memory is not None
        begin = self.start + first * dtype.itemsize
        return memory[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    @property
    def _window(self) -> Window:
        assert self._group.window is not None
        return self._group.window

    @property
    def _others(self) -> list[int]:
        return [worker for worker in range(self._group.size) if worker != self._group.rank]

    def _flag(self, position: int) -> int:
        """Return the offset of a flag: the owner's is first, then there is one for each worker that reads."""
        return (self._number * (1 + self._group.size) + position) * CACHE_LINE

    def _reached(self, owner: int, position: int, turn: int) -> bool:
        return self._window.load(owner, self._flag(position)) >= turn
