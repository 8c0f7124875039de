"""Vectors as they were at one moment, written by a thread while they change: what changes first is copied before."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import numpy as np

BLOCK = 1 << 18
"""Elements that are copied at once: in float32 four blocks of checksums, which a core's cache holds."""
_PATIENCE = 30.0
"""Seconds after which a change does not wait any longer for a slow disk, and takes memory instead."""


class Snapshot:
    """The state of some vectors when this was made, in blocks.

    The thread that changes the vectors calls :meth:`keep` before it does.  Another thread takes the blocks, each once.
    A block that changes before it is taken is copied, and a third thread may copy :meth:`ahead`.

    Parameters
    ----------
    vectors
        By name, each (n,) and contiguous.
    most_bytes
        Memory for copies.  Where it is used up, a change waits until its block is taken.

    Attributes
    ----------
    waited
        Seconds that changes had to wait for copies.
    """

    def __init__(self, vectors: Mapping[str, np.ndarray], most_bytes: float = float("inf")) -> None:
        self._vectors = dict(vectors)
        self._safe = {name: np.zeros(-(-len(vector) // BLOCK), bool) for name, vector in vectors.items()}
        """Blocks that may change: those that are taken or copied."""
        self._copies: dict[tuple[str, int], np.ndarray] = {}
        self._most, self._held = most_bytes, 0
        self._wanted: deque[tuple[str, int]] = deque()
        """Blocks for which a change waits."""
        self._taken = threading.Condition()
        self._released = False
        self.waited = 0.0

    def keep(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Copy what has not been taken of the elements ``start ... stop`` of a vector `name`, which then may change."""
        if name not in self._safe:
            return
        safe, size = self._safe[name], len(self._vectors[name])
        first, last = start // BLOCK, -(-(size if stop is None else stop) // BLOCK)
        if safe[first:last].all():
            return
        began = time.perf_counter()
        for block in range(first, last):
            with self._taken:
                if not (safe[block] or self._copy(name, block)):
                    self._wanted.append((name, block))
                    if not self._taken.wait_for(lambda block=block: safe[block] or self._copy(name, block), _PATIENCE):  # type: ignore[misc]
                        self._most = float("inf")  # no change waits again
                        if not self._copy(name, block):
                            raise MemoryError("a checkpoint on a slow disk needs copies of what changes")
        self.waited += time.perf_counter() - began

    def ahead(self, moved: Callable[[], None]) -> None:
        """Copy all blocks while there is memory, so that changes need not wait; `moved` is called for each."""
        for name, safe in self._safe.items():
            for block in range(len(safe)):
                moved()
                with self._taken:
                    if self._released or not (safe[block] or self._copy(name, block)):
                        return

    def blocks(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Take all blocks: yield the name, the first element, and values that are valid until the next.

        They come vector after vector, but for those for which a change waits; none comes after :meth:`release`.
        """
        staged = np.empty(BLOCK, next(iter(self._vectors.values())).dtype)
        places = ((name, block) for name, safe in self._safe.items() for block in range(len(safe)))
        done: set[tuple[str, int]] = set()
        while True:
            with self._taken:
                place = self._wanted.popleft() if self._wanted else next(places, None)
                if self._released or place is None:  # the vectors may be gone, or all are taken
                    return
                if place in done:
                    continue
                values = self._copies.pop(place, None)
                if values is None:
                    source = self._block(*place)
                    values = staged[: len(source)]
                    np.copyto(values, source)
                    self._safe[place[0]][place[1]] = True
                else:
                    self._held -= values.nbytes
                self._taken.notify_all()
            done.add(place)
            yield place[0], place[1] * BLOCK, values

    def release(self) -> None:
        """Let everything change, and drop all copies."""
        with self._taken:
            self._released, self._held = True, 0
            for safe in self._safe.values():
                safe[:] = True
            self._copies.clear()
            self._taken.notify_all()

    def _block(self, name: str, block: int) -> np.ndarray:
        return self._vectors[name][block * BLOCK : (block + 1) * BLOCK]

    def _copy(self, name: str, block: int) -> bool:
        """Copy a block, which then may change; return False if there is no memory for it."""
        source = self._block(name, block)
        if self._held + source.nbytes > self._most:
            return False
        try:
            copy = source.copy()
        except MemoryError:
            self._most = self._held  # the writing thread gives back what there is
            return False
        self._copies[name, block] = copy
        self._held += copy.nbytes
        self._safe[name][block] = True
        return True
