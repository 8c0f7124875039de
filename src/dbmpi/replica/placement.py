"""The outputs of each layer that each worker computes: chosen automatically, or given by the user, and checked.

The network's inputs belong to no worker: every worker reads the part of the data that it needs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.index.lookup import Index
from dbmpi.network.layer import SplitByInputs
from dbmpi.replica.cut import Boxes, Reaches, choose_boxes, needed_box

if TYPE_CHECKING:
    from dbmpi.config import PlacementSection
    from dbmpi.network.layer import Layer

Split = Literal["outputs", "inputs"]
"""How a layer's work is split: each worker computes its own outputs from all inputs that they need, or all outputs as
far as they come from the inputs that it owns; then the sums over the workers are the outputs."""


@dataclass(frozen=True)
class Placement:
    """For each layer the box of its outputs that each worker owns, and how its work is split."""

    boxes: tuple[tuple[Box, ...], ...]
    splits: tuple[Split, ...]

    @property
    def partitions(self) -> int:
        """Number of workers."""
        return len(self.boxes[0])


def automatic(
    layers: Sequence[Layer],
    partitions: int,
    weights: Sequence[float] | None = None,
    fixed: Mapping[str, Boxes] | None = None,
    splits: Mapping[str, Split | None] | None = None,
) -> Placement:
    """Place layers on workers so that boxes are in proportion to weights and little has to be exchanged.

    - Outputs along one axis (dense layers) are cut by units.
    - (maps, height, width) are cut by a grid over height and width, and by maps where space alone gives no good cut.
      Of the grids, the one is taken whose slowest worker is expected to finish first, the layers up to the next
      parameters included.
    - Layers without parameters go with the layer below: element-wise ones exchange nothing, pooling and
      normalisation the least possible.
    - A dense layer's work is split by inputs where its outputs are fewer than its inputs, if it can be.

    Parameters
    ----------
    layers
        From the input upwards.
    partitions
        Number of workers.
    weights
        One a worker: how fast it is relative to others; equal by default.
    fixed
        Boxes of layers, by their names, that are not to be chosen.
    splits
        How the work of layers, by their names, is split; None for what moves the fewest bytes.

    Raises
    ------
    UserError
        If the weights do not fit, or a layer does not fit the one below.
    """
    if partitions < 1:
        raise UserError(f"a network cannot be placed on {partitions} partitions: give at least 1")
    shares = _checked_weights(weights, partitions)
    _check_chain(layers)
    reaches = Reaches(layers)
    placed: list[tuple[Box, ...]] = []
    chosen: list[Split] = []
    for number, layer in enumerate(layers):
        below = placed[-1] if number > 0 else None
        boxes = (fixed or {}).get(layer.name) or choose_boxes(reaches, number, below, shares)
        split = (splits or {}).get(layer.name)
        if split is None:
            split = "outputs"
            if below is not None and can_split_by_inputs(layer):
                # Outputs first: equal bytes are no reason to leave the order of summation.
                split = min(("outputs", "inputs"), key=lambda way: values_moved(layer, below, boxes, cast(Split, way)))
        placed.append(boxes)
        chosen.append(cast(Split, split))
    return Placement(tuple(placed), tuple(chosen))


def explicit(
    layers: Sequence[Layer],
    boxes: Mapping[str, Sequence[Box | str]],
    partitions: int | None = None,
    weights: Sequence[float] | None = None,
    splits: Mapping[str, Split | None] | None = None,
) -> Placement:
    """Place layers as the user says, and those without boxes automatically.

    Parameters
    ----------
    layers
        From the input upwards.
    boxes
        Name of a layer -> one box a worker, as text like ``"0:8, :, 46:91"``: a range for each axis of the outputs,
        ``:`` for all of an axis, ``""`` for a worker that computes nothing of the layer.
    partitions
        Number of workers; by default as many as there are boxes.
    weights
        As for `automatic`, for layers that are not named.
    splits
        Name of a layer -> how the work is split; by default, or for None, the way that moves the fewest bytes.

    Raises
    ------
    UserError
        If a name or box is wrong, or the boxes of a layer do not cover its outputs exactly once.
    """
    named = {layer.name: layer for layer in layers}
    for name in (*boxes, *(splits or {})):
        if name not in named:
            raise UserError(f"placement: there is no layer {name!r}; the layers are {', '.join(named)}")
    partitions = partitions or max((len(given) for given in boxes.values()), default=1)
    fixed = {}
    for name, given in boxes.items():
        if len(given) != partitions:
            raise UserError(
                f"placement: layer {name!r} has {len(given)} boxes for {partitions} partitions: give one each, "
                'and "" to those that compute nothing of it'
            )
        fixed[name] = tuple(_parsed(box, named[name], worker) for worker, box in enumerate(given))
        _check_cover(named[name], fixed[name])
    placement = automatic(layers, partitions, weights, fixed, splits)
    check(layers, placement)
    return placement


def from_config(section: PlacementSection, layers: Sequence[Layer], partitions: int) -> Placement:
    """Place layers as the ``[placement]`` `section` of a configuration says, on so many `partitions`.

    Raises
    ------
    UserError
        As `explicit`.
    """
    boxes = {name: placed.boxes for name, placed in section.layers.items() if placed.boxes is not None}
    splits = {name: placed.split for name, placed in section.layers.items()}
    return explicit(layers, boxes, partitions, section.weights, splits)


def check(layers: Sequence[Layer], placement: Placement) -> None:
    """Check that `placement` gives each output of all `layers` to exactly one worker, and that every split is possible.

    Raises
    ------
    UserError
        If not; names the layer, and the workers and boxes that clash or the boxes that are missing.
    """
    _check_chain(layers)
    if not len(layers) == len(placement.boxes) == len(placement.splits):
        raise UserError(f"placement: {len(placement.boxes)} layers are placed, but the network has {len(layers)}")
    for number, (layer, owned, split) in enumerate(zip(layers, placement.boxes, placement.splits, strict=True)):
        if len(owned) != placement.partitions:
            raise UserError(
                f"placement: layer {layer.name!r} is given to {len(owned)} partitions, "
                f"layer {layers[0].name!r} to {placement.partitions}"
            )
        _check_cover(layer, owned)
        if split == "inputs" and not (number > 0 and can_split_by_inputs(layer)):
            raise UserError(
                f"placement: layer {layer.name!r} cannot be split by inputs: only a dense layer with inputs "
                "along one axis, and not the first, can; use 'outputs'"
            )


def needed_inputs(layers: Sequence[Layer], placement: Placement) -> tuple[tuple[Box, ...], ...]:
    """Return for each of the `layers` the box of inputs that each worker of a `placement` needs, perhaps empty.

    Raises
    ------
    UserError
        If a layer (a user's own) asks for inputs that it does not have.
    """
    result = []
    for number, (layer, owned) in enumerate(zip(layers, placement.boxes, strict=True)):
        if placement.splits[number] == "inputs":
            result.append(placement.boxes[number - 1])
        else:
            result.append(tuple(needed_box(layer, box) for box in owned))
    return tuple(result)


def can_split_by_inputs(layer: Layer) -> bool:
    """Whether the layer's outputs can be computed as sums of what several workers make of their own inputs."""
    return isinstance(layer, SplitByInputs) and len(layer.input_shape) == len(layer.output_shape) == 1


def values_moved(layer: Layer, below: Sequence[Box], owned: Sequence[Box], split: Split) -> int:
    """Return how many values a sample move forward, and again backward, all workers together.

    Parameters
    ----------
    layer
        Not the first one.
    below, owned
        Each worker's box of the layer's inputs and of its outputs.
    split
        How the layer's work is split.
    """
    if split == "inputs":
        # A worker with inputs computes a sum for each output, and sends those that it does not own.
        units = math.prod(layer.output_shape)
        return sum(units - box.size for inputs, box in zip(below, owned, strict=True) if not inputs.empty)
    needed = (needed_box(layer, box) for box in owned)
    return sum(need.size - need.common(have) for need, have in zip(needed, below, strict=True))


def _checked_weights(weights: Sequence[float] | None, partitions: int) -> Sequence[float]:
    if weights is None:
        return (1,) * partitions
    if len(weights) != partitions:
        raise UserError(f"placement: {len(weights)} weights are given for {partitions} partitions: give one each")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"placement: a weight is {weight}; weights are positive numbers, e.g. 1 and 2")
    return tuple(weights)


def _check_chain(layers: Sequence[Layer]) -> None:
    for below, layer in pairwise(layers):
        if tuple(below.output_shape) != tuple(layer.input_shape):
            raise UserError(
                f"layer {layer.name!r} takes inputs of shape {tuple(layer.input_shape)}, "
                f"but layer {below.name!r} below it gives {tuple(below.output_shape)}"
            )


def _check_cover(layer: Layer, owned: Sequence[Box]) -> None:
    """Check that boxes cover the layer's outputs, each once."""
    whole = Box.whole(layer.output_shape)
    for worker, box in enumerate(owned):
        if len(box.starts) != len(whole.starts) or not whole.holds(box):
            raise UserError(
                f"placement: layer {layer.name!r} has outputs of shape {tuple(layer.output_shape)}, "
                f"but partition {worker} is given the box {box}"
            )
    index = Index(owned)
    for worker, box in enumerate(owned):
        for other in index.meeting(box):
            if other != worker:
                raise UserError(
                    f"placement: layer {layer.name!r}: the boxes {box} of partition {worker} and {owned[other]} of "
                    f"partition {other} overlap in {box.meet(owned[other])}; every output belongs to one partition"
                )
    left = whole.size - sum(box.size for box in owned)
    if left:
        some = [str(part) for part, _ in zip(index.missing(whole), range(3), strict=False)]
        raise UserError(
            f"placement: layer {layer.name!r}: {left} of {whole.size} outputs belong to no partition, among them "
            f"{' and '.join(some)}; the boxes of all partitions together must be the outputs of shape {whole.stops}"
        )


def _parsed(given: Box | str, layer: Layer, worker: int) -> Box:
    """Read a box from text like ``0:8, :, 46:91``."""
    if isinstance(given, Box):
        return given
    shape = tuple(layer.output_shape)
    text = given.strip().removeprefix("[").removesuffix("]").strip()
    if not text:
        return Box((0,) * len(shape), (0,) * len(shape))
    parts = [re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", part) for part in text.split(",")]
    ranges = [part.groups() for part in parts if part is not None]
    if len(parts) == len(ranges) == len(shape):
        starts = tuple(int(start or 0) for start, _ in ranges)
        stops = tuple(int(stop) if stop else size for (_, stop), size in zip(ranges, shape, strict=True))
        if all(start <= stop for start, stop in zip(starts, stops, strict=True)):
            return Box(starts, stops)
    example = ", ".join(f"0:{size}" for size in shape)
    raise UserError(
        f"placement: layer {layer.name!r}, partition {worker}: {given!r} is not a box of outputs of shape {shape}; "
        f'expected a range for each axis, e.g. "{example}"'
    )
