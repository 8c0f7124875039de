"""A shard: it owns a range of the parameters and applies the gradients that arrive in its inbox.

The shard polls for a chunk that a client has posted, applies the rule to the part of its range that the chunk covers,
and sets a flag for the client.  The chunk of a client on the same node is not moved: the rule's kernel reads it where
the client has computed it, in one pass over gradient, parameters and state.  The shard never waits, so that a rank
which is also a worker can call :meth:`Server.poll` between two steps and while it waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dbmpi.kernels import bfloat16
from dbmpi.kernels.bfloat16 import BFLOAT16
from dbmpi.kernels.compile import THREADS
from dbmpi.paramserver.compensation import DelayCompensated
from dbmpi.paramserver.protocol import HEADER_WORDS, LAST, MORE, REPORT, WITHHELD, Header, ShardMap
from dbmpi.paramserver.rules import Rule, State
from dbmpi.paramserver.schedule import Moment
from dbmpi.paramserver.tally import PushProgress, Tally
from dbmpi.paramserver.wire import WideChunks

_BLOCK = 1 << 17 if THREADS == 1 else 1 << 21
"""Elements that are updated, and then rounded, at a time: they are still in a cache, or worth waking threads for."""
_LONGEST_TRANSFER = 10.0
"""Seconds for which a shard does not sleep while a client's transfer goes on."""


class Server:
    """The work of one shard.

    Consistent shards apply each push without interruption, with a sequence number for readers: odd from the first chunk
    of a push to the last, then even again.  Otherwise chunks of several clients take turns.  Shards that discard stale
    pushes apply each without interruption, too, so that none becomes staler while it is applied.

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
    rounded
        Where to keep `parameters` in bfloat16, too, if anywhere: workers compute on this memory, or fetch it.
    begun
        The version at which the state was begun: the rule counts its updates from there.
    most
        The version at which no further push is begun; None for no limit.
    before_change
        Called before the elements from a first to a last one change, if it is given.
    on_report
        Called with the number of a client and the header of each report of its, if it is given.
    on_apply
        Called after each use of the rule, if it is given: with ``"apply"``, and its begin and end by
        ``time.perf_counter``.
    """

    def __init__(
        self, shards: ShardMap, number: int, clients: tuple[int, ...], rule: Rule, parameters: np.ndarray
    ) -> None:
        window, memory = shards.window, shards.memories[number]
        self._window, self._memory = window, memory
        self._whole = shards.consistent or shards.discard_above > 0
        """Whether each push is applied without interruption."""
        self._discard_above = shards.discard_above
        self._current: int | None = None
        self._number = number
        self._clients = clients
        self._rule = rule
        self.parameters = parameters
        self.state: State = {}
        self.rounded: np.ndarray | None = None
        self._wide = WideChunks(shards, number)
        self.begun = 0
        self.most: int | None = None
        self.before_change: Callable[[int, int], None] | None = None
        self.on_report: Callable[[int, Header], None] | None = None
        self.on_apply: Callable[[str, float, float], None] | None = None
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
        self._discarding = np.zeros(len(clients), bool)
        """Whether that push is too stale, so that nothing of it is applied."""
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
    def unfinished(self) -> int:
        """Pushes that are half applied."""
        return int(self._inside.sum())

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
        if self.rounded is not None:
            bfloat16.rounded(self.parameters, self.rounded)
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
        if self._whole:
            return self._apply_whole([client for client in ready if not self._waits(client)])
        moved = False
        for client in ready:
            if not self._waits(client):
                self._apply(client)
                moved = True
        return moved

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
            self._inside[client] = False
            if self._current == client:
                self._current = None
                self._step_sequence()
        return True

    def forgo(self, client: int, number: int) -> None:
        """Do not wait for a push of a `client` in the round of that `number`, where shards wait for any."""

    def _waiting(self, client: int) -> list[int]:
        """Return the kinds of the chunks that a client has posted, and that are not applied."""
        return [self._header(client, count).kind for count in range(self._applied[client], self._posted[client])]

    def _apply_alone(self, client: int) -> None:
        """Apply the next chunk of a client, in consistent shards as a part of the current push, unless that is held."""
        part = self._whole and self._next(client).kind != REPORT and self._current in (None, client)
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

    def _waits(self, client: int) -> bool:
        """Whether the next chunk of a client begins a push that may not begin for now."""
        if self.most is None or self._inside[client] or self._next(client).kind in (REPORT, WITHHELD):
            return False
        return self.version + int(self._inside.sum()) >= self.most

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
        elif header.kind != WITHHELD and not self._discards(client, header):
            self._update(header, client, count)
        if header.kind in (LAST, WITHHELD):
            self._samples[partition] += header.samples
        if header.kind == LAST and self._discarding[client]:
            self.tally.discarded += 1
        elif header.kind == LAST:
            self.tally.staleness.add(int(self._versions[partition]) - header.fetched)
            self.tally.pushes += 1
            self._versions[partition] += 1
        if header.kind != REPORT:
            self._inside[client] = header.kind == MORE
        if header.kind != MORE:
            self._counts[REPORT if header.kind == REPORT else LAST][client] += 1
        self._applied[client] = count + 1
        self._acknowledge(client)
        return header.kind

    def _acknowledge(self, client: int) -> None:
        """Let a client know how many of its chunks are applied."""
        self._window.store(self._clients[client], self._memory.applied(self._number), int(self._applied[client]))

    def _discards(self, client: int, header: Header) -> bool:
        """Whether the next chunk of a client, with that `header`, or the push until there was too stale."""
        if header.kept:
            return False
        if self._discard_above:
            # No other push comes in between, unless this one is held and others are settled meanwhile.
            staleness = int(self._versions[client % self._memory.partitions]) - header.fetched
            before = self._inside[client] and self._discarding[client]
            self._discarding[client] = before or staleness > self._discard_above
        return bool(self._discarding[client])

    def _chunk(self, client: int, count: int, header: Header, vector: int = 0) -> np.ndarray:
        """Return the data of a chunk, in place: of its gradient, or of vector 1, what this was computed at."""
        memory, start = self._window.local, header.parameters if vector else header.source
        if self._memory.reads(client):
            near = self._window.near(self._clients[client])
            assert near is not None
            memory = near
        else:
            start = self._memory.data(client, count, vector)
            if self._wide.are_rounded(self._clients[client], header):
                return self._wide.widen(memory[start:].view(BFLOAT16)[: header.length], vector)
        dtype = self.parameters.dtype
        chunk: np.ndarray = memory[start : start + header.length * dtype.itemsize].view(dtype)
        return chunk

    def _update(self, header: Header, client: int, count: int) -> None:
        """Apply the rule to the range that a client's chunk covers."""
        partition, chunk = client % self._memory.partitions, self._chunk(client, count, header)
        covered = slice(header.start, header.start + header.length)
        version = int(self._versions[partition])
        moment = Moment(version + 1 - self.begun, self._samples[partition], header.samples, version - header.fetched)
        compensates = isinstance(self._rule, DelayCompensated) and not header.kept
        fetched = self._chunk(client, count, header, 1) if compensates else None
        self._change(covered, chunk, moment, fetched)

    def _change(self, covered: slice, gradient: np.ndarray, moment: Moment, fetched: np.ndarray | None = None) -> None:
        """Apply the rule to a part of the range, by a gradient that was computed at the parameters `fetched`."""
        if self.before_change is not None:
            self.before_change(covered.start, covered.stop)
        began = time.perf_counter()
        step = covered.stop - covered.start if self.rounded is None else _BLOCK
        for start in range(covered.start, covered.stop, max(step, 1)):
            block = slice(start, min(start + step, covered.stop))
            part = slice(block.start - covered.start, block.stop - covered.start)
            state = {name: array[block] for name, array in self.state.items()}
            if isinstance(self._rule, DelayCompensated) and fetched is not None:
                self._rule.apply_delayed(self.parameters[block], gradient[part], fetched[part], state, moment)
            else:
                self._rule.apply(self.parameters[block], gradient[part], state, moment)
            if self.rounded is not None:
                bfloat16.rounded(self.parameters[block], self.rounded[block], far=True)
                self._window.sync()  # a client of another host that sends the next chunk may wait for an answer
        ended = time.perf_counter()
        self.tally.apply_seconds += ended - began
        self.tally.applied_bytes += gradient.nbytes
        if self.on_apply is not None:
            self.on_apply("apply", began, ended)
