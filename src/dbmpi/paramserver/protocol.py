"""The protocol between clients and shards: where the shards are, and the header of a chunk.

A push to a shard is a sequence of chunks, and the shard counts a version for the one marked as the last.  The numbers
of steps and samples behind a push travel by themselves, to the first shard alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from dbmpi.mpi.window import Window
    from dbmpi.paramserver.memory import Memory

LEAD = 0
"""The shard that keeps the run's order, and counts its steps and samples."""
MORE, LAST, REPORT, WITHHELD = 0, 1, 2, 3
"""Kinds of chunks: others of the same push follow; the last one of a push to this shard; no data, only counts; no data,
in place of a whole push that the client withholds."""
HEADER_WORDS = 16
"""64-bit words of a header, two cache lines."""
_LAYOUT = struct.Struct(f"=6qd8q{8 * (HEADER_WORDS - 15)}x")


@dataclass(frozen=True, kw_only=True)
class ShardMap:
    """Where the shards are."""

    window: Window
    """The window of all ranks."""
    memories: Sequence[Memory]
    """The layout of each shard's window."""
    ranks: Sequence[int]
    """World rank of each shard."""
    ranges: Sequence[range]
    """The range of the flat parameter vector that each shard holds."""
    consistent: bool = False
    """Whether a push is applied as a whole, and a fetch from a shard never sees one half applied."""
    discard_above: int = 0
    """Staleness above which a shard drops a push; 0 for none."""
    rounded: bool = False
    """Whether gradients, and the parameters that they are computed at, travel between hosts as bfloat16."""


class RoundTurn(NamedTuple):
    """What a client takes part in with a push, where shards apply the pushes of a round together."""

    round: int = 0
    """Number of the round in this session, from 1; 0 where each push stands alone."""
    needed: int = 0
    """Pushes with which the round is complete."""
    after: int = -1
    """Client after whose push this one is added; -1 if the order does not matter, or for the first one."""


class Header(NamedTuple):
    """A client's description of a chunk."""

    start: int
    """First element of the shard's range that the chunk covers."""
    length: int
    """Elements of the chunk."""
    kind: int
    """`MORE`, `LAST`, `REPORT` or `WITHHELD`."""
    fetched: int
    """Version of the shard that the client's parameters came from."""
    samples: int = 0
    """Samples behind the push; the next three are those of a report alone."""
    correct: int = 0
    """Of these, samples classified correctly; -1 if that has no meaning."""
    loss: float = 0.0
    """Sum of the losses of the samples."""
    steps: int = 0
    """Steps whose gradients were accrued."""
    source: int = -1
    """Offset of the chunk in the client's window if it is read in place; -1 if it is in the inbox."""
    withheld: int = 0
    """Of a report, whether its push was withheld."""
    parameters: int = -1
    """As `source`, for the parameters that the gradient was computed at, which go with it for delay compensation."""
    round: int = 0
    """This and the next two: those of the :class:`RoundTurn`."""
    needed: int = 0
    after: int = -1
    kept: int = 0
    """Whether this is what roundings of the client's earlier pushes have left: float32, and never too stale."""

    def pack(self) -> np.ndarray:
        """Return the words, int64."""
        return np.frombuffer(_LAYOUT.pack(*self), np.int64)

    @classmethod
    def unpack(cls, words: np.ndarray) -> Header:
        """Read the `words` that :meth:`pack` wrote."""
        return cls(*_LAYOUT.unpack(words.tobytes()))
