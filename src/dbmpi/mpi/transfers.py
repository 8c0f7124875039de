"""Memory of ranks on other hosts, reached by two-sided messages: the twin of one-sided operations, with their results.

Some MPIs carry out one-sided operations between hosts slowly, or only when their target happens to enter MPI.  Here the
target knows of every transfer, because it takes part in it: it receives what is put straight into its memory, answers
requests, and sees by :meth:`Messages.serve` that something is under way.

A rank carries out the requests of another in their order: a store after all earlier puts, a load after all earlier
gets.  Puts may overlap one another, and so may gets, but nothing else may.  A swap is carried out by the owner of the
word, between two other orders.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum

import numpy as np
from mpi4py import MPI

from dbmpi.mpi import blocking, failures, waiting
from dbmpi.mpi.tags import Tag

_ORDERS = 0
"""Tag of orders; the data that belong to one have the tag that it names."""
_LONGEST_SLEEP = 1e-4
"""Longest sleep, in seconds, while waiting for remote data; MPI only makes progress when polled."""


class Remote(ABC):
    """One rank's transfers with ranks that share no memory with it.

    Parameters
    ----------
    comm
        All ranks.

    Attributes
    ----------
    swaps_all
        Whether words of memory that ranks do share are swapped by it, too: all must use the same way to a word.
    """

    swaps_all: bool

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._lock = threading.Lock()
        # Several threads of this rank may have transfers on the way; each has put what its own flag announces.
        self._puts: dict[tuple[int, int], list[MPI.Request]] = {}
        self._leaving: dict[int, deque[tuple[MPI.Request, np.ndarray]]] = {}

    @abstractmethod
    def get(self, rank: int, offset: int, out: np.ndarray) -> MPI.Request:
        """Begin to copy from `offset` of a rank's memory into `out`, for which the caller waits by `complete`."""

    def put(self, rank: int, offset: int, data: np.ndarray) -> None:
        """Begin to copy `data` to `offset` of a rank's memory; it must stay until this thread's next store there."""
        self._puts.setdefault((threading.get_ident(), rank), []).append(self._put(rank, offset, data))

    def store(self, rank: int, offset: int, value: int) -> None:
        """Set the flag at `offset` of a rank's memory to `value` after all of this thread's earlier puts there."""
        pending = self._puts.pop((threading.get_ident(), rank), ())
        for request in pending:
            self.complete(request, rank, f"data to leave for rank {rank}")
        self._store(rank, offset, value, after_puts=bool(pending))

    @abstractmethod
    def load(self, rank: int, offset: int) -> int:
        """Return the flag at `offset` of a rank's memory."""

    @abstractmethod
    def compare_and_swap(self, rank: int, offset: int, expected: int, value: int) -> int:
        """Set a word of a rank's memory if it is as expected; return its value before.

        Parameters
        ----------
        rank, offset
            The rank, and where in its memory, in bytes.
        expected, value
            What the word must be, and what it becomes.
        """

    @abstractmethod
    def serve(self) -> bool:
        """Help with the transfers of other ranks; return whether any is under way, as far as that is known."""

    @abstractmethod
    def sync(self) -> None:
        """Make what others stored visible here, and what was stored here visible to others, where that needs help."""

    def free(self) -> None:
        """Wait until everything has left, and give back what was opened (collective)."""
        for rank, leaving in self._leaving.items():
            for request, memory in leaving:
                self.complete(request, rank, f"a message to leave for rank {rank}", memory)
        self._leaving.clear()
        self._close()

    def complete(self, request: MPI.Request, rank: int, what: str, memory: np.ndarray | None = None) -> None:
        """Wait for a transfer, and serve other ranks.

        Parameters
        ----------
        request
            The transfer.
        rank
            The rank that takes part in it.
        what
            What is waited for, for the message if it never comes.
        memory
            The array that the transfer writes to, if any.

        Raises
        ------
        RankLost
            If the rank has died, or dies meanwhile.
        """
        failures.complete(
            request, self._comm, rank, what, memory=memory, serve=self.serve, longest_sleep=_LONGEST_SLEEP
        )

    def _leave(self, rank: int, request: MPI.Request, memory: np.ndarray) -> None:
        """Keep the memory of a request until it is complete."""
        # They are carried out in order: to test the first is enough, however many are on the way.
        earlier = self._leaving.setdefault(rank, deque())
        while earlier and earlier[0][0].Test():
            earlier.popleft()
        earlier.append((request, memory))

    @abstractmethod
    def _put(self, rank: int, offset: int, data: np.ndarray) -> MPI.Request: ...

    @abstractmethod
    def _store(self, rank: int, offset: int, value: int, *, after_puts: bool) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class _Kind(IntEnum):
    PUT = 1
    STORE = 2
    LOAD = 3
    GET = 4
    SWAP = 5


_WORDS = 5
"""Of an order: kind, offset, value or bytes, tag, and what a swap expects."""


class Messages(Remote):
    """Transfers by messages, which travel on a duplicate of the communicator.

    Parameters
    ----------
    comm
        All ranks (collective).
    local
        This rank's memory, uint8, open to the others.
    swap
        ``swap(offset, expected, value)`` sets a word of this rank's memory if it is as expected, and returns its
        value before, as one operation for all ranks that reach that memory without messages.
    """

    swaps_all = False

    def __init__(self, comm: MPI.Intracomm, local: np.ndarray, swap: Callable[[int, int, int], int]) -> None:
        super().__init__(blocking.duplicate(comm, "the other ranks to open their windows"))
        self._local = local
        self._swap = swap
        self._serving = threading.Lock()
        self._tag = 0
        # Of each rank: the orders that are not begun, and the transfers of earlier ones under way, all of one kind.
        self._orders: dict[int, deque[list[int]]] = {}
        self._going: dict[int, list[tuple[int, MPI.Request, np.ndarray]]] = {}
        self._abandoned: list[tuple[int, MPI.Request, np.ndarray]] = []
        """Transfers with ranks that have died; MPI may still use that memory."""

    def get(self, rank: int, offset: int, out: np.ndarray) -> MPI.Request:
        """Begin to copy from `offset` of a rank's memory into `out`."""
        return self._ask(_Kind.GET, rank, offset, out, out.nbytes)

    def load(self, rank: int, offset: int) -> int:
        """Return the flag at `offset` of a rank's memory."""
        word = np.empty(1, np.int64)
        self.complete(self._ask(_Kind.LOAD, rank, offset, word, word.nbytes), rank, f"a flag of rank {rank}", word)
        return int(word[0])

    def compare_and_swap(self, rank: int, offset: int, expected: int, value: int) -> int:
        """Let the owner of a word set it."""
        word = np.empty(1, np.int64)
        request = self._ask(_Kind.SWAP, rank, offset, word, value, expected)
        self.complete(request, rank, f"a flag of rank {rank} to be swapped", word)
        return int(word[0])

    def serve(self) -> bool:
        """Carry out the requests of others as far as possible now; return whether something is under way."""
        if not self._serving.acquire(blocking=False):
            return True
        try:
            status = MPI.Status()
            while failures.probe(self._comm, _ORDERS, status):
                words = np.empty(_WORDS, np.int64)
                self._comm.Recv(words, status.source, _ORDERS)
                self._orders.setdefault(status.source, deque()).append(words.tolist())
            gone = failures.dead(self._comm)
            for rank, orders in self._orders.items():
                if rank in gone:
                    orders.clear()
                    self._abandoned += self._going.pop(rank, ())
                    continue
                with suppress(failures.RankLost), failures.partner(self._comm, rank):
                    self._obey(rank, orders)
            return any(self._orders.values()) or any(self._going.values())
        finally:
            self._serving.release()

    def sync(self) -> None:
        """Do nothing: a message that has arrived is visible."""

    def _put(self, rank: int, offset: int, data: np.ndarray) -> MPI.Request:
        with self._lock:
            tag = self._order(rank, _Kind.PUT, offset, data.nbytes)
            return self._comm.Isend([data, MPI.BYTE], rank, tag)

    def _store(self, rank: int, offset: int, value: int, *, after_puts: bool) -> None:
        with self._lock:
            self._order(rank, _Kind.STORE, offset, value)

    def _close(self) -> None:
        waiting.barrier(self._comm, "the other ranks to close their windows", serve=self.serve)
        blocking.free(self._comm)

    def _ask(self, kind: _Kind, rank: int, offset: int, out: np.ndarray, value: int, expected: int = 0) -> MPI.Request:
        """Give an order that is answered; return what completes when the answer is in `out`."""
        with self._lock:
            tag = self._next_tag(answer=True)
            request = self._comm.Irecv([out, MPI.BYTE], rank, tag)
            self._order(rank, kind, offset, value, tag, expected)
        return request

    def _order(self, rank: int, kind: _Kind, offset: int, value: int, tag: int | None = None, expected: int = 0) -> int:
        """Send an order, and return the tag of its data; the lock keeps orders and their data in one sequence."""
        tag = self._next_tag(answer=False) if tag is None else tag
        words = np.array([kind, offset, value, tag, expected], np.int64)
        self._leave(rank, self._comm.Isend(words, rank, _ORDERS), words)
        return tag

    def _next_tag(self, *, answer: bool) -> int:
        """Return an even tag for an answer, an odd one for what this rank sends: the other rank counts for itself."""
        self._tag = self._tag % (Tag.LAST_TRANSFER // 2) + 1
        return 2 * self._tag - (not answer)

    def _obey(self, rank: int, orders: deque[list[int]]) -> None:
        """Carry out a rank's orders up to the first that must wait."""
        going = self._going[rank] = [transfer for transfer in self._going.get(rank, ()) if not transfer[1].Test()]
        while orders:
            kind, offset, value, tag, expected = orders[0]
            if going and not (kind == going[-1][0] and kind in (_Kind.PUT, _Kind.GET)):
                return
            if kind == _Kind.STORE:
                self._local[offset : offset + 8].view(np.int64)[0] = value
            elif kind == _Kind.SWAP:
                before = np.array([self._swap(offset, expected, value)], np.int64)
                going.append((kind, self._comm.Isend([before, MPI.BYTE], rank, tag), before))
            else:
                part = self._local[offset : offset + value]
                move = self._comm.Irecv if kind == _Kind.PUT else self._comm.Isend
                going.append((kind, move([part, MPI.BYTE], rank, tag), part))
            orders.popleft()
