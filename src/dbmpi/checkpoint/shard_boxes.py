"""Which shard holds which part of each tensor: boxes, as a checkpoint of several files notes them.

Each shard has one flat vector (and as many of the rule's state, cut alike).  A box of a tensor, in C order, lies there
in one piece.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.index.layout import Layout, Tensor

if TYPE_CHECKING:
    from dbmpi.replica.arrangement import Arrangement


MOST = 1 << 16
"""Boxes in a file from anywhere: some for each tensor, each partition, and each end of a shard."""


_MOST_AXES = 32
_SHORTEST, _FEW = 32, 1 << 20
"""Elements of a run in the mean, and how many runs there may be in any case: each takes memory when it is read."""


class ShardBox(NamedTuple):
    """A part of a tensor on one shard."""

    tensor: Tensor
    box: Box
    shard: int
    """Its number."""
    local: int
    """Position of the first element in the shard's vector."""


def of_arrangement(arrangement: Arrangement) -> list[ShardBox]:
    """Return the boxes of all shards of an `arrangement`, in their order; together they hold each element once."""
    found = []
    parts = [(part.tensor, part.box) for part in arrangement.parts] or [
        (tensor, Box.whole(tensor.shape)) for tensor in arrangement.layout.tensors
    ]
    position, stops = 0, [held.stop for held in arrangement.ranges]
    for tensor, whole in parts:
        stop = position + whole.size
        for shard in range(bisect_right(stops, position), len(stops)):
            held = arrangement.ranges[shard]
            if held.start >= stop:
                break
            start, end = max(held.start, position), min(held.stop, stop)
            local = start - held.start
            for box in spans(whole.shape, start - position, end - position):
                moved = Box(_plus(box.starts, whole.starts), _plus(box.stops, whole.starts))
                found.append(ShardBox(tensor, moved, shard, local))
                local += box.size
        position = stop
    return found


def most_boxes(arrangement: Arrangement) -> int:
    """Return a number of boxes that those of an `arrangement` do not exceed: each end of a shard cuts one of them."""
    tensors = arrangement.layout.tensors
    axes = max(len(tensor.shape) for tensor in tensors)
    return len(arrangement.parts or tensors) + 2 * axes * len(arrangement.ranges)


def spans(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes, in C order, that make up the flat positions ``start ... stop`` of an array of `shape`."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,), (stop,)) if shape else Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # all within one row
        yield from _within(shape, last, start - last * row, stop - last * row)
        return
    yield from _within(shape, first - 1, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last, *shape[1:]))
    yield from _within(shape, last, 0, stop - last * row)


def _within(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes of a range of the row `index`."""
    for box in spans(shape[1:], start, stop):
        yield Box((index, *box.starts), (index + 1, *box.stops))


def to_table(layout: Layout, boxes: Sequence[ShardBox]) -> np.ndarray:
    """Return the `boxes` as integers, a row each: tensor, shard, local position, starts, stops.

    Tensors are numbered as in the `layout`; unused axes are 0.
    """
    numbers = {tensor.name: number for number, tensor in enumerate(layout.tensors)}
    axes = max(len(tensor.shape) for tensor in layout.tensors)
    table = np.zeros((len(boxes), 3 + 2 * axes), np.int64)
    for row, (tensor, box, shard, local) in zip(table, boxes, strict=True):
        row[:3] = numbers[tensor.name], shard, local
        row[3 : 3 + len(box.starts)] = box.starts
        row[3 + axes : 3 + axes + len(box.stops)] = box.stops
    return table


def shapes_table(layout: Layout) -> np.ndarray:
    """Return the shapes of the tensors of a `layout`, a row each: number of axes, lengths; unused ones are 0."""
    axes = max(len(tensor.shape) for tensor in layout.tensors)
    rows = [(len(tensor.shape), *tensor.shape, *[0] * (axes - len(tensor.shape))) for tensor in layout.tensors]
    return np.array(rows, np.int64)


def from_table(layout: Layout, table: np.ndarray, sizes: Sequence[int]) -> list[ShardBox]:
    """Return the boxes of a table from anywhere.

    Parameters
    ----------
    layout
        The tensors.
    table
        As :func:`to_table` makes it.
    sizes
        Elements of each shard's vector.

    Raises
    ------
    ValueError
        If they do not hold each element of each tensor and of each shard once.
    """
    axes = max(len(tensor.shape) for tensor in layout.tensors)
    if axes > _MOST_AXES:
        raise ValueError(f"a tensor has {axes} axes, expected at most {_MOST_AXES}")
    if table.ndim != 2 or table.shape[1] != 3 + 2 * axes or len(table) > MOST:
        raise ValueError(f"expected at most {MOST} rows of {3 + 2 * axes} numbers, found shape {table.shape}")
    runs, found, left = 0, [], {tensor.name: tensor.size for tensor in layout.tensors}
    of_shards: list[list[range]] = [[] for _ in sizes]
    of_tensors: dict[str, list[Box]] = {name: [] for name in left}
    for number, shard, local, *bounds in table.tolist():
        if not 0 <= number < len(layout.tensors) or not 0 <= shard < len(sizes):
            raise ValueError(f"there is no tensor {number} or no shard {shard}")
        tensor = layout.tensors[number]
        box = Box(tuple(bounds[: len(tensor.shape)]), tuple(bounds[axes : axes + len(tensor.shape)]))
        if box.empty or min(box.starts, default=0) < 0 or not Box.whole(tensor.shape).holds(box):
            raise ValueError(f"{tensor.name} of shape {tensor.shape} has no part {box}")
        of_shards[shard].append(range(local, local + box.size))
        of_tensors[tensor.name].append(box)
        left[tensor.name] -= box.size
        runs += box.runs_count(tensor.shape)
        found.append(ShardBox(tensor, box, shard, local))
    if runs > _FEW + layout.size // _SHORTEST:
        raise ValueError(f"the parts consist of {runs:,} runs of elements, which are too many")
    for shard, (held, size) in enumerate(zip(of_shards, sizes, strict=True)):
        position = 0
        for part in sorted(held, key=lambda part: part.start):
            if part.start != position:
                raise ValueError(f"the parts of shard {shard} overlap or leave a gap at {min(position, part.start)}")
            position = part.stop
        if position != size:
            raise ValueError(f"the parts of shard {shard} end at {position}, and its vector at {size}")
    for name, missing in left.items():
        if missing:
            raise ValueError(f"the parts of {name} have {abs(missing)} elements too {'few' if missing > 0 else 'many'}")
        _check_apart(name, of_tensors[name])
    return found


def _check_apart(name: str, boxes: list[Box]) -> None:
    """Raise ValueError where two boxes have an element in common."""
    if len(boxes) < 2:  # as a number without axes has
        return
    starts, stops = (np.array([getattr(box, end) for box in boxes]) for end in ("starts", "stops"))
    # In order along the axis on which they differ most, a box can meet only those that begin before its end.
    axis = int(np.argmax([len(np.unique(column)) for column in starts.T]))
    order = np.argsort(starts[:, axis], kind="stable")
    starts, stops, boxes = starts[order], stops[order], [boxes[number] for number in order.tolist()]
    ends = np.searchsorted(starts[:, axis], stops[:, axis]).tolist()
    for number, box in enumerate(boxes):
        after = slice(number + 1, ends[number])
        meets = ((starts[after] < stops[number]) & (stops[after] > starts[number])).all(axis=1)
        if meets.any():
            raise ValueError(f"two parts of {name} overlap: {box} and {boxes[number + 1 + int(meets.argmax())]}")


def _plus(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
