"""How named tensors lie in one flat vector, and how a vector is cut into shards.

Pure integers: nothing here knows MPI or holds parameters.  A parameter, its accrued gradient, its Adagrad sum
and its L-BFGS history are vectors of the same layout and are cut alike (docs/architecture.md, "One flat vector").
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Tensor:
    """A named array of parameters; the name is its path in a checkpoint, e.g. ``dense1/weights``."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Stretch(NamedTuple):
    """Consecutive elements that lie at `start` in the whole vector and at `local` in a worker's own."""

    start: int
    local: int
    length: int
    pushed: bool
    """Whether this worker pushes their gradient; of several that hold them, one does."""


@dataclass(frozen=True)
class Layout:
    """Tensors one behind the other, each in C order, in a flat vector of `size` elements."""

    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"tensor names must differ, but {sorted(twice)} occur more than once")

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each tensor starts in the flat vector."""
        offsets, position = {}, 0
        for tensor in self.tensors:
            offsets[tensor.name] = position
            position += tensor.size
        return offsets

    @cached_property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return sum(tensor.size for tensor in self.tensors)

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Return every tensor as a view, in its shape, into the flat `vector` of `size` elements."""
        if vector.shape != (self.size,):
            raise ValueError(f"the vector has shape {vector.shape}, the layout needs ({self.size},)")
        return {
            tensor.name: vector[self.offsets[tensor.name] :][: tensor.size].reshape(tensor.shape)
            for tensor in self.tensors
        }

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Tensor, int, int]]:
        """Yield ``(tensor, first, last)`` for the tensors that the flat range [start, stop) meets.

        `first` and `last` are positions in the flattened tensor, half open.
        """
        for tensor in self.tensors:
            offset = self.offsets[tensor.name]
            first, last = max(start, offset), min(stop, offset + tensor.size)
            if first < last:
                yield tensor, first - offset, last - offset


def cut(size: int, parts: int) -> tuple[range, ...]:
    """Cut ``range(size)`` into `parts` consecutive ranges whose lengths differ by one at most.

    Works for more parts than elements too: the last ranges are then empty.
    """
    if parts < 1:
        raise ValueError(f"a vector cannot be cut into {parts} parts")
    length, longer = divmod(size, parts)
    starts = [part * length + min(part, longer) for part in range(parts + 1)]
    return tuple(range(starts[part], starts[part + 1]) for part in range(parts))


def pieces(runs: Sequence[Stretch], ranges: Sequence[range]) -> list[list[Stretch]]:
    """Return for each shard, whose parts of the vector are `ranges`, its pieces of `runs`.

    The `start` of a piece counts from the shard's first element.

    Runs that lie one behind the other in both vectors make one piece: every piece costs a transfer and a flag.
    """
    found: list[list[Stretch]] = [[] for _ in ranges]
    stops = [held.stop for held in ranges]
    for run in runs:
        shard = bisect_right(stops, run.start)
        position = run.start
        while position < run.start + run.length:
            held = ranges[shard]
            stop = min(run.start + run.length, held.stop)
            if position < stop:
                local = run.local + position - run.start
                _append(found[shard], Stretch(position - held.start, local, stop - position, run.pushed))
                position = stop
            shard += 1
    return found


def divide(stretches: Sequence[Stretch], parts: Sequence[range]) -> Iterator[list[Stretch]]:
    """Yield the `stretches` that lie in each of the `parts` of a client's own vector."""
    starts = [stretch.local for stretch in stretches]
    for part in parts:
        clipped = []
        first = max(bisect_right(starts, part.start) - 1, 0)
        for stretch in stretches[first : bisect_left(starts, part.stop)]:
            start, stop = max(stretch.local, part.start), min(stretch.local + stretch.length, part.stop)
            if start < stop:
                clipped.append(Stretch(stretch.start + start - stretch.local, start, stop - start, stretch.pushed))
        yield clipped


def _append(found: list[Stretch], piece: Stretch) -> None:
    """Add a piece, to the end of the last one if it follows that."""
    if found:
        start, local, length, pushed = found[-1]
        if (start + length, local + length, pushed) == (piece.start, piece.local, piece.pushed):
            found[-1] = Stretch(start, local, length + piece.length, pushed)
            return
    found.append(piece)
