"""Choosing the boxes of one layer, given those of the layer below: what is expected to take the least time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dbmpi.index.boxes import Box
from dbmpi.replica.grid import Grid, cut_axes
from dbmpi.replica.reach import Reach, needed_box

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer

# What one byte received weighs against floating-point operations: a core's 40 GFLOP/s against its share of a network,
# 0.8 GB/s.  A float32 travels twice, forward and as a gradient backward; a product is one multiplication and one
# addition, three times.
_FLOPS_PER_BYTE = 50
_BYTES_PER_VALUE = 8
_FLOPS_PER_PRODUCT = 6
# Estimates that differ by less are alike: then no maps are cut, as this needs many more messages, and the rest is the
# nearest to a square.
_ALIKE_BY_MAPS = 1.25
_ALIKE = 1.05
_SAMPLED = 64  # workers whose costs are looked at
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # parts of the maps that are tried

Boxes = tuple[Box, ...]


class Reaches:
    """Layers, and for each its reach, worked out when it is first asked for."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._known: dict[int, Reach] = {}

    def __getitem__(self, place: int) -> Reach:
        if place not in self._known:
            self._known[place] = Reach(self.layers[place])
        return self._known[place]


def choose_boxes(reaches: Reaches, place: int, below: Boxes | None, weights: Sequence[float]) -> Boxes:
    """Choose the box of each worker for layer number `place`.

    Parameters
    ----------
    reaches
        The layers.
    place
        Number of the layer.
    below
        The boxes of its inputs that the workers own; None for the network's inputs, which nobody owns.
    weights
        How fast the workers are.
    """
    layer = reaches.layers[place]
    if len(weights) == 1:
        return (Box.whole(layer.output_shape),)
    followed = None
    if below is not None and len(layer.input_shape) == len(layer.output_shape):
        if not layer.tensors:
            return tuple(reaches[place].follow(box) for box in below)
        if len(layer.output_shape) == 3:
            followed = tuple(reaches[place].follow(box) for box in below)
    if len(layer.output_shape) != 3:
        return cut_axes(layer.output_shape, weights)
    grids = _grids(layer.output_shape, weights)
    candidates = [(grid.boxes, grid.depth, grid.border) for grid in grids]
    if followed is not None:
        # Nobody's neighbours change.
        candidates.append((followed, grids[0].depth, 0.0))
    costs = [_cost(reaches, place, boxes, below, weights) for boxes, *_ in candidates]
    depth = min(d for (_, d, _), cost in zip(candidates, costs, strict=True) if cost <= min(costs) * _ALIKE_BY_MAPS)
    level = [(cost, border, boxes) for (boxes, d, border), cost in zip(candidates, costs, strict=True) if d == depth]
    best = min(cost for cost, _, _ in level)
    return min((choice for choice in level if choice[0] <= best * _ALIKE), key=lambda choice: (choice[1], choice[0]))[2]


def _grids(shape: tuple[int, ...], weights: Sequence[float]) -> list[Grid]:
    """Return grids worth a look: cells that are nearly square in rows and columns, with maps cut more or less."""
    maps, height, width = shape
    workers = len(weights)
    found: dict[tuple[int, int], Grid] = {}
    # With fewer parts, some workers would find no space.
    least = min(maps, -(-workers // (height * width)))
    for depth in sorted({least, *(depth for depth in _DEPTHS if least < depth <= min(maps, workers))}):
        cells = -(-workers // depth)
        square = math.sqrt(cells * height / width)
        low, high = max(math.floor(square), 1), min(math.ceil(square), cells)
        lower = next(bands for bands in range(low, 0, -1) if cells % bands == 0)
        higher = next(bands for bands in range(high, cells + 1) if cells % bands == 0)
        # Rows before columns, where both are as good: parameters of a band of rows lie together.
        for bands in (high, low, higher, lower):
            # A band of more cells than columns would leave workers without space while there are rows.
            fitting = min(max(bands, -(-cells // width)), height, workers)
            found.setdefault((fitting, depth), Grid(shape, weights, fitting, depth))
    return list(found.values())


def _cost(reaches: Reaches, place: int, boxes: Boxes, below: Boxes | None, weights: Sequence[float]) -> float:
    """Estimate the operations, exchanged bytes turned into such, of each layer's slowest worker; return their sum.

    Counts the layer itself and those that would follow its cut: up to the next one with parameters, and that one.
    """
    layers, workers = reaches.layers, len(weights)
    largest = max(range(workers), key=lambda worker: boxes[worker].size / weights[worker])
    sampled = sorted({largest, *(number * workers // _SAMPLED for number in range(_SAMPLED))})
    owned = [None if below is None else below[worker] for worker in sampled]
    computed = [boxes[worker] for worker in sampled]
    slowness = [sum(weights) / (workers * weights[worker]) for worker in sampled]
    total = 0.0
    for number, layer in enumerate(layers[place:], place):
        if number > place:
            if len(layer.output_shape) != 3:
                break
            owned, computed = list(computed), [reaches[number].follow(box) for box in computed]
        reach = reaches[number] if len(layer.input_shape) == 3 else None
        middle = Box(tuple(n // 2 for n in layer.output_shape), tuple(n // 2 + 1 for n in layer.output_shape))
        flops = _FLOPS_PER_PRODUCT * needed_box(layer, middle).size
        worst = 0.0
        for box, have, slow in zip(computed, owned, slowness, strict=True):
            if not box.empty:
                need = reach.needed(box) if reach is not None else needed_box(layer, box)
                # What is read of the network's inputs counts like what is received.
                received = need.size - (0 if have is None else need.common(have))
                worst = max(worst, flops * box.size * slow + _FLOPS_PER_BYTE * _BYTES_PER_VALUE * received)
        total += worst
        if number > place and layer.tensors:
            break
    return total
