"""Vectors as they were at one moment, written by a thread while they change: what changes first is copied before."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import numpy as np

BLOCK = 1 << 18
"""Elements that are copied at once: in float32 four blocks of checksums, which a core's cache holds."""


class Snapshot:
    """The state of some vectors when this was made, in blocks.

    The thread that changes the vectors calls :meth:`keep` before it does.  Another thread takes the blocks, each once.
    A block that changes before it is taken is copied; no more memory is needed than for these copies.

    Parameters
    ----------
    vectors
        By name, each (n,) and contiguous.
    """

    def __init__(self, vectors: Mapping[str, np.ndarray]) -> None:
        self._vectors = dict(vectors)
        self._safe = {name: np.zeros(-(-len(vector) // BLOCK), bool) for name, vector in vectors.items()}
        """Blocks that may change: those that are taken or copied."""
        self._copies: dict[tuple[str, int], np.ndarray] = {}
        self._lock = threading.Lock()
        self.copied_bytes = 0

    def keep(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Copy what has not been taken of the elements ``start ... stop`` of a vector `name`, which then may change."""
        if name not in self._safe:
            return
        vector, safe = self._vectors[name], self._safe[name]
        first, last = start // BLOCK, -(-(len(vector) if stop is None else stop) // BLOCK)
        if safe[first:last].all():
            return
        for block in range(first, last):
            with self._lock:
                if not safe[block]:
                    copy = vector[block * BLOCK : (block + 1) * BLOCK].copy()
                    self._copies[name, block] = copy
                    self.copied_bytes += copy.nbytes
                    safe[block] = True

    def blocks(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Take all blocks, vector after vector: yield the name, the first element, and values valid until the next."""
        staged = np.empty(BLOCK, next(iter(self._vectors.values())).dtype)
        for name, vector in self._vectors.items():
            safe = self._safe[name]
            for block in range(len(safe)):
                start = block * BLOCK
                with self._lock:
                    values = self._copies.pop((name, block), None)
                    if values is None:
                        values = staged[: len(vector) - start]
                        np.copyto(values, vector[start : start + len(values)])
                        safe[block] = True
                yield name, start, values

    def release(self) -> None:
        """Let everything change, and drop all copies."""
        with self._lock:
            for safe in self._safe.values():
                safe[:] = True
            self._copies.clear()
