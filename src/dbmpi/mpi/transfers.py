"""Memory of ranks on other hosts, reached by two-sided messages: the twin of ``MPI.Win`` with the same results.

Some MPIs carry out one-sided operations between hosts slowly, or only when their target happens to enter MPI.  Here the
target knows of every transfer, because it takes part in it: it receives what is put straight into its memory, answers
what is asked for, and sees by :meth:`Messages.serve` that something is under way.

What one rank asks of another is done in the order of asking: a store after all earlier puts, a load after all earlier
gets.  Puts may overlap one another, and so may gets, but nothing else may.  A swap is carried out by the owner of the
word, between two other orders.
"""

from __future__ import annotations

import threading
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
_NAP = 1e-4
"""Longest sleep, in seconds, while waiting for data; MPI only makes progress when polled."""


class _Kind(IntEnum):
    PUT = 1
    STORE = 2
    LOAD = 3
    GET = 4
    SWAP = 5


_WORDS = 5
"""Of an order: kind, offset, value or bytes, tag, and what a swap expects."""


class Messages:
    """One rank's transfers with ranks that share no memory with it.

    Parameters
    ----------
    comm
        All ranks; the messages travel on a duplicate (collective).
    local
        This rank's memory, uint8, open to the others.
    swap
        ``swap(offset, expected, value)`` sets a word of this rank's memory if it is as expected, and returns what it
        was, as one operation for all ranks that reach that memory without messages.
    """

    def __init__(self, comm: MPI.Intracomm, local: np.ndarray, swap: Callable[[int, int, int], int]) -> None:
        self._comm = blocking.duplicate(comm, "the other ranks to open their windows")
        self._local = local
        self._swap = swap
        self._lock = threading.Lock()
        self._serving = threading.Lock()
        self._tag = 0
        self._leaving: dict[int, deque[tuple[MPI.Request, np.ndarray]]] = {}
        self._puts: dict[tuple[int, int], list[MPI.Request]] = {}
        # Of each rank: the orders that are not begun, and the transfers of earlier ones that go on, all of one kind.
        self._orders: dict[int, deque[list[int]]] = {}
        self._going: dict[int, list[tuple[int, MPI.Request, np.ndarray]]] = {}
        self._abandoned: list[tuple[int, MPI.Request, np.ndarray]] = []
        """Transfers with ranks that have died; MPI may still look at that memory."""

    def put(self, rank: int, offset: int, data: np.ndarray) -> None:
        """Begin to copy `data` to `offset` of a rank's memory; it must stay until the next store there."""
        with self._lock:
            tag = self._order(rank, _Kind.PUT, offset, data.nbytes)
            request = self._comm.Isend([data, MPI.BYTE], rank, tag)
        self._puts.setdefault((threading.get_ident(), rank), []).append(request)

    def store(self, rank: int, offset: int, value: int) -> None:
        """Set the flag at `offset` of a rank's memory after all earlier puts."""
        for request in self._puts.pop((threading.get_ident(), rank), ()):
            self._complete(request, rank, f"data to leave for rank {rank}")
        with self._lock:
            self._order(rank, _Kind.STORE, offset, value)

    def load(self, rank: int, offset: int) -> int:
        """Return the flag at `offset` of a rank's memory."""
        word = np.empty(1, np.int64)
        self._complete(self._ask(_Kind.LOAD, rank, offset, word, word.nbytes), rank, f"a flag of rank {rank}", word)
        return int(word[0])

    def compare_and_swap(self, rank: int, offset: int, expected: int, value: int) -> int:
        """Set the word at `offset` of a rank's memory if it is `expected`; return what it was before."""
        word = np.empty(1, np.int64)
        request = self._ask(_Kind.SWAP, rank, offset, word, value, expected)
        self._complete(request, rank, f"a flag of rank {rank} to be swapped", word)
        return int(word[0])

    def get(self, rank: int, offset: int, out: np.ndarray) -> MPI.Request:
        """Begin to copy from `offset` of a rank's memory into `out`; a rank that waits for it calls :meth:`serve`."""
        return self._ask(_Kind.GET, rank, offset, out, out.nbytes)

    def serve(self) -> bool:
        """Do what others ask, as far as it can be done now; return whether something is under way."""
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

    def free(self) -> None:
        """Wait until everything sent has left, and give the communicator back (collective)."""
        for rank, orders in self._leaving.items():
            for request, _ in orders:
                self._complete(request, rank, f"a message to leave for rank {rank}")
        self._leaving.clear()
        waiting.barrier(self._comm, "the other ranks to close their windows", serve=self.serve)
        blocking.free(self._comm)

    def _ask(self, kind: _Kind, rank: int, offset: int, out: np.ndarray, value: int, expected: int = 0) -> MPI.Request:
        """Give an order that is answered; return what completes when the answer is in `out`."""
        with self._lock:
            tag = self._next_tag()
            request = self._comm.Irecv([out, MPI.BYTE], rank, tag)
            self._order(rank, kind, offset, value, tag, expected)
        return request

    def _order(self, rank: int, kind: _Kind, offset: int, value: int, tag: int | None = None, expected: int = 0) -> int:
        """Send an order, and return the tag of its data; the lock keeps orders and their data in one sequence."""
        tag = self._next_tag() if tag is None else tag
        words = np.array([kind, offset, value, tag, expected], np.int64)
        # They leave in order: to look at the first is enough, however many wait.
        earlier = self._leaving.setdefault(rank, deque())
        while earlier and earlier[0][0].Test():
            earlier.popleft()
        earlier.append((self._comm.Isend(words, rank, _ORDERS), words))
        return tag

    def _next_tag(self) -> int:
        self._tag = self._tag % Tag.LAST_TRANSFER + 1
        return self._tag

    def _complete(self, request: MPI.Request, rank: int, what: str, memory: np.ndarray | None = None) -> None:
        failures.complete(request, self._comm, rank, what, memory=memory, serve=self.serve, longest_nap=_NAP)

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
