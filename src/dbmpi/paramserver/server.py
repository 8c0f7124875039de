"""A shard: it owns a range of the parameters and applies the gradients that arrive in its inbox.

The shard looks whether a client has posted a chunk, applies the rule to the part of its range that the chunk covers,
and tells the client that it has.  The chunk of a client on the same node is not moved: the rule's kernel reads it where
the client has computed it, in one pass over gradient, parameters and state.  The shard never waits, so that a rank
which is also a worker can call :meth:`Server.poll` between two steps and while it waits.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from dbmpi.monitor.records import StalenessHistogram
from dbmpi.mpi.window import Window
from dbmpi.objective import Outcome
from dbmpi.paramserver.memory import HEADER_WORDS, Memory
from dbmpi.paramserver.rules import Rule, State

MORE, LAST, REPORT = 0, 1, 2
_LONGEST_TRANSFER = 10.0
"""Seconds for which a shard does not sleep while a client's transfer goes on."""


class Header(NamedTuple):
    """What a client says about a chunk; nine of the 64-bit words of a header."""

    start: int
    """First element of the shard's range that the chunk covers."""
    length: int
    """Elements of the chunk."""
    last: int
    """`MORE`, `LAST` for the last chunk of a push to this shard, or `REPORT` for none: only the counts are news."""
    fetched: int
    """Version of the shard that the client's parameters came from."""
    samples: int
    """Samples behind the push."""
    correct: int
    """Of these, samples classified correctly; -1 if that has no meaning."""
    loss: float
    """Sum of the losses of the samples."""
    steps: int
    """Steps whose gradients were accrued."""
    source: int = -1
    """Byte of the client's window where the chunk is to be read; -1 where it lies in the inbox."""

    def pack(self) -> np.ndarray:
        """Return the words."""
        words = np.zeros(HEADER_WORDS, np.int64)
        words[:9] = (
            *(self.start, self.length, self.last, self.fetched),
            *(self.samples, self.correct, 0, self.steps, self.source),
        )
        words[6:7].view(np.float64)[0] = self.loss
        return words

    @classmethod
    def unpack(cls, words: np.ndarray) -> Header:
        """Read what :meth:`pack` wrote."""
        start, length, last, fetched, samples, correct, _, steps, source = words[:9].tolist()
        loss = float(words[6:7].view(np.float64)[0])
        return cls(start, length, last, fetched, samples, correct, loss, steps, source)


class Tally:
    """What a shard has done since the last :meth:`take`."""

    def __init__(self) -> None:
        self.pushes = 0
        self.steps = 0
        self.applied_bytes = 0
        self.apply_seconds = 0.0
        self.deepest_queue = 0
        self.staleness = StalenessHistogram()
        self.outcome = Outcome(0, 0.0, 0)

    def add(self, header: Header) -> None:
        """Count the steps and samples behind a push."""
        self.steps += header.steps
        self.outcome = self.outcome.plus(Outcome(header.samples, header.loss, header.correct))


class Server:
    """The work of one shard.

    Parameters
    ----------
    window
        The window of all ranks.
    memory
        What lies where in this rank's window.
    shard
        Number of this shard.
    clients
        World rank of each client.
    rule
        How gradients are applied.
    parameters
        The shard's range, flat, in a window: fetches read it while it is being updated.
    consistent
        Whether a push is applied at one go, with a sequence number that tells readers of it: odd from its first chunk
        to its last, then even again.  By default chunks of several clients take turns.

    Attributes
    ----------
    parameters
        As given.
    state
        The rule's named arrays, each as long as `parameters`.
    """

    def __init__(
        self,
        window: Window,
        memory: Memory,
        shard: int,
        clients: tuple[int, ...],
        rule: Rule,
        parameters: np.ndarray,
        consistent: bool = False,
    ) -> None:
        self._consistent = consistent
        self._current: int | None = None
        self._window = window
        self._memory = memory
        self._shard = shard
        self._clients = clients
        self._rule = rule
        local = window.local
        self.parameters = parameters
        self.state: State = {}
        self._posted = local[memory.posted(0) :][: len(clients) * 8].view(np.int64)
        self._versions = local[memory.version(0) :][: memory.partitions * 8].view(np.int64)
        self._applied = np.zeros(len(clients), np.int64)
        self._active = local[memory.active(0, 0) :][: len(clients) * 16].view(np.int64)
        self._wanted = local[memory.wanted(0) :][: len(clients) * 8].view(np.int64)
        self._sequence = local[memory.sequence :][:8].view(np.int64)
        self._last = -1
        self._seen_active, self._active_since = self._active.copy(), 0.0
        self.tally = Tally()

    @property
    def version(self) -> int:
        """Count of pushes applied so far; the partitions of a replica push together, so that theirs count once."""
        return int(self._versions.max())

    def begin(self, state: State | None, version: int = 0) -> None:
        """Start from `state` (None: the rule's own) after `parameters` have been filled."""
        self.state = self._rule.init(self.parameters) if state is None else state
        self._versions[:] = version
        self._window.sync()

    def poll(self) -> bool:
        """Apply what has arrived; return whether there was anything, or something is about to arrive or leave."""
        self._window.sync()
        waiting_chunks = self._posted - self._applied
        queue = int(waiting_chunks.sum())
        if queue == 0:
            return self._window.busy or self._transfers_go_on()
        self.tally.deepest_queue = max(self.tally.deepest_queue, queue)
        ready = np.flatnonzero(waiting_chunks).tolist()
        if self._consistent:
            return self._apply_whole(ready)
        for client in ready:
            self._apply(client)
        return True

    def take_tally(self) -> Tally:
        """Return what was done since the last call."""
        tally, self.tally = self.tally, Tally()
        return tally

    def _transfers_go_on(self) -> bool:
        """Whether a client of another host moves data: its MPI may need this rank to poll, and not to sleep.

        A client that has said so long ago may have halted.
        """
        if not self._active.any():
            return False
        if not np.array_equal(self._active, self._seen_active):
            self._seen_active, self._active_since = self._active.copy(), time.monotonic()
        return time.monotonic() - self._active_since < _LONGEST_TRANSFER

    def _apply_whole(self, ready: list[int]) -> bool:
        """Go on with the push that has been begun, or begin one; return whether anything was done."""
        if self._current is None:
            # Who has read a torn vector is let in before the next push.
            if self._wanted.any():
                return True
            candidates = [client for client in ready if self._is_whole(client)]
            if not candidates:
                return False
            turn = self._last + 1
            self._current = self._last = min(candidates, key=lambda client: (client - turn) % len(self._clients))
            self._step_sequence()
        elif self._current not in ready:
            return False
        if self._apply(self._current) != MORE:
            self._current = None
            self._step_sequence()
        return True

    def _is_whole(self, client: int) -> bool:
        """Whether all of a push has been posted, or as much as there is room for."""
        first, stop = int(self._applied[client]), int(self._posted[client])
        return stop - first >= self._memory.room(client) or any(
            self._header(client, count).last != MORE for count in range(first, stop)
        )

    def _step_sequence(self) -> None:
        self._window.sync()
        self._sequence[0] += 1
        self._window.sync()

    def _header(self, client: int, count: int) -> Header:
        place = self._memory.header(client, count)
        return Header.unpack(self._window.local[place : place + HEADER_WORDS * 8].view(np.int64))

    def _apply(self, client: int) -> int:
        """Apply the client's next chunk: one a turn, so that no client starves another; return its kind."""
        count = int(self._applied[client])
        local, memory, dtype = self._window.local, self._memory, self.parameters.dtype
        header = self._header(client, count)
        start = header.source
        if memory.reads(client):
            near = self._window.near(self._clients[client])
            assert near is not None
            local = near
        else:
            start = memory.data(client, count)
        chunk = local[start : start + header.length * dtype.itemsize].view(dtype)
        covered = slice(header.start, header.start + header.length)
        began = time.perf_counter()
        self._rule.apply(self.parameters[covered], chunk, {name: array[covered] for name, array in self.state.items()})
        self.tally.apply_seconds += time.perf_counter() - began
        self.tally.applied_bytes += chunk.nbytes
        if header.last == LAST:
            partition = client % memory.partitions
            self.tally.staleness.add(int(self._versions[partition]) - header.fetched)
            self.tally.pushes += 1
            self._versions[partition] += 1
        if header.last != MORE:
            self.tally.add(header)
        self._applied[client] = count + 1
        self._window.store(self._clients[client], memory.applied(self._shard), count + 1)
        return header.last
