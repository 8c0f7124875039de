"""Memory for the gradients of layers that are on their way to the shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from dbmpi.paramserver.client import Client, Mark

_ENOUGH = 1 << 24
"""Elements (64 MiB) up to which a buffer holds a whole gradient, so that small layers need not wait for each other."""


class Buffer:
    """Provides the memory for each part of a gradient, once the shards have applied the gradients written there before.

    A gradient is computed from the last part to the first.  Where the memory holds a whole gradient, each part has the
    offset that it has in the client's own vector; otherwise parts share memory, see :func:`offsets`.

    Parameters
    ----------
    client
        Pushes the gradients part by part.
    memory
        The buffer, flat; one of the client's gradients.
    waiting
        Entered while a part waits for its memory, to account for that time.
    """

    def __init__(self, client: Client, memory: np.ndarray, waiting: AbstractContextManager[None]) -> None:
        self._client, self._waiting = client, waiting
        self.memory = memory
        self._ranges = offsets(client.parts, memory.size)
        self._sharing = [
            [
                other
                for other, theirs in enumerate(self._ranges)
                if max(mine.start, theirs.start) < min(mine.stop, theirs.stop)
            ]
            for mine in self._ranges
        ]
        self._marks: dict[int, Mark] = {}

    def __call__(self, part: int) -> np.ndarray:
        """Return the memory for the flat gradient of that `part`, when the shards have applied its old content."""
        self._wait(self._sharing[part])
        return self.part(part)

    def whole(self) -> np.ndarray:
        """Return all of the memory, when the shards have applied its old content."""
        self._wait(self._marks)
        return self.memory

    def push(self, part: int) -> None:
        """Put the complete gradient of that `part` in line for the shards."""
        self._marks[part] = self._client.push(self.part(part), part)

    def _wait(self, parts: Iterable[int]) -> None:
        marks = [self._marks[part] for part in parts if part in self._marks]
        if marks:
            with self._waiting:
                self._client.wait(max(marks))  # they only grow: the latest holds for all

    def part(self, part: int) -> np.ndarray:
        """Return the memory for the flat gradient of that `part`, whatever is in it."""
        return self.memory[self._ranges[part].start : self._ranges[part].stop]


def buffer_size(parts: Sequence[range]) -> int:
    """Return the elements of a buffer that `parts` share: the size of the largest, or of all if that is little."""
    return max(max(map(len, parts), default=0), min(sum(map(len, parts)), _ENOUGH))


def offsets(parts: Sequence[range], size: int) -> list[range]:
    """Return for each part the range of a buffer of `size` elements that its gradient uses.

    The last part is at the end of the buffer.  Each other part precedes the one above it, or is at the end again when
    too little is left in front.  In a buffer as long as all parts together, the ranges are the parts themselves.
    """
    ranges, stop = [range(0)] * len(parts), size
    for part in reversed(range(len(parts))):
        length = len(parts[part])
        stop = stop if length <= stop else size
        ranges[part] = range(stop - length, stop)
        stop -= length
    return ranges
