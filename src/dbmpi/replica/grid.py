"""Cutting an array's indices into boxes, one a worker, of sizes in proportion to the workers' weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

from dbmpi.index.boxes import Box
from dbmpi.index.layout import cut


def proportional(size: int, weights: Sequence[float]) -> list[int]:
    """Return positions, one more than there are weights, that cut ``range(size)`` into parts in proportion to them.

    Part ``i`` is ``positions[i] ... positions[i + 1]``.  Every position is the exact one, rounded: for equal weights
    lengths differ by one at most.
    """
    sums = list(accumulate(weights, initial=0))
    whole = sums[-1]
    return [int((2 * size * part + whole) // (2 * whole)) for part in sums]


def cut_axes(shape: tuple[int, ...], weights: Sequence[float]) -> tuple[Box, ...]:
    """Cut an array along its first axis; where that has no room for all workers, along the next axes, too."""
    if len(shape) == 1 or len(weights) <= shape[0]:
        positions = proportional(shape[0], weights)
        return tuple(Box((start, *(0 for _ in shape[1:])), (stop, *shape[1:])) for start, stop in pairwise(positions))
    groups = cut(len(weights), shape[0])
    boxes = []
    for place, group in enumerate(groups):
        for box in cut_axes(shape[1:], weights[group.start : group.stop]):
            boxes.append(Box((place, *box.starts), (place + 1, *box.stops)))
    return tuple(boxes)


class Grid:
    """A cut of (maps, height, width) into bands of rows, each band into columns, each such cell into maps.

    Workers are dealt to bands, columns and maps in their order.  A band's height is in proportion to the weights of
    its workers, and so on, so that bands need not have equally many columns: any number of workers, and any weights,
    give boxes of the right sizes.

    Parameters
    ----------
    shape
        (maps, height, width).
    weights
        One a worker.
    bands
        Bands of rows.
    depth
        Into how many parts a cell's maps are cut, at least 1; more where a band has no columns left to cut.
    """

    def __init__(self, shape: tuple[int, ...], weights: Sequence[float], bands: int, depth: int) -> None:
        self.shape, self.weights, self.bands, self.depth = shape, weights, bands, depth
        self._members = cut(len(weights), bands)

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes in the order of the workers."""
        maps, height, width = self.shape
        rows = proportional(height, [self._weight(band) for band in self._members])
        boxes: list[Box] = []
        for band, top, bottom in zip(self._members, rows, rows[1:], strict=False):
            cells = cut(len(band), self._columns(band))
            workers = [band[cell.start : cell.stop] for cell in cells]
            columns = proportional(width, [self._weight(cell) for cell in workers])
            for cell, left, right in zip(workers, columns, columns[1:], strict=False):
                depths = proportional(maps, self.weights[cell.start : cell.stop])
                boxes += (Box((first, top, left), (last, bottom, right)) for first, last in pairwise(depths))
        return tuple(boxes)

    @cached_property
    def border(self) -> float:
        """Length of the borders between cells if all workers were equal: what halos grow with."""
        _, height, width = self.shape
        share = height / len(self.weights)
        return (self.bands - 1) * width + sum((self._columns(band) - 1) * len(band) * share for band in self._members)

    def _columns(self, band: range) -> int:
        return max(1, min(self.shape[2], -(-len(band) // self.depth)))

    def _weight(self, workers: range) -> float:
        return sum(self.weights[workers.start : workers.stop])
