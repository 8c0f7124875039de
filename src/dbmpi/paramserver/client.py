"""A worker's end of the parameter server: fetch the parameters, push a gradient."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from dbmpi.index.layout import Stretch, pieces
from dbmpi.mpi import waiting
from dbmpi.mpi.window import Window
from dbmpi.objective import Outcome
from dbmpi.paramserver.memory import Memory
from dbmpi.paramserver.server import LAST, MORE, REPORT, Header

LEAD = 0
"""The shard that keeps the run's order."""
_READ_AT_ONCE = 1 << 24
"""Elements of a chunk that is read in place: it costs the shard no memory, but others wait while it is applied."""
_NOTHING = Outcome(0, 0.0, 0)
_FETCHES, _PUSHES = 0, 1
Mark = tuple[int, ...]
"""A point in the sequence of what a client pushes, see :meth:`Client.mark`."""


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
        This client's own vector where the shards hold it, if this worker is to compute on it.
    serve
        Called while this rank waits, so that a shard or other duties on the same rank go on.
    counts
        Whether the run counts this client's steps and samples: of the partitions of a replica, only the first one's.
    runs
        Which parts of the whole vector this client's own is made of; by default all.  Only these are moved.
    consistent
        Whether what is fetched of a shard must be of one version, with no push half applied.

    Attributes
    ----------
    pushed_bytes
        Gradients given to the shards so far, also where they read them in place.
    fetched_bytes
        Parameters copied from the shards so far.
    pushed_chunks, fetched_pieces
        In how many transfers that was.
    far
        Whether some shard cannot read the gradient in place, so that sending it takes time.
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
        runs: Sequence[Stretch] | None = None,
        counts: bool = True,
        consistent: bool = False,
    ) -> None:
        self._consistent = consistent
        self.gradients = tuple(gradients)
        self.parameters = parameters
        self.pushed_bytes = 0
        self.fetched_bytes = 0
        self.pushed_chunks = 0
        self.fetched_pieces = 0
        self._window = window
        self._memories = memories
        self._ranks = ranks
        self._number = number
        self._partition = number % memories[0].partitions
        self._serve = serve
        self._counts = counts
        whole = [Stretch(0, 0, ranges[-1].stop, pushed=True)]
        self._runs = whole if runs is None else runs
        self._ranges = ranges
        self._pieces = pieces(self._runs, ranges)
        # Every client begins with another shard, so that they do not all crowd at the first one.
        holders = [shard for shard in range(len(ranks)) if self._pieces[shard]]
        turn = number % max(len(holders), 1)
        self._order = holders[turn:] + holders[:turn]
        self.far = any(not memories[shard].reads(number) for shard in holders)
        distant = [shard for shard in holders if window.near(ranks[shard]) is None]
        self._unheard = distant if window.transport == "rma" else []
        self._parts: list[list[list[Stretch]]] = []
        self._starts: list[int] = []
        self._final: list[int | None] = [None] * len(ranks)
        self._sending = threading.Lock()
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
        self.settle()
        self.fetched(self.copy(parameters, self._serve))

    def peek(self, parameters: np.ndarray) -> None:
        """Copy the parameters as :meth:`fetch` does, but for something else than the next gradient."""
        self.settle()
        self.copy(parameters, self._serve)

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
        told = _Told(outcome.samples, outcome.correct, outcome.loss, steps)
        for shard in self._order:
            self._enqueue_pieces(shard, self._pieces[shard], gradient, told, last=True)
        if not any(piece.pushed for piece in self._pieces[LEAD]):
            self.report(outcome, steps)
        self.drain(self._serve)

    @property
    def moved(self) -> tuple[int, int, int, int]:
        """Bytes pushed and fetched so far, and the numbers of their pieces."""
        return self.pushed_bytes, self.fetched_bytes, self.pushed_chunks, self.fetched_pieces

    def settle(self) -> None:
        """Wait until everything pushed has been applied."""
        self.wait(self.mark(), self._serve)

    # For transfers while something else is done

    def divide(self, parts: Sequence[range]) -> None:
        """Learn which ranges of the own vector are pushed one by one with :meth:`post`, the last one first."""
        starts = [run.local for run in self._runs]
        for part in parts:
            first = max(bisect_right(starts, part.start) - 1, 0)
            clipped = []
            for run in self._runs[first : bisect_left(starts, part.stop)]:
                start, stop = max(run.local, part.start), min(run.local + run.length, part.stop)
                if start < stop:
                    clipped.append(Stretch(run.start + start - run.local, start, stop - start, run.pushed))
            self._parts.append(pieces(clipped, self._ranges))
        self._starts = [part.start for part in parts]
        for number in reversed(range(len(parts))):
            for shard, found in enumerate(self._parts[number]):
                if any(piece.pushed for piece in found):
                    self._final[shard] = number

    def post(self, gradient: np.ndarray, part: int) -> None:
        """Put a part of a gradient in line for the shards; :meth:`progress` or :meth:`drain` sends it.

        A push is made of all parts, from the last to the first, and a :meth:`report`.  Until it is applied (see
        :meth:`mark`), the part, which is given alone, must stay as it is.
        """
        start, nothing = self._starts[part], _Told(0, 0, 0.0, 0)
        for shard in self._order:
            found, last = self._parts[part][shard], self._final[shard] == part
            self._enqueue_pieces(shard, found, gradient, nothing, last=last, origin=start)

    def report(self, outcome: Outcome, steps: int) -> None:
        """Tell shard 0, which keeps the run's count, of steps and samples; only what comes before is in it."""
        if self._counts and steps:
            header = Header(0, 0, REPORT, 0, outcome.samples, outcome.correct, outcome.loss, steps)
            self._enqueue(LEAD, header, self._applied[:0])

    def progress(self) -> bool:
        """Send what the shards have room for; return whether nothing is left.  Never waits for a shard."""
        self._window.sync()
        if self._sending.acquire(blocking=False):
            try:
                ready = [shard for shard, queue in enumerate(self._queues) if queue]
                ready.sort(key=lambda shard: (shard - self._number) % len(self._ranks))
                while ready:
                    # Chunks go to the shards in turn: all of them work at the same time.
                    ready = [shard for shard in ready if self._send_next(shard) and self._queues[shard]]
            finally:
                self._sending.release()
        return not any(self._queues)

    def drain(self, serve: Callable[[], bool] | None = None) -> None:
        """Send everything that is in line."""
        with self._announced(_PUSHES):
            waiting.until(self.progress, lambda: f"{self._late()} to take in a gradient", serve=serve)

    def mark(self) -> Mark:
        """Return the point in the sequence of pushes that is reached with what is in line now."""
        return tuple(self._queued)

    def wait(self, mark: Mark, serve: Callable[[], bool] | None = None) -> None:
        """Wait until everything before a mark has been applied."""

        def reached() -> bool:
            self.progress()
            return all(done >= wanted for done, wanted in zip(self._applied.tolist(), mark, strict=True))

        waiting.until(reached, lambda: f"{self._late()} to apply the last push", serve=serve)

    def copy(self, parameters: np.ndarray, serve: Callable[[], bool] | None = None) -> list[int]:
        """Copy the parameters as they are, own pushes applied or not; return the shards' versions before that."""
        versions = [0] * len(self._ranks)
        with self._announced(_FETCHES):
            for shard in self._order:
                if self._consistent:
                    versions[shard] = self._copy_consistently(shard, parameters, serve)
                else:
                    versions[shard] = self._version(shard)
                    self._begin_copy(shard, parameters)
            self._window.complete_gets()
        return versions

    def versions(self) -> list[int]:
        """Return each shard's version, as far as this client has a part in it."""
        versions = [0] * len(self._ranks)
        for shard in self._order:
            versions[shard] = self._version(shard)
        return versions

    def fetched(self, versions: list[int]) -> None:
        """Count the staleness of later pushes from these versions: the next gradient is computed from them."""
        self._fetched_version = versions

    # Helpers

    def _version(self, shard: int) -> int:
        return self._window.load(self._ranks[shard], self._memories[shard].version(self._partition))

    def _begin_copy(self, shard: int, parameters: np.ndarray) -> None:
        """Begin to copy what a shard holds, unless the vector is where it lies."""
        memory, rank = self._memories[shard], self._ranks[shard]
        for piece in self._pieces[shard] if parameters is not self.parameters else ():
            part = parameters[piece.local : piece.local + piece.length]
            if self.parameters is not None:
                np.copyto(part, self.parameters[piece.local : piece.local + piece.length])
            else:
                self._window.begin_get(rank, memory.parameters + piece.start * memory.itemsize, part)
            self.fetched_bytes += part.nbytes
            self.fetched_pieces += 1

    def _copy_consistently(self, shard: int, parameters: np.ndarray, serve: Callable[[], bool] | None) -> int:
        """Copy what a shard holds until no push was begun or ended meanwhile; return its version.

        After the first copy in vain the shard is asked to begin no other push, so that the next one succeeds.
        """
        memory, rank = self._memories[shard], self._ranks[shard]
        asked, version = False, 0

        def copied() -> bool:
            nonlocal asked, version
            before = self._window.load(rank, memory.sequence)
            if before % 2 == 0:
                version = self._version(shard)
                self._begin_copy(shard, parameters)
                self._window.complete_gets()
                if self._window.load(rank, memory.sequence) == before:
                    return True
            if not asked:
                asked = True
                self._window.store(rank, memory.wanted(self._number), 1)
            return False

        waiting.until(copied, f"shard {shard} on rank {rank} to be between two pushes", serve=serve)
        if asked:
            self._window.store(rank, memory.wanted(self._number), 0)
        return version

    @contextmanager
    def _announced(self, activity: int) -> Iterator[None]:
        """Tell shards on other hosts that data are on their way: while it does not sleep, its MPI moves them faster."""
        shards = self._unheard
        for shard in shards:
            self._window.store(self._ranks[shard], self._memories[shard].active(self._number, activity), 1)
        yield
        for shard in shards:
            self._window.store(self._ranks[shard], self._memories[shard].active(self._number, activity), 0)

    def _late(self) -> str:
        """Name the shards that have not applied all yet."""
        late = [shard for shard in range(len(self._ranks)) if self._applied[shard] != self._queued[shard]]
        return ", ".join(f"shard {shard} on rank {self._ranks[shard]}" for shard in late)

    def _enqueue(self, shard: int, header: Header, data: np.ndarray) -> None:
        self._queues[shard].append((header, data))
        self._queued[shard] += 1

    def _enqueue_pieces(
        self, shard: int, found: list[Stretch], gradient: np.ndarray, told: _Told, *, last: bool, origin: int = 0
    ) -> None:
        """Cut pieces of the gradient into chunks with their headers, and put them in line for a shard."""
        memory = self._memories[shard]
        size = _READ_AT_ONCE if memory.reads(self._number) else memory.chunk
        pushed = [piece for piece in found if piece.pushed]
        for piece in pushed:
            for start in range(0, piece.length, size):
                length = min(size, piece.length - start)
                ends = last and piece is pushed[-1] and start + length == piece.length
                local = piece.local + start - origin
                header = Header(
                    piece.start + start, length, LAST if ends else MORE, self._fetched_version[shard], *told
                )
                self._enqueue(shard, header, gradient[local : local + length])

    def _send_next(self, shard: int) -> bool:
        """Send the next chunk to a shard and raise the flag, if there is room; return whether there was."""
        rank, memory, count = self._ranks[shard], self._memories[shard], self._posted[shard]
        if count - int(self._applied[shard]) >= memory.room(self._number):
            return False
        header, data = self._queues[shard][0]
        if memory.reads(self._number):
            header = header._replace(source=self._place(data) or 0)
        else:
            self._window.put(rank, memory.data(self._number, count), data)
        self._window.put(rank, memory.header(self._number, count), header.pack())
        self._posted[shard] = count + 1
        self._window.store(rank, memory.posted(self._number), count + 1)
        self.pushed_bytes += data.nbytes
        self.pushed_chunks += bool(data.size)
        self._queues[shard].popleft()
        return True

    def _place(self, vector: np.ndarray) -> int | None:
        """Return where in this rank's window a vector lies, if it does."""
        start = vector.ctypes.data - self._window.local.ctypes.data
        return start if 0 <= start < self._window.local.nbytes else None


class _Told(NamedTuple):
    """What the header of a chunk says of the samples behind it."""

    samples: int
    correct: int
    loss: float
    steps: int
