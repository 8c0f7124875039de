"""A worker's end of the parameter server: fetch the parameters, push a gradient."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dbmpi.objective import Outcome
from dbmpi.paramserver.layout import Run
from dbmpi.paramserver.memory import SLOTS, Memory
from dbmpi.paramserver.server import LAST, MORE, REPORT, Header
from dbmpi.paramserver.window import Window
from dbmpi.runtime import waiting

LEAD = 0
"""The shard that keeps the run's order."""


class Client:
    """The connection of one worker with all shards.

    Parameters
    ----------
    window
        The window of all ranks.
    memories
        What lies where in each shard's window.
    ranks
        World rank of each shard.
    ranges
        The range of the flat parameter vector that each shard holds.
    number
        Number of this client.
    serve
        Called while this rank waits, so that a shard or other duties on the same rank go on.
    counts
        Whether the run counts this client's steps and samples: of the partitions of a replica, only the first one's.
    runs
        Which parts of the whole vector this client's own is made of; by default all.  Only these are moved.
    """

    def __init__(
        self,
        window: Window,
        memories: Sequence[Memory],
        ranks: Sequence[int],
        ranges: Sequence[range],
        number: int,
        serve: Callable[[], bool] | None = None,
        runs: Sequence[Run] | None = None,
        counts: bool = True,
    ) -> None:
        self._window = window
        self._memories = memories
        self._ranks = ranks
        self._number = number
        self._serve = serve
        self._counts = counts
        whole = [Run(0, 0, ranges[-1].stop, pushed=True)]
        self._pieces = pieces(whole if runs is None else runs, ranges)
        # Every client begins with another shard, so that they do not all crowd at the first one.
        holders = [shard for shard in range(len(ranks)) if self._pieces[shard]]
        turn = number % max(len(holders), 1)
        self._order = holders[turn:] + holders[:turn]
        self._posted = [0] * len(ranks)
        self._fetched_version = [0] * len(ranks)
        self._applied = window.local[memories[0].applied(0) :][: len(ranks) * 8].view(np.int64)
        self.pushed_bytes = 0
        self.fetched_bytes = 0

    def fetch(self, parameters: np.ndarray) -> None:
        """Copy the shards' parameters into the flat vector, after all own pushes have been applied.

        A shard may apply another client's push meanwhile: parts of the vector may be of different versions, as in the
        paper.  The staleness of later pushes is counted from here.
        """
        self._fetched_version = self._copy(parameters)

    def peek(self, parameters: np.ndarray) -> None:
        """Copy the parameters as :meth:`fetch` does, but for something else than the next gradient."""
        self._copy(parameters)

    def push(self, gradient: np.ndarray, outcome: Outcome, steps: int = 1) -> None:
        """Send the flat gradient to the shards.

        On return `gradient` may be changed; the shards may still be applying it (see :meth:`settle`).

        Parameters
        ----------
        gradient
            Sum of the gradients of `steps` steps.
        outcome
            What these steps' samples gave, for the run's reports.
        steps
            Number of steps behind the gradient.
        """
        if not self._counts:
            outcome, steps = Outcome(0, 0.0, 0), 0
        streams = [(shard, self._chunks(shard, gradient, outcome, steps)) for shard in self._order]
        if steps and not any(piece.pushed for piece in self._pieces[LEAD]):
            # Shard 0 keeps the run's count of steps and samples, also of what it holds no part of.
            header = Header(0, 0, REPORT, 0, outcome.samples, outcome.correct, outcome.loss, steps)
            streams.append((LEAD, iter([(header, gradient[:0])])))

        def some_slot_is_free() -> bool:
            return any(self._free(shard) for shard, _ in streams)

        while streams:
            waiting.until(some_slot_is_free, lambda: f"{self._late()} to take in a gradient", serve=self._serve)
            # Chunks go to the shards in turn: all of them work at the same time.
            streams = [stream for stream in streams if not self._free(stream[0]) or self._send(*stream)]

    def settle(self) -> None:
        """Wait until everything pushed has been applied."""
        waiting.until(self._all_applied, lambda: f"{self._late()} to apply the last push", serve=self._serve)

    def _copy(self, parameters: np.ndarray) -> list[int]:
        """Copy the parameters, and return each shard's version."""
        self.settle()
        versions = [0] * len(self._ranks)
        for shard in self._order:
            memory, rank = self._memories[shard], self._ranks[shard]
            versions[shard] = self._window.load(rank, memory.version)
            for piece in self._pieces[shard]:
                part = parameters[piece.local : piece.local + piece.length]
                self._window.get(rank, memory.parameters + piece.start * memory.itemsize, part)
                self.fetched_bytes += part.nbytes
        return versions

    def _all_applied(self) -> bool:
        self._window.sync()
        return bool(self._applied.tolist() == self._posted)

    def _late(self) -> str:
        """Name the shards that have not applied all yet."""
        late = [shard for shard in self._order if self._applied[shard] != self._posted[shard]]
        return ", ".join(f"shard {shard} on rank {self._ranks[shard]}" for shard in late)

    def _free(self, shard: int) -> bool:
        """Whether a slot of the shard's ring is free."""
        self._window.sync()
        return self._posted[shard] - int(self._applied[shard]) < SLOTS

    def _send(self, shard: int, chunks: Iterator[tuple[Header, np.ndarray]]) -> bool:
        """Put the next chunk into a free slot and raise the flag; return whether more may follow."""
        item = next(chunks, None)
        if item is None:
            return False
        header, data = item
        rank, memory, count = self._ranks[shard], self._memories[shard], self._posted[shard]
        self._window.put(rank, memory.header(self._number, count), header.pack())
        self._window.put(rank, memory.data(self._number, count), data)
        self._posted[shard] = count + 1
        self._window.store(rank, memory.posted(self._number), count + 1)
        self.pushed_bytes += data.nbytes
        return header.last == MORE

    def _chunks(
        self, shard: int, gradient: np.ndarray, outcome: Outcome, steps: int
    ) -> Iterator[tuple[Header, np.ndarray]]:
        """Cut what a shard gets of the gradient into chunks with their headers."""
        size = self._memories[shard].chunk
        pushed = [piece for piece in self._pieces[shard] if piece.pushed]
        told = (self._fetched_version[shard], outcome.samples, outcome.correct, outcome.loss, steps)
        for piece in pushed:
            for start in range(0, piece.length, size):
                length = min(size, piece.length - start)
                last = LAST if piece is pushed[-1] and start + length == piece.length else MORE
                local = piece.local + start
                yield Header(piece.start + start, length, last, *told), gradient[local : local + length]


def pieces(runs: Sequence[Run], ranges: Sequence[range]) -> list[list[Run]]:
    """Return for each shard the pieces of the runs that it holds; their `start` counts from its first element.

    Runs that lie one behind the other in both vectors make one piece: every piece costs a transfer and a flag.
    """
    found: list[list[Run]] = [[] for _ in ranges]
    stops = [held.stop for held in ranges]
    for run in runs:
        shard = bisect_right(stops, run.start)
        position = run.start
        while position < run.start + run.length:
            held = ranges[shard]
            stop = min(run.start + run.length, held.stop)
            if position < stop:
                local = run.local + position - run.start
                _append(found[shard], Run(position - held.start, local, stop - position, run.pushed))
                position = stop
            shard += 1
    return found


def _append(found: list[Run], piece: Run) -> None:
    """Add a piece, to the end of the last one if it follows that."""
    if found:
        start, local, length, pushed = found[-1]
        if (start + length, local + length, pushed) == (piece.start, piece.local, piece.pushed):
            found[-1] = Run(start, local, length + piece.length, pushed)
            return
    found.append(piece)
