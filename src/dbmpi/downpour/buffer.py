"""Memory for the gradients of layers that are on their way to the shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from dbmpi.paramserver.client import Client, Mark

_ENOUGH = 1 << 24
"""Elements (64 MiB) up to which a buffer holds a whole gradient, so that small layers need not wait for each other."""


class Buffer:
    """Gives each part of a gradient its memory, and waits for the shards before this is used again.

    A gradient is computed from the last part to the first.  In memory for a whole gradient each part lies where it
    lies in the client's own vector; otherwise parts share memory, see :func:`offsets`.

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
            [other for other, its in enumerate(self._ranges) if max(mine.start, its.start) < min(mine.stop, its.stop)]
            for mine in self._ranges
        ]
        self._marks: dict[int, Mark] = {}

    def __call__(self, part: int) -> np.ndarray:
        """Return the memory for a part's flat gradient, when the shards have applied what was there."""
        self._wait(self._sharing[part])
        return self._view(part)

    def whole(self) -> np.ndarray:
        """Return all of the memory, when the shards have applied what was there."""
        self._wait(self._marks)
        return self.memory

    def push(self, part: int) -> None:
        """Put a part's complete gradient in line for the shards."""
        self._marks[part] = self._client.push(self._view(part), part)

    def _wait(self, parts: Iterable[int]) -> None:
        marks = [self._marks[part] for part in parts if part in self._marks]
        if marks:
            with self._waiting:
                self._client.wait(max(marks))  # they only grow: the latest holds for all

    def _view(self, part: int) -> np.ndarray:
        return self.memory[self._ranges[part].start : self._ranges[part].stop]


def buffer_size(parts: Sequence[range]) -> int:
    """Return the elements of a buffer that parts share: the largest part's, but those of all where that is little."""
    return max(max(map(len, parts), default=0), min(sum(map(len, parts)), _ENOUGH))


def offsets(parts: Sequence[range], size: int) -> list[range]:
    """Return for each part where its gradient lies in a buffer of `size` elements.

    The last part lies at the end, each other one before the part computed before it, and at the end again where the
    buffer is used up.  In a buffer as long as all parts together, these are the parts themselves.
    """
    found, stop = [range(0)] * len(parts), size
    for part in reversed(range(len(parts))):
        length = len(parts[part])
        stop = stop if length <= stop else size
        found[part] = range(stop - length, stop)
        stop -= length
    return found
