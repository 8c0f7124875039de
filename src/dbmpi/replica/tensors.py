"""The parts of the parameters that each worker needs, and which of several that share one pushes the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import sub
from typing import TYPE_CHECKING, cast

from dbmpi.index.boxes import Box
from dbmpi.index.layout import Stretch, Tensor
from dbmpi.index.lookup import Index
from dbmpi.network.layer import SplitByInputs
from dbmpi.replica.cut import needed_tensor_box
from dbmpi.replica.placement import Placement

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer


@dataclass(frozen=True)
class Part:
    """A part of a tensor that the same workers need.

    If they are several, each has a gradient for it, and the sum counts; `owner` pushes it.
    """

    tensor: Tensor
    box: Box
    workers: tuple[int, ...]
    owner: int

    @property
    def shared(self) -> bool:
        """Whether several workers need it."""
        return len(self.workers) > 1


def tensor_boxes(layers: Sequence[Layer], placement: Placement, worker: int) -> dict[str, Box]:
    """Return the box of each tensor that a worker needs, perhaps empty, by the tensor's full name.

    Parameters
    ----------
    layers, placement
        The network, and what each worker computes.
    worker
        Its number.

    Returns
    -------
    dict
        In the order of the layout, and of the worker's own vector.
    """
    return {
        tensor.name: _needed(layer, short, tensor, placement, number, worker)
        for number, layer in enumerate(layers)
        for short, tensor in layer.tensors.items()
    }


def tensor_parts(layers: Sequence[Layer], placement: Placement) -> tuple[Part, ...]:
    """Return disjoint parts with every element of the layers' tensors that a `placement` needs, and their workers.

    Owners are chosen so that pushes are about equally large; the same on every rank.
    """
    needed: list[tuple[Tensor, Box, tuple[int, ...]]] = []
    for number, layer in enumerate(layers):
        for short, tensor in layer.tensors.items():
            workers: dict[Box, list[int]] = {}
            for worker in range(placement.partitions):
                box = _needed(layer, short, tensor, placement, number, worker)
                if not box.empty:
                    workers.setdefault(box, []).append(worker)
            needed += ((tensor, box, needers) for box, needers in _disjoint(workers))
    pushed = [0] * placement.partitions
    for _, box, needers in needed:
        if len(needers) == 1:
            pushed[needers[0]] += box.size
    parts = []
    for tensor, box, needers in needed:
        owner = needers[0] if len(needers) == 1 else min(needers, key=lambda worker: (pushed[worker], worker))
        if len(needers) > 1:
            pushed[owner] += box.size
        parts.append(Part(tensor, box, needers, owner))
    return tuple(parts)


def stretches(part: Part, whole: Iterable[range], box: Box, local: int, worker: int) -> Iterator[Stretch]:
    """Yield where a part of a tensor lies in a whole vector, and in the own vector of a worker that needs it.

    Parameters
    ----------
    part
        The part.
    whole
        Ranges of the whole vector with the elements of the part, in C order.
    box
        The part of the tensor that the worker needs.
    local
        Where `box` begins in its vector.
    worker
        Its number.
    """
    starts, stops = (tuple(map(sub, ends, box.starts)) for ends in (part.box.starts, part.box.stops))
    own = Box(starts, stops).runs(box.shape)
    here = range(0)
    for there in whole:
        position = there.start
        while position < there.stop:
            here = here or next(own)
            length = min(len(here), there.stop - position)
            yield Stretch(position, local + here.start, length, part.owner == worker)
            position, here = position + length, here[length:]


def _needed(layer: Layer, short: str, tensor: Tensor, placement: Placement, number: int, worker: int) -> Box:
    """Return the part of a tensor that a worker needs."""
    output = placement.boxes[number][worker]
    if placement.splits[number] == "outputs":
        return needed_tensor_box(layer, short, output)
    inputs = placement.boxes[number - 1][worker]
    if inputs.empty and output.empty:
        return Box((0,) * len(tensor.shape), (0,) * len(tensor.shape))
    return cast(SplitByInputs, layer).partial_tensor_box(short, inputs, output)


def _disjoint(workers: dict[Box, list[int]]) -> list[tuple[Box, tuple[int, ...]]]:
    """Cut boxes where they overlap, so that all elements of a part are needed by the same workers."""
    boxes = list(workers)
    index = Index(boxes)
    alone: list[Box] = []
    overlapping: list[Box] = []
    for number, box in enumerate(boxes):
        (alone if index.meeting(box) == [number] else overlapping).append(box)
    parts: list[tuple[Box, tuple[int, ...]]] = [(box, tuple(workers[box])) for box in alone]
    divided: list[tuple[Box, tuple[int, ...]]] = []
    for box in overlapping:
        new, kept = [box], []
        for part, needers in divided:
            common = part.meet(box)
            if common.empty:
                kept.append((part, needers))
                continue
            kept.append((common, tuple(sorted((*needers, *workers[box])))))
            kept += ((rest, needers) for rest in part.minus(common))
            new = [rest for piece in new for rest in piece.minus(common)]
        divided = kept + [(rest, tuple(workers[box])) for rest in new]
    # In the order of the tensor, so that the list does not depend on how it was computed.
    return sorted(parts + divided, key=lambda part: (part[0].starts, part[0].stops))
