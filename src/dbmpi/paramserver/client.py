"""A worker's end of the parameter server: fetch the parameters, push a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dbmpi.objective import Outcome
from dbmpi.paramserver.memory import SLOTS, Memory
from dbmpi.paramserver.server import Header
from dbmpi.paramserver.window import Window
from dbmpi.runtime import waiting


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
    """

    def __init__(
        self,
        window: Window,
        memories: Sequence[Memory],
        ranks: Sequence[int],
        ranges: Sequence[range],
        number: int,
        serve: Callable[[], bool] | None = None,
    ) -> None:
        self._window = window
        self._memories = memories
        self._ranks = ranks
        self._ranges = ranges
        self._number = number
        self._serve = serve
        # Every client begins with another shard, so that they do not all crowd at the first one.
        holders = [shard for shard in range(len(ranks)) if len(ranges[shard])]
        turn = number % len(holders)
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
        streams = [self._chunks(shard, gradient, outcome, steps) for shard in self._order]

        def some_slot_is_free() -> bool:
            return any(self._free(shard) for shard, _ in streams)

        while streams:
            waiting.until(some_slot_is_free, lambda: f"{self._late()} to take in a gradient", serve=self._serve)
            # Chunks go to the shards in turn: all of them work at the same time.
            streams = [stream for stream in streams if not self._free(stream[0]) or self._send(*stream)]
        self.pushed_bytes += gradient.nbytes

    def settle(self) -> None:
        """Wait until everything pushed has been applied."""
        waiting.until(self._all_applied, lambda: f"{self._late()} to apply the last push", serve=self._serve)

    def _copy(self, parameters: np.ndarray) -> list[int]:
        """Copy the parameters, and return each shard's version."""
        self.settle()
        versions = [0] * len(self._ranks)
        for shard in self._order:
            memory, held = self._memories[shard], self._ranges[shard]
            versions[shard] = self._window.load(self._ranks[shard], memory.version)
            self._window.get(self._ranks[shard], memory.parameters, parameters[held.start : held.stop])
        self.fetched_bytes += parameters.nbytes
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
        return header.last == 0

    def _chunks(
        self, shard: int, gradient: np.ndarray, outcome: Outcome, steps: int
    ) -> tuple[int, Iterator[tuple[Header, np.ndarray]]]:
        """Cut a shard's part of the gradient into chunks with their headers."""
        part = gradient[self._ranges[shard].start : self._ranges[shard].stop]
        size = self._memories[shard].chunk
        fetched = self._fetched_version[shard]

        def generate() -> Iterator[tuple[Header, np.ndarray]]:
            for start in range(0, part.size, size):
                data = part[start : start + size]
                last = int(start + size >= part.size)
                yield (
                    Header(start, data.size, last, fetched, outcome.samples, outcome.correct, outcome.loss, steps),
                    data,
                )

        return shard, generate()
