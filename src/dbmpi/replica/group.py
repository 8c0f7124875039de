"""The workers of a replica, as one of them sees the others: how it waits for them, and the shelves they share.

Where all workers are ranks of one node, what one has for others lies on *shelves* in memory that all can read: whoever
needs it copies it from there, once, without MPI's help.  A shelf belongs to one worker and one purpose and is used
again in every step; flags say when it is filled, and when all have taken what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.kernels.memory import CACHE_LINE
from dbmpi.mpi import blocking, pieces, waiting
from dbmpi.mpi.collective import Collective
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.mpi.window import Window


@dataclass(frozen=True)
class Shelf:
    """A shelf that every worker has; `number` counts them."""

    number: int
    fixed: int
    """Elements."""
    each: int
    """Elements for each sample."""


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
    comm, rank, size
    near
        Whether there are shelves.
    serve
        Called while this worker waits for others, so that its other duties go on.
    """

    def __init__(self, comm: MPI.Intracomm | None, *, shared: bool = True) -> None:
        self.comm = comm if comm is not None and comm.size > 1 else None
        self.rank = 0 if self.comm is None else self.comm.rank
        self.size = 1 if self.comm is None else self.comm.size
        self.serve: Callable[[], bool] | None = None
        self.near = False
        if self.comm is not None and shared:
            from mpi4py import MPI

            node = blocking.on_this_host(self.comm, "the other partitions")
            smallest = waiting.allreduce(self.comm, np.array([node.size]), MPI.MIN, "the other partitions")
            self.near = int(smallest[0]) == self.size
            blocking.free(node)
        self._shelves: list[Shelf] = []
        self._window: Window | None = None
        self._capacity = (0, 0)
        self._starts: list[int] = []
        self._filled: list[int] = []

    def complete(self, request: pieces.Operation, what: str) -> None:
        """Wait for a non-blocking operation."""
        waiting.complete(request, what, serve=self.serve)

    def shelf(self, fixed: int = 0, each: int = 0) -> Shelf:
        """Ask for a shelf of so many elements and, for each sample, so many more; all workers ask alike."""
        self._shelves.append(Shelf(len(self._shelves), fixed, each))
        return self._shelves[-1]

    def make_room(self, samples: int, itemsize: int) -> None:
        """See to it that the shelves hold so many samples (collective; nothing is under way)."""
        if not self.near or (samples <= self._capacity[0] and itemsize <= self._capacity[1]):
            return
        from dbmpi.mpi.window import Window, aligned

        assert self.comm is not None
        if self._window is not None:
            self._window.free()
        position = len(self._shelves) * (1 + self.size) * CACHE_LINE
        self._starts = []
        for shelf in self._shelves:
            self._starts.append(position)
            position += aligned((shelf.fixed + shelf.each * samples) * itemsize)
        window = Window.allocate(self.comm, position)
        self.near = window.shared
        self._filled = [0] * len(self._shelves)
        self._capacity = (samples, itemsize)
        self._window = window

    def room(
        self, shelf: Shelf, elements: int, dtype: np.dtype[np.floating], takers: Iterable[int] | None = None
    ) -> np.ndarray:
        """Return this worker's shelf, flat, to be filled; waits until the takers have what was on it before."""
        window, before = self._open, self._filled[shelf.number]
        for other in self._others if takers is None else takers:
            word = self._flag(shelf, 1 + other)
            waiting.until(
                lambda word=word: window.load(self.rank, word) >= before,  # type: ignore[misc]
                f"partition {other} of the replica to take what it needs",
                serve=self.serve,
            )
        return self._on(self.rank, shelf, elements, dtype)

    def offer(self, shelf: Shelf) -> None:
        """Say that this worker's shelf is filled, perhaps with nothing; all workers do so the same number of times."""
        self._filled[shelf.number] += 1
        self._open.store(self.rank, self._flag(shelf, 0), self._filled[shelf.number])

    def look(self, shelf: Shelf, other: int, elements: int, dtype: np.dtype[np.floating]) -> np.ndarray:
        """Return another worker's shelf, flat, when it has been filled as often as this worker's own."""
        window, wanted, word = self._open, self._filled[shelf.number], self._flag(shelf, 0)
        waiting.until(lambda: window.load(other, word) >= wanted, f"partition {other} of the replica", serve=self.serve)
        return self._on(other, shelf, elements, dtype)

    def taken(self, shelf: Shelf, owners: Iterable[int] | None = None) -> None:
        """Tell the owners that this worker needs nothing more from their shelves."""
        for other in self._others if owners is None else owners:
            self._open.store(other, self._flag(shelf, 1 + self.rank), self._filled[shelf.number])

    def sum(self, shelf: Shelf, values: np.ndarray, members: Sequence[int], what: str) -> np.ndarray:
        """Return the sum of the members' `values`, added in their order; a new array, the same on all members.

        Called by all workers where there are shelves, and with messages by the members at least.
        """
        if self.near:
            flat = np.ascontiguousarray(values).reshape(-1)
            self.room(shelf, flat.size, flat.dtype)[:] = flat
            self.offer(shelf)
            total = np.zeros_like(flat)
            for member in members if self.rank in members else ():
                total += self.look(shelf, member, flat.size, flat.dtype)
            self.taken(shelf)
            return total.reshape(values.shape)
        assert self.comm is not None
        if len(members) == self.size:
            from mpi4py import MPI

            return waiting.allreduce(self.comm, values, MPI.SUM, what, serve=self.serve)
        return self._sum_by_messages(values, members, what) if self.rank in members else np.zeros_like(values)

    def _sum_by_messages(self, values: np.ndarray, members: Sequence[int], what: str) -> np.ndarray:
        """Let the first member add up, and send what comes out to the others."""
        assert self.comm is not None
        first, *others = members
        if self.rank != first:
            total = np.empty_like(values)
            self.complete(pieces.isend(self.comm, values, first, Tag.SUMS), what)
            self.complete(pieces.irecv(self.comm, total, first, Tag.SUMS), what)
            return total
        buffers = [np.empty_like(values) for _ in others]
        coming = zip(others, buffers, strict=True)
        for request in [pieces.irecv(self.comm, into, member, Tag.SUMS) for member, into in coming]:
            self.complete(request, what)
        total = values.copy()
        for buffer in buffers:
            total += buffer
        for request in [pieces.isend(self.comm, total, member, Tag.SUMS) for member in others]:
            self.complete(request, what)
        return total

    def free(self) -> None:
        """Give the shelves back (collective)."""
        if self._window is not None:
            self._window.free()
            self._window = None
            self._capacity = (0, 0)

    @property
    def _others(self) -> list[int]:
        return [worker for worker in range(self.size) if worker != self.rank]

    @property
    def _open(self) -> Window:
        assert self._window is not None
        return self._window

    def _flag(self, shelf: Shelf, place: int) -> int:
        """Return where a flag lies: first that of the owner, then one for each worker that takes."""
        return (shelf.number * (1 + self.size) + place) * CACHE_LINE

    def _on(self, worker: int, shelf: Shelf, elements: int, dtype: np.dtype[np.floating]) -> np.ndarray:
        memory = self._open.near(worker)
        assert memory is not None
        start = self._starts[shelf.number]
        return memory[start : start + elements * dtype.itemsize].view(dtype)
