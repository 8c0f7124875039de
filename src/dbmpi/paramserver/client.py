"""A worker's end of the parameter server: fetch the parameters, push a gradient."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from dbmpi.objective import Outcome
from dbmpi.paramserver.layout import Run
from dbmpi.paramserver.memory import Memory
from dbmpi.paramserver.server import LAST, MORE, REPORT, Header
from dbmpi.paramserver.window import Window
from dbmpi.runtime import waiting

LEAD = 0
"""The shard that keeps the run's order."""
_READ_AT_ONCE = 1 << 24
"""Elements of a chunk that is read in place: it costs the shard no memory, but others wait while it is applied."""
_NOTHING = Outcome(0, 0.0, 0)


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
    gradients
        Vectors in this rank's window for gradients that shards read in place; none if there are no such shards.
    parameters
        The shards' parameters where they lie, if this worker is to compute on them.
    serve
        Called while this rank waits, so that a shard or other duties on the same rank go on.
    counts
        Whether the run counts this client's steps and samples: of the partitions of a replica, only the first one's.
    runs
        Which parts of the whole vector this client's own is made of; by default all.  Only these are moved.

    Attributes
    ----------
    pushed_bytes
        Gradients given to the shards so far, also where they read them in place.
    fetched_bytes
        Parameters copied from the shards so far.
    """

    def __init__(
        self,
        window: Window,
        memories: Sequence[Memory],
        ranks: Sequence[int],
        ranges: Sequence[range],
        number: int,
        *,
        gradients: Sequence[np.ndarray] = (),
        parameters: np.ndarray | None = None,
        serve: Callable[[], bool] | None = None,
        runs: Sequence[Run] | None = None,
        counts: bool = True,
    ) -> None:
        self.gradients = tuple(gradients)
        self.parameters = parameters
        self.pushed_bytes = 0
        self.fetched_bytes = 0
        self._window = window
        self._memories = memories
        self._ranks = ranks
        self._number = number
        self._partition = number % memories[0].partitions
        self._serve = serve
        self._counts = counts
        whole = [Run(0, 0, ranges[-1].stop, pushed=True)]
        self._pieces = pieces(whole if runs is None else runs, ranges)
        # Every client begins with another shard, so that they do not all crowd at the first one.
        holders = [shard for shard in range(len(ranks)) if self._pieces[shard]]
        turn = number % max(len(holders), 1)
        self._order = holders[turn:] + holders[:turn]
        self._queues: list[deque[tuple[Header, np.ndarray]]] = [deque() for _ in ranks]
        self._queued = [0] * len(ranks)
        self._posted = [0] * len(ranks)
        self._fetched_version = [0] * len(ranks)
        self._applied = window.local[memories[0].applied(0) :][: len(ranks) * 8].view(np.int64)

    def fetch(self, parameters: np.ndarray) -> None:
        """Copy the shards' parameters into the flat vector, after all own pushes have been applied.

        A shard may apply another client's push meanwhile: parts of the vector may be of different versions, as in the
        paper.  The staleness of later pushes is counted from here.  If the vector is :attr:`parameters`, nothing has to
        be copied.
        """
        self._fetched_version = self._copy(parameters)

    def peek(self, parameters: np.ndarray) -> None:
        """Copy the parameters as :meth:`fetch` does, but for something else than the next gradient."""
        self._copy(parameters)

    def push(self, gradient: np.ndarray, outcome: Outcome, steps: int = 1) -> None:
        """Send the flat gradient to the shards.

        On return `gradient` may be changed, unless it is one of :attr:`gradients`: the shards may still be reading that
        (see :meth:`settle`).

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
            outcome, steps = _NOTHING, 0
        if self.gradients and self._place(gradient) is None:
            self.settle()
            np.copyto(self.gradients[0], gradient)
            gradient = self.gradients[0]
        for shard in self._order:
            for header, data in self._chunks(shard, gradient, outcome, steps):
                self._enqueue(shard, header, data)
        if steps and not any(piece.pushed for piece in self._pieces[LEAD]):
            # Shard 0 keeps the run's count of steps and samples, also of what it holds no part of.
            self._enqueue(LEAD, _report(outcome, steps), gradient[:0])
        waiting.until(self._progress, lambda: f"{self._late()} to take in a gradient", serve=self._serve)

    def settle(self) -> None:
        """Wait until everything pushed has been applied."""
        waiting.until(self._all_applied, lambda: f"{self._late()} to apply the last push", serve=self._serve)

    def _copy(self, parameters: np.ndarray) -> list[int]:
        """Copy the parameters, and return each shard's version."""
        self.settle()
        versions = [0] * len(self._ranks)
        for shard in self._order:
            memory, rank = self._memories[shard], self._ranks[shard]
            versions[shard] = self._window.load(rank, memory.version(self._partition))
            if parameters is self.parameters:
                continue
            for piece in self._pieces[shard]:
                part = parameters[piece.local : piece.local + piece.length]
                if self.parameters is not None:
                    np.copyto(part, self.parameters[piece.local : piece.local + piece.length])
                else:
                    self._window.get(rank, memory.parameters + piece.start * memory.itemsize, part)
                self.fetched_bytes += part.nbytes
        return versions

    def _all_applied(self) -> bool:
        self._window.sync()
        return bool(self._applied.tolist() == self._queued)

    def _late(self) -> str:
        """Name the shards that have not applied all yet."""
        late = [shard for shard in range(len(self._ranks)) if self._applied[shard] != self._queued[shard]]
        return ", ".join(f"shard {shard} on rank {self._ranks[shard]}" for shard in late)

    def _enqueue(self, shard: int, header: Header, data: np.ndarray) -> None:
        self._queues[shard].append((header, data))
        self._queued[shard] += 1

    def _progress(self) -> bool:
        """Post what the shards have room for; return whether nothing is left."""
        self._window.sync()
        ready = [shard for shard in self._order if self._queues[shard]]
        if self._queues[LEAD] and LEAD not in ready:
            ready.append(LEAD)  # counts alone
        while ready:
            # Chunks go to the shards in turn: all of them work at the same time.
            ready = [shard for shard in ready if self._post_next(shard) and self._queues[shard]]
        return not any(self._queues)

    def _post_next(self, shard: int) -> bool:
        """Post the next chunk for a shard and raise the flag, if there is room; return whether there was."""
        rank, memory, count = self._ranks[shard], self._memories[shard], self._posted[shard]
        if count - int(self._applied[shard]) >= memory.room(self._number):
            return False
        header, data = self._queues[shard].popleft()
        if self._number in memory.in_place:
            header = header._replace(source=self._place(data) or 0)
        else:
            self._window.put(rank, memory.data(self._number, count), data)
        self._window.put(rank, memory.header(self._number, count), header.pack())
        self._posted[shard] = count + 1
        self._window.store(rank, memory.posted(self._number), count + 1)
        self.pushed_bytes += data.nbytes
        return True

    def _place(self, vector: np.ndarray) -> int | None:
        """Return where in this rank's window a vector lies, if it does."""
        start = vector.ctypes.data - self._window.local.ctypes.data
        return start if 0 <= start < self._window.local.nbytes else None

    def _chunks(
        self, shard: int, gradient: np.ndarray, outcome: Outcome, steps: int
    ) -> list[tuple[Header, np.ndarray]]:
        """Cut what a shard gets of the gradient into chunks with their headers."""
        memory = self._memories[shard]
        size = _READ_AT_ONCE if self._number in memory.in_place else memory.chunk
        pushed = [piece for piece in self._pieces[shard] if piece.pushed]
        told = (self._fetched_version[shard], outcome.samples, outcome.correct, outcome.loss, steps)
        chunks = []
        for piece in pushed:
            for start in range(0, piece.length, size):
                length = min(size, piece.length - start)
                last = LAST if piece is pushed[-1] and start + length == piece.length else MORE
                local = piece.local + start
                header = Header(piece.start + start, length, last, *told)
                chunks.append((header, gradient[local : local + length]))
        return chunks


def _report(outcome: Outcome, steps: int) -> Header:
    """Return the header of a chunk of nothing, for its counts alone."""
    return Header(0, 0, REPORT, 0, outcome.samples, outcome.correct, outcome.loss, steps)


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
