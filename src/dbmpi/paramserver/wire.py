"""What travels between hosts as bfloat16, at half the bytes: gradients with error feedback, parameters to nearest.

Ranks that share memory always move float32: the rounding is for a shard and a client that reach each other by the
transport alone (:meth:`dbmpi.mpi.window.Window.near` gives neither the memory of the other).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.kernels.bfloat16 import BFLOAT16, rounded, widened
from dbmpi.kernels.error_feedback import compile_error_feedback, round_with_error

if TYPE_CHECKING:
    from dbmpi.paramserver.protocol import Header, ShardMap

_FEW = 64
"""Elements that are copied before they are widened, rather than halved again."""


class ErrorFeedback:
    """A client's gradients on their way to other hosts: rounded, and what that leaves is added to the next ones.

    Parameters
    ----------
    size
        Elements of the client's own vector.
    chunk
        Largest number of elements that leave together.

    Attributes
    ----------
    kept : (size,) float32 array
        What is left of earlier gradients; always finite.
    due
        Whether something was pushed since nothing was kept.
    """

    def __init__(self, size: int, chunk: int) -> None:
        self.kept = np.zeros(size, np.float32)
        self.due = False
        self._leaving = np.empty((2, chunk), BFLOAT16)

    def rounded(self, vectors: Sequence[np.ndarray], kept: np.ndarray) -> list[np.ndarray]:
        """Return what leaves of a chunk, in memory that is used again for the next one.

        Parameters
        ----------
        vectors
            The gradient, and what it was computed at, or nothing; float32.
        kept
            The part of :attr:`kept` that belongs to the gradient; updated.
        """
        leaving = [memory[: vector.size] for memory, vector in zip(self._leaving, vectors, strict=True)]
        round_with_error(vectors[0], kept, leaving[0])
        if vectors[1].size:
            rounded(vectors[1].view(np.float32), leaving[1])
        return leaving

    def clear(self) -> None:
        """Keep nothing any more, as it is pushed."""
        self.kept[:] = 0
        self.due = False


class WideChunks:
    """A shard's memory to widen the chunks in that come from other hosts.

    Parameters
    ----------
    shards
        Where the shards are.
    number
        Of this one.
    """

    def __init__(self, shards: ShardMap, number: int) -> None:
        self._window, self._rounded = shards.window, shards.rounded
        self._wide = np.empty((2, shards.memories[number].chunk if self._rounded else 0), np.float32)

    def are_rounded(self, rank: int, header: Header) -> bool:
        """Return whether the chunk with this header is one of bfloat16.

        Parameters
        ----------
        rank
            Of its client.
        header
            What belongs to all of what a client has kept is float32.
        """
        return self._rounded and not header.kept and self._window.near(rank) is None

    def widen(self, chunk: np.ndarray, vector: int) -> np.ndarray:
        """Return a chunk as float32, in memory that is used again for the next one.

        Parameters
        ----------
        chunk : (n,) uint16 array
            As it came.
        vector
            0 for a gradient, 1 for what it was computed at.
        """
        wide: np.ndarray = self._wide[vector, : chunk.size]
        widened(chunk, wide)
        return wide


def landing(part: np.ndarray) -> np.ndarray:
    """Return where the bfloat16 numbers arrive that a float32 vector, `part`, gets: in the upper half of its memory."""
    half: np.ndarray = part.view(BFLOAT16)[part.size :]
    return half


def widen_landed(part: np.ndarray) -> None:
    """Widen the numbers in the upper half of the memory of a float32 vector, which they fill then.

    Parameters
    ----------
    part : (n,) float32 array
        :func:`landing` has given where they arrived.
    """
    bits, done = landing(part), 0
    while (left := part.size - done) > _FEW:
        # The first half of what is left ends where those that are not widened yet begin.
        step = left // 2
        widened(bits[done : done + step], part[done : done + step])
        done += step
    widened(bits[done:].copy(), part[done:])


def compile_wire() -> None:
    """Call everything compiled once."""
    compile_error_feedback()
    few = np.ones(1, np.float32)
    rounded(few, landing(few))
    widen_landed(few)
