"""A shard: it owns a range of the parameters and applies the gradients that arrive in its inbox.

The shard polls for a chunk that a client has posted, applies the rule to the part of its range that the chunk covers,
and sets a flag for the client.  The chunk of a client on the same node is not moved: the rule's kernel reads it where
the client has computed it, in one pass over gradient, parameters and state.  The shard never waits, so that a rank
which is also a worker can call :meth:`Server.poll` between two steps and while it waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dbmpi.monitor.records import StalenessHistogram
from dbmpi.objective import Outcome
from dbmpi.paramserver.protocol import HEADER_WORDS, LAST, MORE, REPORT, WITHHELD, Header, ShardMap
from dbmpi.paramserver.rules import Rule, State
from dbmpi.paramserver.schedule import Moment

_LONGEST_TRANSFER = 10.0
"""Seconds for which a shard does not sleep while a client's transfer goes on."""


class PushProgress(NamedTuple):
    """How far the pushes of a client have come at a shard, as numbers of pushes."""

    whole: int
    """Posted completely."""
    begun: int
    """Of which something is posted."""
    touched: int
    """Of which something is applied."""


class Tally:
    """The work of a shard since the last :meth:`Server.take_tally`."""

    def __init__(self) -> None:
        self.pushes = 0
        self.steps = self.samples = self.withheld = 0
        self.applied_bytes = 0
        self.apply_seconds = 0.0
        self.deepest_queue = 0
        self.staleness = StalenessHistogram()
        self.outcome = Outcome(0, 0.0, 0)

    def add(self, header: Header) -> None:
        """Count the steps and samples in the `header` of a report, and losses if they are behind a push that came."""
        self.steps, self.samples = self.steps + header.steps, self.samples + header.samples
        self.withheld += header.withheld
        if not header.withheld:
            self.outcome = self.outcome.plus(Outcome(header.samples, header.loss, header.correct))


class Server:
    """The work of one shard.

    Consistent shards apply each push without interruption, with a sequence number for readers: odd from the first chunk
    of a push to the last, then even again.  Otherwise chunks of several clients take turns.

    Parameters
    ----------
    shards
        Where the shards are.
    number
        Number of this shard.
    clients
        World rank of each client.
    rule
        Applies the gradients.
    parameters
        The shard's range, flat, in a window: fetches read it while it is being updated.

    Attributes
    ----------
    parameters
        As given.
    state
        The rule's named arrays, each as long as `parameters`.
    begun
        The version at which the state was begun: the rule counts its updates from there.
    before_change
        Called before the elements from a first to a last one change, if it is given.
    on_report
        Called with the number of a client and the header of each report of its, if it is given.
    """

    def __init__(
        self, shards: ShardMap, number: int, clients: tuple[int, ...], rule: Rule, parameters: np.ndarray
    ) -> None:
        window, memory = shards.window, shards.memories[number]
        self._window, self._memory = window, memory
        self._consistent = shards.consistent
        self._current: int | None = None
        self._number = number
        self._clients = clients
        self._rule = rule
        self.parameters = parameters
        self.state: State = {}
        self.begun = 0
        self.before_change: Callable[[int, int], None] | None = None
        self.on_report: Callable[[int, Header], None] | None = None
        self._samples = [0] * memory.partitions
        self._posted = self._words(memory.posted(0), len(clients))
        self._versions = self._words(memory.version(0), memory.partitions)
        self._applied = np.zeros(len(clients), np.int64)
        self._active = self._words(memory.active(0, 0), 2 * len(clients))
        self._wanted = self._words(memory.wanted(0), len(clients))
        self._sequence = self._words(memory.sequence, 1)
        self._last = -1
        self._held = np.zeros(len(clients), bool)
        self._gone = np.zeros(len(clients), bool)
        self._counts = {kind: np.zeros(len(clients), np.int64) for kind in (LAST, REPORT)}
        """Of each client the pushes, also those withheld, and the reports, that have been applied."""
        self._inside = np.zeros(len(clients), bool)
        """Whether a part of a client's next push has been applied."""
        self._seen_active, self._active_since = self._active.copy(), 0.0
        self.tally = Tally()

    @property
    def version(self) -> int:
        """Count of pushes applied so far; the partitions of a replica push together, so that theirs count once."""
        return int(self._versions.max())

    @property
    def samples(self) -> int:
        """Samples behind the pushes applied or withheld so far."""
        return max(self._samples)

    @property
    def pushing(self) -> bool:
        """Whether a push is half applied, as far as a consistent shard knows."""
        return self._current is not None

    def begin(self, state: State | None, version: int = 0, *, begun: int = 0, samples: int = 0) -> None:
        """Start after :attr:`parameters` have been filled.

        Parameters
        ----------
        state
            The rule's state; None for the initial one.
        version
            Number of pushes applied so far.
        begun
            Of these, the number before the state was begun.
        samples
            Samples behind the pushes applied so far.
        """
        self.state = self._rule.init(self.parameters) if state is None else state
        self.begun = begun
        self._samples = [samples] * len(self._samples)
        self._versions[:] = version
        self._window.sync()

    def poll(self) -> bool:
        """Apply the chunks that have arrived; return whether there were any, or a transfer is under way."""
        self._window.sync()
        waiting_chunks = (self._posted - self._applied) * ~self._held
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
        """Return the tally since the last call, and start another."""
        tally, self.tally = self.tally, Tally()
        return tally

    def hold(self, client: int) -> None:
        """Apply nothing more of a `client` for now; its chunks wait."""
        self._window.sync()
        self._held[client] = True

    def let_go(self, client: int) -> None:
        """Apply the chunks of a `client` again that :meth:`hold` has kept waiting."""
        self._held[client] = self._gone[client]

    def progress(self, client: int) -> PushProgress:
        """Return how far the pushes of a `client`, which is held, have come."""
        kinds = [kind for kind in self._waiting(client) if kind != REPORT]
        applied, inside = int(self._counts[LAST][client]), bool(self._inside[client])
        whole = applied + kinds.count(LAST) + kinds.count(WITHHELD)
        unfinished = kinds[-1] == MORE if kinds else inside
        return PushProgress(whole, whole + unfinished, applied + inside)

    def reports(self, client: int) -> int:
        """Return how many reports a `client`, which is held, has posted."""
        return int(self._counts[REPORT][client]) + self._waiting(client).count(REPORT)

    def settle(self, client: int, pushes: int, *, gone: bool) -> bool:
        """Apply of a client that is held the first `pushes` of all, and nothing more; return whether that is done.

        Where another client's push is half applied and must be whole, it is not, and the call is to be repeated; but
        not where that one is held, too, which may be for long.

        Parameters
        ----------
        client
            Its number.
        pushes
            At most as many as :attr:`PushProgress.whole`.
        gone
            Whether to drop what is posted beyond, and to hold the client for ever.
        """
        while self._applied[client] < self._posted[client]:
            if self._counts[REPORT if self._next(client).kind == REPORT else LAST][client] >= pushes:
                break
            if self._current not in (None, client) and not self._held[self._current]:
                return False
            self._apply_alone(client)
        if gone:
            self._gone[client] = True
            self._applied[client] = self._posted[client]
            self._active[2 * client : 2 * client + 2] = 0
            if self._current == client:
                self._current = None
                self._step_sequence()
        return True

    def _waiting(self, client: int) -> list[int]:
        """Return the kinds of the chunks that a client has posted, and that are not applied."""
        return [self._header(client, count).kind for count in range(self._applied[client], self._posted[client])]

    def _apply_alone(self, client: int) -> None:
        """Apply the next chunk of a client, in consistent shards as a part of the current push, unless that is held."""
        part = self._consistent and self._next(client).kind != REPORT and self._current in (None, client)
        if part and self._current is None:
            self._current = client
            self._step_sequence()
        if self._apply(client) != MORE and part:
            self._current = None
            self._step_sequence()

    def _transfers_go_on(self) -> bool:
        """Whether a client of another host moves data: its MPI may need this rank to poll, and not to sleep.

        Flags that have not changed for long do not count, for the client may have halted.
        """
        if not self._active.any():
            return False
        if not np.array_equal(self._active, self._seen_active):
            self._seen_active, self._active_since = self._active.copy(), time.monotonic()
        return time.monotonic() - self._active_since < _LONGEST_TRANSFER

    def _apply_whole(self, ready: list[int]) -> bool:
        """Continue the current push, or start one; return whether anything was done."""
        if self._current is None:
            # What changes no parameters takes no turn.
            empty = [client for client in ready if self._next(client).kind in (REPORT, WITHHELD)]
            for client in empty:
                self._apply(client)
            if empty:
                return True
            # A reader whose copy overlapped a push gets a turn before the next one.
            if (self._wanted * ~self._gone).any():
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
        """Whether all of a push has been posted, or as much as there are slots for."""
        first, stop = int(self._applied[client]), int(self._posted[client])
        return stop - first >= self._memory.slots(client) or any(
            self._header(client, count).kind != MORE for count in range(first, stop)
        )

    def _step_sequence(self) -> None:
        self._window.sync()
        self._sequence[0] += 1
        self._window.sync()

    def _words(self, offset: int, count: int) -> np.ndarray:
        """Return words of this rank's window, int64."""
        words: np.ndarray = self._window.local[offset : offset + 8 * count].view(np.int64)
        return words

    def _header(self, client: int, count: int) -> Header:
        return Header.unpack(self._words(self._memory.header(client, count), HEADER_WORDS))

    def _next(self, client: int) -> Header:
        return self._header(client, int(self._applied[client]))

    def _apply(self, client: int) -> int:
        """Apply the client's next chunk: one a turn, so that no client starves another; return its kind."""
        count, memory = int(self._applied[client]), self._memory
        header, partition = self._next(client), client % memory.partitions
        if header.kind == REPORT:
            self.tally.add(header)
            if self.on_report is not None:
                self.on_report(client, header)
        elif header.kind != WITHHELD:
            self._update(header, self._chunk(client, count, header), partition)
        if header.kind in (LAST, WITHHELD):
            self._samples[partition] += header.samples
        if header.kind == LAST:
            self.tally.staleness.add(int(self._versions[partition]) - header.fetched)
            self.tally.pushes += 1
            self._versions[partition] += 1
        if header.kind != REPORT:
            self._inside[client] = header.kind == MORE
        if header.kind != MORE:
            self._counts[REPORT if header.kind == REPORT else LAST][client] += 1
        self._applied[client] = count + 1
        self._window.store(self._clients[client], memory.applied(self._number), count + 1)
        return header.kind

    def _chunk(self, client: int, count: int, header: Header) -> np.ndarray:
        """Return the data of a chunk, in place."""
        memory, start = self._window.local, header.source
        if self._memory.reads(client):
            near = self._window.near(self._clients[client])
            assert near is not None
            memory = near
        else:
            start = self._memory.data(client, count)
        dtype = self.parameters.dtype
        chunk: np.ndarray = memory[start : start + header.length * dtype.itemsize].view(dtype)
        return chunk

    def _update(self, header: Header, chunk: np.ndarray, partition: int) -> None:
        """Apply the rule to the range that a chunk of a client with that `partition` covers."""
        covered = slice(header.start, header.start + header.length)
        if self.before_change is not None:
            self.before_change(covered.start, covered.stop)
        began = time.perf_counter()
        moment = Moment(int(self._versions[partition]) + 1 - self.begun, self._samples[partition], header.samples)
        state = {name: array[covered] for name, array in self.state.items()}
        self._rule.apply(self.parameters[covered], chunk, state, moment)
        self.tally.apply_seconds += time.perf_counter() - began
        self.tally.applied_bytes += chunk.nbytes
