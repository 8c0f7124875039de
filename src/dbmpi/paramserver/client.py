"""A worker's end of the parameter server: fetch the parameters, push a gradient."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from dbmpi.index.layout import Stretch
from dbmpi.mpi import waiting
from dbmpi.objective import Outcome
from dbmpi.paramserver.copies import PUSHES, ShardCopies
from dbmpi.paramserver.holdings import Holdings
from dbmpi.paramserver.protocol import LAST, LEAD, MORE, REPORT, WITHHELD, Header, RoundTurn, ShardMap
from dbmpi.paramserver.wire import ErrorFeedback

_READ_AT_ONCE = 1 << 24
"""Elements of a chunk that is read in place: it costs no memory, but other clients wait while it is applied."""
_NO_DATA = np.empty(0, np.uint8)
Mark = tuple[int, ...]
"""A point in the sequence of pushes: for each shard, how many chunks had been put in line for it."""


class Client(ShardCopies):
    """The connection of one worker with all shards.

    A gradient is pushed in parts, from the last to the first; by default it has one part, which is all of it.

    Parameters
    ----------
    shards
        Where the shards are.
    number
        Number of this client.
    stretches
        The pieces of the whole vector that make up this client's own; by default all.  Only these are moved.
    parts
        The ranges of the client's own vector that are pushed one by one.
    fetched
        The ranges of it that are fetched into arrays of their own; by default one range, all of it.
    gradients
        Vectors to compute gradients in, in this rank's window if shards read them in place.
    parameters
        This client's own vector where the shards hold it, if this worker is to compute on it.
    kept
        This client's own vector as it was fetched, if it goes with each gradient, for delay compensation; in this
        rank's window if shards read gradients in place.
    serve
        Called while this rank waits, so that its other duties, such as a shard, go on.

    Attributes
    ----------
    parts, gradients, parameters, kept, serve
        As given.
    rounded
        `parameters` in bfloat16, where the shards keep that, too.
    versions
        Each shard's version that the next gradient is computed from; the staleness of pushes is counted from there.
    samples
        Samples behind the next push, for schedules of the learning rate: to be set before it, 0 again after its report.
    pushed_bytes
        Bytes of gradients pushed so far, including those that shards read in place.
    fetched_bytes
        Bytes of parameters copied from the shards so far.
    pushed_chunks, fetched_pieces
        Number of transfers.
    turn
        The round that the next push belongs to.
    far
        Whether some shard cannot read the gradient in place, so that sending it takes time.
    """

    def __init__(
        self,
        shards: ShardMap,
        number: int,
        *,
        stretches: Sequence[Stretch] | None = None,
        parts: Sequence[range] | None = None,
        fetched: Sequence[range] | None = None,
        gradients: Sequence[np.ndarray] = (),
        parameters: np.ndarray | None = None,
        kept: np.ndarray | None = None,
        serve: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__(shards, number, Holdings(shards.ranges, stretches, parts, fetched), parameters)
        ranks, memories, window = shards.ranks, shards.memories, shards.window
        self.parts = self._held.parts
        self.gradients = tuple(gradients)
        self.kept = kept
        self.rounded: np.ndarray | None = None
        self.serve = serve
        self.samples = 0
        self.pushed_bytes = self.pushed_chunks = 0
        self._wire: ErrorFeedback | None = None
        if shards.rounded:
            self._wire = ErrorFeedback(self._held.size, max(memory.chunk for memory in memories))
        self.far = any(not memories[shard].reads(number) for shard in self._order)
        self._sending = threading.Lock()
        # Made when they are used: even an empty one takes half a KiB, and few clients push to all shards.
        self._queues: dict[int, deque[tuple[Header, np.ndarray, np.ndarray, np.ndarray]]] = {}
        self._queued = [0] * len(ranks)
        self._posted = [0] * len(ranks)
        self._unfinished: set[int] = set()
        self.turn = RoundTurn()
        self._begun: set[int] = set()
        """Shards that something of this turn's push is for."""
        self._left = False
        self.versions = [0] * len(ranks)
        self._applied = window.local[memories[0].applied(0) :][: len(ranks) * 8].view(np.int64)

    def fetch(self, *parameters: np.ndarray, for_gradient: bool = True, exact: bool = False) -> None:
        """Copy the shards' parameters into the flat vector, after all own pushes have been applied.

        A shard may apply another client's push meanwhile: parts of the vector may be of different versions, as in the
        paper.  If the vector is :attr:`parameters`, nothing has to be copied.

        Parameters
        ----------
        *parameters
            This client's own vector, to be filled, or one for each range that is fetched into an array of its own.
        for_gradient
            Whether the next gradient is computed from them; the staleness of later pushes is counted from here.
        exact
            Whether they must not be rounded on their way from other hosts; they never are unless for a gradient.
        """
        self.wait()
        versions = self.copy(*parameters, serve=self.serve, exact=exact or not for_gradient)
        if for_gradient:
            self.versions = versions
            if self.kept is not None and self.parameters is not None:
                np.copyto(self.kept, self.parameters)

    def push(self, gradient: np.ndarray, part: int = 0) -> Mark:
        """Put a part of a gradient in line for the shards; :meth:`progress` or :meth:`drain` sends it.

        Parameters
        ----------
        gradient
            The part alone, in one of :attr:`gradients`; it must stay as it is until :meth:`wait` has returned.
        part
            Its number in :attr:`parts`.

        Returns
        -------
        Mark
            For :meth:`wait`, until the part has been applied.
        """
        for shard in self._order:
            memory, found = self._memories[shard], [piece for piece in self._held.divided[part][shard] if piece.pushed]
            size = _READ_AT_ONCE if memory.reads(self._number) else memory.chunk
            for piece in found:
                for first in range(0, piece.length, size):
                    length = min(size, piece.length - first)
                    ends = self._held.final[shard] == part and piece is found[-1] and first + length == piece.length
                    local = piece.local - self.parts[part].start + first
                    kind, version = LAST if ends else MORE, self.versions[shard]
                    header = self._header(piece.start + first, length, kind, version, self.samples)
                    kept = _NO_DATA if self.kept is None else self.kept[piece.local + first :][:length]
                    error = self._error(shard)[piece.local + first :][:length]
                    self._enqueue(shard, header, gradient[local : local + length], kept, error)
        if self._wire is not None:
            self._wire.due = True
        return tuple(self._queued)

    def abandon(self) -> None:
        """End a push of which parts will never come, as shards may wait for its last one; what came of it counts."""
        for shard in sorted(self._unfinished):
            self._enqueue(shard, self._header(0, 0, LAST, self.versions[shard]), _NO_DATA)
        for shard in self.pushes_to if self.turn.round else ():
            if shard not in self._begun:
                self._enqueue(shard, self._header(0, 0, WITHHELD, self.versions[shard]), _NO_DATA)

    def peer(self, replica: int) -> int:
        """Return the number of the client of this partition of another `replica`."""
        partitions = self._memories[0].partitions
        return replica * partitions + self._number % partitions

    def begin_turn(self, turn: RoundTurn) -> None:
        """Take part in a round with the next push, as `turn` says."""
        self.turn = turn
        self._begun.clear()

    def leave(self) -> None:
        """Send nothing more, and wait for nothing: no shard takes anything of this client any more."""
        self._left = True

    def withhold(self) -> None:
        """Put a notice in line, in place of a push: shards count its samples, and change nothing."""
        for shard in self.pushes_to:
            self._enqueue(shard, self._header(0, 0, WITHHELD, self.versions[shard], self.samples), _NO_DATA)

    def report(self, outcome: Outcome, steps: int, *, withheld: bool = False) -> None:
        """Report the steps and samples behind a push to shard 0, which counts those of the run.

        The partitions of a replica learn from the same samples, and only the first one's report is sent.

        Parameters
        ----------
        outcome
            Of all samples behind the push.
        steps
            Number of gradients that were added up.
        withheld
            Whether :meth:`withhold` has taken the place of the push; losses then do not count.
        """
        if self._number % self._memories[0].partitions == 0:
            header = Header(
                0, 0, REPORT, 0, outcome.samples, outcome.correct, outcome.loss, steps, withheld=int(withheld)
            )
            self._enqueue(LEAD, header, _NO_DATA)
        self.samples = 0
        if self._wire is not None:
            self._wire.due = True

    def push_kept(self) -> None:
        """Push what roundings have left, and wait until it is applied: a part of earlier pushes, and none of its own.

        All partitions of a replica must do so after the same pushes, which stay as many on all shards.
        """
        if self._wire is None or not self._wire.due:
            return
        self.wait()
        for shard in self.pushes_to:
            size, error = self._memories[shard].chunk, self._error(shard)
            ends = self._header(0, 0, WITHHELD, self.versions[shard])._replace(kept=1)
            for piece in self._held.whole[shard] if error.size else ():
                for first in range(0, piece.length if piece.pushed else 0, size):
                    length = min(size, piece.length - first)
                    header = ends._replace(start=piece.start + first, length=length, kind=MORE)
                    self._enqueue(shard, header, error[piece.local + first :][:length])
            self._enqueue(shard, ends, _NO_DATA)
        if self._number % self._memories[0].partitions == 0:
            self._enqueue(LEAD, Header(0, 0, REPORT, 0), _NO_DATA)
        self.drain(self.serve)
        self.wait()
        self._wire.clear()

    def wait(self, mark: Mark | None = None) -> None:
        """Wait until everything before a mark has been applied; by default everything."""
        wanted = tuple(self._queued) if mark is None else mark

        def reached() -> bool:
            self.progress()
            return self._left or all(done >= count for done, count in zip(self._applied.tolist(), wanted, strict=True))

        waiting.until(reached, lambda: f"{self._late()} to apply the last push", serve=self.serve)

    def progress(self) -> bool:
        """Send as much as the shards can take; return whether nothing is left.  Never waits for a shard."""
        self._window.sync()
        if self._left:
            return True
        if self._sending.acquire(blocking=False):
            try:
                ready = [shard for shard, queue in list(self._queues.items()) if queue]
                ready.sort(key=lambda shard: (shard - self._number) % len(self._ranks))
                while ready and not self._left:
                    # Chunks go to the shards in turn: all of them work at the same time.
                    ready = [shard for shard in ready if self._send_next(shard) and self._queues[shard]]
            finally:
                self._sending.release()
        return not any(list(self._queues.values()))

    def drain(self, serve: Callable[[], bool] | None = None) -> None:
        """Send everything that is in line, and `serve` meanwhile; only the worker's own thread may do that."""
        with self._announced(PUSHES):
            waiting.until(self.progress, lambda: f"{self._late()} to take in a gradient", serve=serve)

    @property
    def pushes_to(self) -> list[int]:
        """Shards that take something of this client's gradient."""
        return self._held.pushes_to

    @property
    def moved(self) -> tuple[int, int, int, int]:
        """Bytes pushed and fetched so far, and the numbers of transfers."""
        return self.pushed_bytes, self.fetched_bytes, self.pushed_chunks, self.fetched_pieces

    def _late(self) -> str:
        """Name the shards that have not applied all yet."""
        late = [shard for shard in range(len(self._ranks)) if self._applied[shard] != self._queued[shard]]
        return ", ".join(f"shard {shard} on rank {self._ranks[shard]}" for shard in late)

    def _header(self, start: int, length: int, kind: int, version: int, samples: int = 0) -> Header:
        """Return the header of a chunk of this turn's push."""
        return Header(start, length, kind, version, samples, **self.turn._asdict())

    def _error(self, shard: int) -> np.ndarray:
        """Return what is kept of roundings where a shard gets rounded gradients; otherwise nothing."""
        if self._wire is None or self._window.near(self._ranks[shard]) is not None:
            return _NO_DATA
        return self._wire.kept

    def _enqueue(
        self,
        shard: int,
        header: Header,
        data: np.ndarray,
        kept: np.ndarray = _NO_DATA,
        error: np.ndarray = _NO_DATA,
    ) -> None:
        if header.kind != REPORT:
            self._begun.add(shard)
        if header.kind == MORE:
            self._unfinished.add(shard)
        elif header.kind == LAST:
            self._unfinished.discard(shard)
        self._queues.setdefault(shard, deque()).append((header, data, kept, error))
        self._queued[shard] += 1

    def _send_next(self, shard: int) -> bool:
        """Send the next chunk to a shard and raise the flag, if there is a free slot; return whether there was."""
        rank, memory, count = self._ranks[shard], self._memories[shard], self._posted[shard]
        if count - int(self._applied[shard]) >= memory.slots(self._number):
            return False
        header, *vectors, error = self._queues[shard][0]
        if error.size and self._wire is not None:
            vectors = self._wire.rounded(vectors, error)
        for number, vector in enumerate(vectors):
            if vector.size and memory.reads(self._number):
                offset = self._offset(vector)
                header = header._replace(parameters=offset) if number else header._replace(source=offset)
            elif vector.size:
                self._window.put(rank, memory.data(self._number, count, number), vector)
        self._window.put(rank, memory.header(self._number, count), header.pack())
        self._posted[shard] = count + 1
        self._window.store(rank, memory.posted(self._number), count + 1)
        self.pushed_bytes += sum(vector.nbytes for vector in vectors)
        self.pushed_chunks += bool(vectors[0].size)
        self._queues[shard].popleft()
        return True

    def _offset(self, vector: np.ndarray) -> int:
        """Return where in this rank's window a vector lies."""
        start: int = vector.ctypes.data - self._window.local.ctypes.data
        assert 0 <= start < self._window.local.nbytes, "a shard can read a gradient in this rank's window alone"
        return start
