"""Vectors as they were at one moment, written by a thread while they change: what changes first is copied before."""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import numpy as np

BLOCK = 1 << 19
"""Elements that are copied at once: few enough for a core's cache."""
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
        self._memory = _Memory(sum(map(len, self._safe.values())), max(map(_block_bytes, vectors.values())), most_bytes)
        self._most, self._held, self._patient = most_bytes, 0, True
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
                        self._patient = False  # no change waits again
                        self._copy(name, block)
        self.waited += time.perf_counter() - began

    def ahead(self, moved: Callable[[], None]) -> None:
        """Copy all blocks while there is memory, so that changes need not wait; `moved` is called for each."""
        for name, block in self._places():
            moved()
            with self._taken:
                if self._released or not (self._safe[name][block] or self._copy(name, block)):
                    return

    def blocks(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Take all blocks: yield the name, the first element, and values that are valid until the next.

        They come in the order of the elements, those of all vectors together, as changes do; but those for which a
        change waits come first.  None comes after :meth:`release`.
        """
        staged = np.empty(BLOCK, next(iter(self._vectors.values())).dtype)
        places = self._places()
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
            done.add(place)
            yield place[0], place[1] * BLOCK, values
            with self._taken:
                if values.base is not staged:
                    self._memory.give_back(values)
                    self._held -= values.nbytes
                self._taken.notify_all()

    def release(self) -> None:
        """Let everything change, and drop all copies."""
        with self._taken:
            self._released, self._held = True, 0
            for safe in self._safe.values():
                safe[:] = True
            self._copies.clear()
            self._taken.notify_all()

    def _places(self) -> Iterator[tuple[str, int]]:
        """Yield all blocks in the order in which they are taken."""
        for block in range(max(map(len, self._safe.values()))):
            yield from ((name, block) for name, safe in self._safe.items() if block < len(safe))

    def _block(self, name: str, block: int) -> np.ndarray:
        return self._vectors[name][block * BLOCK : (block + 1) * BLOCK]

    def _copy(self, name: str, block: int) -> bool:
        """Copy a block, which then may change; return False if there is no memory for it."""
        source = self._block(name, block)
        if self._patient and self._held + source.nbytes > self._most:
            return False
        memory = self._memory.take(source.nbytes)
        if memory is None and self._patient:
            return False
        copy = source.copy() if memory is None else memory.view(source.dtype)
        np.copyto(copy, source)
        self._copies[name, block] = copy
        self._held += copy.nbytes
        self._safe[name][block] = True
        return True


class _Memory:
    """Memory for copies, of which the system has what is not in use.

    Parameters
    ----------
    blocks, size
        How many there may be, and the largest size of one in bytes.
    most_bytes
        More are not taken, but for one block.
    """

    def __init__(self, blocks: int, size: int, most_bytes: float) -> None:
        self._slot = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        blocks = int(min(blocks, most_bytes // self._slot + 1))
        self._free = list(range(blocks))[::-1]
        try:
            self._map = mmap.mmap(-1, max(blocks, 1) * self._slot, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # changes wait for the disk
            self._map, self._free = mmap.mmap(-1, mmap.PAGESIZE), []
        self._bytes = np.frombuffer(self._map, np.uint8)

    def take(self, nbytes: int) -> np.ndarray | None:
        """Return memory for a block of `nbytes`, uint8; None if all is in use."""
        if not self._free:
            return None
        start = self._free.pop() * self._slot
        return self._bytes[start : start + nbytes]

    def give_back(self, block: np.ndarray) -> None:
        """Let the system have the memory of a block again."""
        start = block.ctypes.data - self._bytes.ctypes.data
        if 0 <= start < len(self._bytes):
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED, start, self._slot)
            self._free.append(start // self._slot)


def _block_bytes(vector: np.ndarray) -> int:
    return min(len(vector), BLOCK) * vector.itemsize
