"""An index of boxes, to find those that meet a box without comparing it with all."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import product

from dbmpi.index.boxes import Box

_WIDE = 16  # a box over more cells than this, and over a large part of all, is kept apart


class Index:
    """Which of many boxes meet a given one.

    Space is divided into about as many cells as there are boxes, along the boxes' own borders.  A cell knows the boxes
    that reach into it, so that for boxes of similar sizes the cost of a look-up follows from the boxes that it finds,
    not from the number of all.

    Parameters
    ----------
    boxes
        All with the same number of axes; they may overlap.  Empty ones are never found.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._boxes = boxes
        numbers = [number for number, box in enumerate(boxes) if not box.empty]
        self._borders = _borders([boxes[number] for number in numbers])
        self._cells: dict[tuple[int, ...], list[int]] = {}
        self._wide: list[int] = []
        limit = max(_WIDE, math.prod(len(borders) for borders in self._borders) // 4)
        for number in numbers:
            cells = self._over(boxes[number])
            if math.prod(len(axis) for axis in cells) > limit:
                self._wide.append(number)
                continue
            for cell in product(*cells):
                self._cells.setdefault(cell, []).append(number)

    def meeting(self, box: Box) -> list[int]:
        """Return the numbers of the boxes that have an index in common with `box`, in order."""
        if box.empty or not self._borders:
            return []
        found = set(self._wide)
        for cell in product(*self._over(box)):
            found.update(self._cells.get(cell, ()))
        return sorted(number for number in found if box.meets(self._boxes[number]))

    def missing(self, box: Box) -> Iterator[Box]:
        """Yield parts of `box` that no box of the index holds; together they are all that is missing."""
        waiting = [box]
        while waiting:
            part = waiting.pop()
            found = self.meeting(part)
            if found:
                # The middle one divides the rest most evenly.
                waiting.extend(part.minus(self._boxes[found[len(found) // 2]]))
            elif not part.empty:
                yield part

    def _over(self, box: Box) -> list[range]:
        """Return the cells that a box reaches into, as a range for each axis."""
        return [
            range(max(bisect_right(borders, start) - 1, 0), max(bisect_left(borders, stop), 1))
            for borders, start, stop in zip(self._borders, box.starts, box.stops, strict=True)
        ]


def _borders(boxes: list[Box]) -> list[list[int]]:
    """Return for each axis where cells begin: where boxes do, thinned out where there would be too many cells."""
    if not boxes:
        return []
    starts = [sorted(set(axis)) for axis in zip(*(box.starts for box in boxes), strict=True)]
    most = 2 * len(boxes)
    for axis in sorted(range(len(starts)), key=lambda axis: len(starts[axis])):
        step = -(-len(starts[axis]) // max(most, 1))
        starts[axis] = starts[axis][::step]
        most //= len(starts[axis])
    return starts
