"""The order in which the shards hold the whole parameters, and where one shard ends and the next one begins.

Checkpoints, initial values and replicas know one order of the whole vector, that of the layout.  The shards may hold it
in another: first all that the first partition pushes, then the second's, and so on, so that a worker's own vector is
one piece and lies on few shards.  Pure integers, computed alike on every rank.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.index.layout import Layout, cut
from dbmpi.replica.tensors import Part, tensor_parts

if TYPE_CHECKING:
    from dbmpi.config import ServerSection
    from dbmpi.network.layer import Layer
    from dbmpi.replica.placement import Placement


class Piece(NamedTuple):
    """Consecutive elements of the whole vector that are consecutive on a shard, too."""

    start: int
    """In the whole vector."""
    local: int
    """Counted from the beginning of the range that was asked for."""
    length: int


@dataclass(frozen=True)
class Arrangement:
    """The shards' order of the elements of a layout.

    Attributes
    ----------
    ranges
        What each shard holds, in the shards' order.
    parts
        The parts that follow one another in the shards' order, each in C order; empty where it is the layout's own.
    """

    layout: Layout
    ranges: tuple[range, ...]
    parts: tuple[Part, ...] = ()

    def pieces(self, wanted: range) -> Iterator[Piece]:
        """Yield the pieces of the whole vector that make up the range `wanted` of the shards' order."""
        if not self.parts:
            yield Piece(wanted.start, 0, len(wanted))
            return
        number = max(bisect_right(self._starts, wanted.start) - 1, 0)
        for part, first in zip(self.parts[number:], self._starts[number:], strict=True):
            if first >= wanted.stop:
                return
            offset, position = self.layout.offsets[part.tensor.name], first
            for run in part.box.runs(part.tensor.shape):
                start, stop = max(position, wanted.start), min(position + len(run), wanted.stop)
                if start < stop:
                    yield Piece(offset + run.start + start - position, start - wanted.start, stop - start)
                position += len(run)

    def ranges_of(self, part: Part) -> Iterator[range]:
        """Yield the ranges of the shards' order with the elements of a part, in C order."""
        if self.parts:
            start = self._starts[self._numbers[part]]
            yield range(start, start + part.box.size)
            return
        offset = self.layout.offsets[part.tensor.name]
        yield from (range(offset + run.start, offset + run.stop) for run in part.box.runs(part.tensor.shape))

    @cached_property
    def _numbers(self) -> dict[Part, int]:
        return {part: number for number, part in enumerate(self.parts)}

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return (0, *accumulate(part.box.size for part in self.parts))[: len(self.parts)]


def from_config(
    section: ServerSection, layers: Sequence[Layer], layout: Layout, placement: Placement, shards: int
) -> Arrangement:
    """Return the arrangement that a configuration asks for.

    Parameters
    ----------
    section
        The ``[server]`` section.
    layers, layout, placement, shards
        As for `aligned`.

    Raises
    ------
    UserError
        If workers are to compute where the shards hold the parameters, and the own vector of one is not in one piece.
    """
    if section.align == "equal":
        return equal(layout, shards)
    arrangement = aligned(layers, layout, placement, shards)
    shared = [part.tensor.name for part in arrangement.parts if part.shared]
    if shared and section.fetch == "shared":
        raise UserError(
            f'server.fetch = "shared": several partitions hold {shared[0]!r}, which lies with one of them only; '
            'expected that each tensor is of one partition: set server.fetch = "copied", or cut that layer by maps in '
            "[placement]"
        )
    return arrangement


def equal(layout: Layout, shards: int) -> Arrangement:
    """Return the layout's own order, cut into as many equal ranges as there are `shards`."""
    return Arrangement(layout, cut(layout.size, shards))


def aligned(layers: Sequence[Layer], layout: Layout, placement: Placement, shards: int) -> Arrangement:
    """Return the order by partitions, cut where these end, so that a worker's part lies on as few shards as can be.

    With as many shards as partitions, or a multiple, each shard holds of one partition only; with fewer, each holds
    some partitions wholly.  Where neither number divides the other, some shards hold more than others.

    Parameters
    ----------
    layers, layout
        The network, and the whole vector of its parameters.
    placement
        What each partition computes.
    shards
        Number of shards.
    """
    parts = list(tensor_parts(layers, placement))
    for tensor in layout.tensors:
        # Elements that no worker needs must lie somewhere, too.
        rest = [Box.whole(tensor.shape)]
        mine = [part.box for part in parts if part.tensor == tensor]
        if sum(box.size for box in mine) < tensor.size:
            for box in mine:
                rest = [piece for one in rest for piece in one.minus(box)]
            parts += [Part(tensor, box, (), 0) for box in rest]
    parts.sort(key=lambda part: part.owner)
    sizes = [0] * placement.partitions
    for part in parts:
        sizes[part.owner] += part.box.size
    return Arrangement(layout, _ranges(sizes, shards), tuple(parts))


def _ranges(sizes: Sequence[int], shards: int) -> tuple[range, ...]:
    """Cut what partitions of some sizes push, one behind the other, into so many ranges."""
    starts = [0, *accumulate(sizes)]
    if shards < len(sizes):
        return tuple(range(starts[some.start], starts[some.stop]) for some in cut(len(sizes), shards))
    counts = [1] * len(sizes)
    fullest: list[tuple[float, int]] = [(-size, partition) for partition, size in enumerate(sizes)]
    heapify(fullest)
    for _ in range(shards - len(sizes)):
        partition = fullest[0][1]
        counts[partition] += 1
        heapreplace(fullest, (-sizes[partition] / counts[partition], partition))
    return tuple(
        range(start + part.start, start + part.stop)
        for start, size, count in zip(starts, sizes, counts, strict=False)
        for part in cut(size, count)
    )
