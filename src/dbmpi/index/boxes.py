"""Boxes: half-open index ranges, one for each axis; pure integers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import lt, sub


@dataclass(frozen=True)
class Box:
    """The indices ``starts[axis] <= i < stops[axis]`` on every axis; empty if any axis is."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.stops):
            raise ValueError(f"a box needs as many starts as stops, got {self.starts} and {self.stops}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box of all indices of an array of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Length along each axis."""
        return tuple(max(stop - start, 0) for start, stop in zip(self.starts, self.stops, strict=True))

    @property
    def size(self) -> int:
        """Number of indices."""
        return 0 if self.empty else math.prod(map(sub, self.stops, self.starts))

    @property
    def empty(self) -> bool:
        """Whether the box holds no index."""
        return not all(map(lt, self.starts, self.stops))

    def slices(self, origin: Box | None = None) -> tuple[slice, ...]:
        """Return slices that select this box from an array that holds the box `origin` (default: from index 0 on)."""
        offsets = origin.starts if origin is not None else (0,) * len(self.starts)
        return tuple(
            slice(start - offset, max(start, stop) - offset)
            for start, stop, offset in zip(self.starts, self.stops, offsets, strict=True)
        )

    def meet(self, other: Box) -> Box:
        """Return the box of the indices in this box and in `other`; with no common index it is empty."""
        _check_axes(self, other)
        starts = tuple(map(max, self.starts, other.starts))
        return Box(starts, tuple(map(max, starts, map(min, self.stops, other.stops))))

    def meets(self, other: Box) -> bool:
        """Whether this box and `other` have an index in common."""
        _check_axes(self, other)
        return all(map(lt, map(max, self.starts, other.starts), map(min, self.stops, other.stops)))

    def common(self, other: Box) -> int:
        """Return the number of indices in this box and in `other`."""
        size = 1
        for a, b, c, d in zip(self.starts, self.stops, other.starts, other.stops, strict=True):
            size *= max(min(b, d) - max(a, c), 0)
        return size

    def join(self, other: Box) -> Box:
        """Return the smallest box that holds this one and `other`; an empty one counts for nothing."""
        if self.empty or other.empty:
            return other if self.empty else self
        starts = tuple(min(a, b) for a, b in zip(self.starts, other.starts, strict=True))
        return Box(starts, tuple(max(a, b) for a, b in zip(self.stops, other.stops, strict=True)))

    def holds(self, other: Box) -> bool:
        """Whether every index of `other` is one of this box."""
        return other.empty or self.meet(other) == other

    def along(self, axis: int, start: int, stop: int) -> Box:
        """Return this box with the range ``start ... stop`` on an axis."""
        starts, stops = self.starts, self.stops
        return Box((*starts[:axis], start, *starts[axis + 1 :]), (*stops[:axis], stop, *stops[axis + 1 :]))

    def minus(self, other: Box) -> tuple[Box, ...]:
        """Return boxes that together hold each index of this box that is not in `other`, once; at most two an axis."""
        common = self.meet(other)
        if common.empty:
            return () if self.empty else (self,)
        parts, left = [], self
        for axis, (first, last) in enumerate(zip(common.starts, common.stops, strict=True)):
            if left.starts[axis] < first:
                parts.append(left.along(axis, left.starts[axis], first))
            if last < left.stops[axis]:
                parts.append(left.along(axis, last, left.stops[axis]))
            # The rest on this axis is within `other`, and is cut along the next axis.
            left = left.along(axis, first, last)
        return tuple(parts)

    def runs(self, shape: Sequence[int]) -> Iterator[range]:
        """Yield the flat positions of the box in a C-ordered array of `shape`, as consecutive ranges in order.

        As few and as long as possible: axes that the box fills join the run of the axis before them.
        """
        if self.empty:
            return
        full = len(shape)
        while full > 0 and self.starts[full - 1] == 0 and self.stops[full - 1] == shape[full - 1]:
            full -= 1
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if full == 0:
            yield range(0, math.prod(shape))
            return
        last = full - 1
        length = (self.stops[last] - self.starts[last]) * strides[last]
        outer = (range(start, stop) for start, stop in zip(self.starts[:last], self.stops[:last], strict=True))
        for index in product(*outer):
            start = (
                sum(i * stride for i, stride in zip(index, strides, strict=False)) + self.starts[last] * strides[last]
            )
            yield range(start, start + length)

    def runs_count(self, shape: Sequence[int]) -> int:
        """Return how many ranges :meth:`runs` yields for a `shape`."""
        if self.empty:
            return 0
        full = len(shape)
        while full > 0 and self.starts[full - 1] == 0 and self.stops[full - 1] == shape[full - 1]:
            full -= 1
        return math.prod(map(sub, self.stops[: max(full - 1, 0)], self.starts[: max(full - 1, 0)]))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{start}:{stop}" for start, stop in zip(self.starts, self.stops, strict=True)) + "]"


def _check_axes(one: Box, other: Box) -> None:
    if len(one.starts) != len(other.starts):
        raise ValueError(f"boxes of different numbers of axes have nothing to do with each other: {one} and {other}")
