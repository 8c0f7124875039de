"""Cutting layers into boxes, one a worker: what each needs of its inputs, grids, and the choice among them.

A cut is chosen layer by layer, from the input upwards, so that the slowest worker is expected to take the least time.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.index.layout import cut
from dbmpi.network.own import calling

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer

# The cost of one byte received in floating-point operations: a core's 40 GFLOP/s against its share of a network,
# 0.8 GB/s.  A float32 travels twice, forward and as a gradient backward; a product is one multiplication and one
# addition, three times.
_FLOPS_PER_BYTE = 50
_BYTES_PER_VALUE = 8
_FLOPS_PER_PRODUCT = 6
# Estimates that differ by less are alike: then no maps are cut, as this needs many more messages, and the rest is the
# nearest to a square.
_ALIKE_BY_MAPS = 1.25
_ALIKE = 1.05
_SAMPLED = 64  # workers whose costs are computed
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # parts of the maps that are tried

Boxes = tuple[Box, ...]


class Reaches:
    """The reach of each of some `layers`, computed when it is first used."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._known: dict[int, Reach] = {}

    def __getitem__(self, number: int) -> Reach:
        if number not in self._known:
            self._known[number] = Reach(self.layers[number])
        return self._known[number]


def choose_boxes(reaches: Reaches, number: int, below: Boxes | None, weights: Sequence[float]) -> Boxes:
    """Choose the box of each worker for layer number `number`.

    Parameters
    ----------
    reaches
        The layers.
    number
        Number of the layer.
    below
        The boxes of its inputs that the workers own; None for the network's inputs, which no worker owns.
    weights
        How fast the workers are.
    """
    layer = reaches.layers[number]
    if len(weights) == 1:
        return (Box.whole(layer.output_shape),)
    followed = None
    if below is not None and len(layer.input_shape) == len(layer.output_shape):
        if not layer.tensors:
            return tuple(reaches[number].follow(box) for box in below)
        if len(layer.output_shape) == 3:
            followed = tuple(reaches[number].follow(box) for box in below)
    if len(layer.output_shape) != 3:
        return cut_axes(layer.output_shape, weights)
    grids = _grids(layer.output_shape, weights)
    candidates = [(grid.boxes, grid.depth, grid.border) for grid in grids]
    if followed is not None:
        # No worker's neighbours change.
        candidates.append((followed, grids[0].depth, 0.0))
    costs = [_cost(reaches, number, boxes, below, weights) for boxes, *_ in candidates]
    depth = min(d for (_, d, _), cost in zip(candidates, costs, strict=True) if cost <= min(costs) * _ALIKE_BY_MAPS)
    level = [(cost, border, boxes) for (boxes, d, border), cost in zip(candidates, costs, strict=True) if d == depth]
    best = min(cost for cost, _, _ in level)
    return min((choice for choice in level if choice[0] <= best * _ALIKE), key=lambda choice: (choice[1], choice[0]))[2]


def _grids(shape: tuple[int, ...], weights: Sequence[float]) -> list[Grid]:
    """Return grids to choose from: cells that are nearly square in rows and columns, with maps cut more or less."""
    maps, height, width = shape
    workers = len(weights)
    grids: dict[tuple[int, int], Grid] = {}
    # With fewer parts, some workers would get nothing.
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
            grids.setdefault((fitting, depth), Grid(shape, weights, fitting, depth))
    return list(grids.values())


def _cost(reaches: Reaches, first: int, boxes: Boxes, below: Boxes | None, weights: Sequence[float]) -> float:
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
    for number, layer in enumerate(layers[first:], first):
        if number > first:
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
                # Inputs of the network that are read count like values received.
                received = need.size - (0 if have is None else need.common(have))
                worst = max(worst, flops * box.size * slow + _FLOPS_PER_BYTE * _BYTES_PER_VALUE * received)
        total += worst
        if number > first and layer.tensors:
            break
    return total


def needed_box(layer: Layer, output: Box) -> Box:
    """Return the inputs that the box `output` of a layer's outputs needs: none for an empty box.

    Raises
    ------
    UserError
        If the layer (a user's own) asks for inputs that it does not have.
    """
    if output.empty:
        return Box((0,) * len(layer.input_shape), (0,) * len(layer.input_shape))
    with calling(f"layer {layer.name!r}", f"asked what its outputs {output} need"):
        need = layer.input_box(output)
    return _checked(layer, "input_box", "", need, layer.input_shape, output)


def needed_tensor_box(layer: Layer, short: str, output: Box) -> Box:
    """Return the part of a tensor, by its `short` name, that the box `output` needs: nothing for an empty box.

    Raises
    ------
    UserError
        If the layer (a user's own) asks for a part that the tensor does not have.
    """
    shape = layer.tensors[short].shape
    if output.empty:
        return Box((0,) * len(shape), (0,) * len(shape))
    with calling(f"layer {layer.name!r}", f"asked what its outputs {output} need of {short!r}"):
        need = layer.tensor_box(short, output)
    return _checked(layer, "tensor_box", short, need, shape, output)


def _checked(layer: Layer, method: str, short: str, need: Any, shape: Sequence[int], output: Box) -> Box:
    """Return the part of an array that a layer has asked for, if it is one; `short` is empty for its inputs."""
    if not isinstance(need, Box):
        of = f" {short!r} and" if short else ""
        raise UserError(
            f"layer {layer.name!r}: {method} returns {type(need).__name__} for{of} its outputs {output}; expected a Box"
        )
    if len(need.starts) != len(shape) or need.empty or not Box.whole(shape).holds(need):
        part, whole = (f"part {need} of {short!r}, which has", "it") if short else (f"inputs {need}, of", "them")
        raise UserError(
            f"layer {layer.name!r}: for its outputs {output}, of shape {tuple(layer.output_shape)}, it asks for the "
            f"{part} shape {tuple(shape)}; expected a box within {whole}"
        )
    return need


class Reach:
    """Which inputs the outputs of a layer need along each axis, for layers whose inputs have as many axes as outputs.

    Every output is given a *home* among the inputs: the one at the same relative position, or the nearest to it that
    keeps halos smallest.  The worker that owns its home computes an output.  As homes are in order along every axis,
    boxes of inputs that cover everything once give boxes of outputs that do, too.  Where boxes are no smaller than
    fields, and fields no smaller than their stride, no other cut along an axis needs fewer values from others.

    Parameters
    ----------
    layer
        Its needs along one axis are taken not to depend on the other axes; if they do, boxes are valid but less good.
    """

    def __init__(self, layer: Layer) -> None:
        self.name = layer.name
        whole = Box.whole(layer.output_shape)
        self._starts: list[list[int]] = []
        self._stops: list[list[int]] = []
        self._homes: list[list[int]] = []
        for axis, (outputs, inputs) in enumerate(zip(layer.output_shape, layer.input_shape, strict=True)):
            needs = [needed_box(layer, whole.along(axis, y, y + 1)) for y in range(outputs)]
            starts, stops = [need.starts[axis] for need in needs], [need.stops[axis] for need in needs]
            homes = [_home((2 * y + 1) * inputs // (2 * outputs), y, starts, stops) for y in range(outputs)]
            self._starts.append(starts)
            self._stops.append(stops)
            self._homes.append(list(accumulate(homes, max)))

    def follow(self, box: Box) -> Box:
        """Return the outputs whose homes are in a box of inputs."""
        return Box(
            tuple(bisect_left(homes, start) for homes, start in zip(self._homes, box.starts, strict=True)),
            tuple(bisect_left(homes, stop) for homes, stop in zip(self._homes, box.stops, strict=True)),
        )

    def suffices(self, inputs: Box) -> Box:
        """Return the outputs that a box of inputs is enough for, perhaps none."""
        return Box(
            tuple(bisect_left(starts, start) for starts, start in zip(self._starts, inputs.starts, strict=True)),
            tuple(bisect_right(stops, stop) for stops, stop in zip(self._stops, inputs.stops, strict=True)),
        )

    def needed(self, output: Box) -> Box:
        """Return the inputs that `output`, a box that is not empty, needs."""
        return Box(
            tuple(starts[start] for starts, start in zip(self._starts, output.starts, strict=True)),
            tuple(stops[stop - 1] for stops, stop in zip(self._stops, output.stops, strict=True)),
        )


def _home(same: int, y: int, starts: list[int], stops: list[int]) -> int:
    """Return the input along an axis whose owner computes output `y`; `same` is the one at the same relative position.

    Let inputs be cut at c, and outputs ``0 ... y - 1`` belong to the lower side.  That needs ``stops[y - 1] - c``
    values of the upper side, which needs ``c - starts[y]`` of the lower, or none where a difference is negative.  The
    sum is smallest where neither is.  Positions of which this holds whichever side `y` is on are as good as each other;
    if there are none, the middle of what `y` needs divides best.  At the ends, outputs are taken to continue alike.
    """
    start, stop = starts[y], stops[y]
    if len(starts) == 1:
        return min(max(same, start), stop - 1)
    following = starts[y + 1] if y + 1 < len(starts) else 2 * start - starts[y - 1]
    before = stops[y - 1] if y > 0 else 2 * stop - stops[1]
    low, high = max(start, following - 1), min(stop - 1, before)
    return min(max(same, low), high) if low <= high else (start + stop) // 2


def proportional(size: int, weights: Sequence[float]) -> list[int]:
    """Return positions, one more than there are weights, that cut ``range(size)`` into parts in proportion to them.

    Part ``i`` is ``positions[i] ... positions[i + 1]``.  Every position is the exact one, rounded: for equal weights
    lengths differ by one at most.
    """
    sums = list(accumulate(weights, initial=0))
    whole = sums[-1]
    return [int((2 * size * part + whole) // (2 * whole)) for part in sums]


def cut_axes(shape: tuple[int, ...], weights: Sequence[float]) -> tuple[Box, ...]:
    """Cut an array of some `shape` into boxes in proportion to the workers' `weights`.

    It is cut along its first axis, and where that is shorter than the workers are many, along the next axes, too.
    """
    if len(shape) == 1 or len(weights) <= shape[0]:
        positions = proportional(shape[0], weights)
        return tuple(Box((start, *(0 for _ in shape[1:])), (stop, *shape[1:])) for start, stop in pairwise(positions))
    groups = cut(len(weights), shape[0])
    boxes = []
    for row, group in enumerate(groups):
        for box in cut_axes(shape[1:], weights[group.start : group.stop]):
            boxes.append(Box((row, *box.starts), (row + 1, *box.stops)))
    return tuple(boxes)


@dataclass(frozen=True)
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

    shape: tuple[int, ...]
    weights: Sequence[float]
    bands: int
    depth: int

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

    @cached_property
    def _members(self) -> tuple[range, ...]:
        return cut(len(self.weights), self.bands)

    def _columns(self, band: range) -> int:
        return max(1, min(self.shape[2], -(-len(band) // self.depth)))

    def _weight(self, workers: range) -> float:
        return sum(self.weights[workers.start : workers.stop])
