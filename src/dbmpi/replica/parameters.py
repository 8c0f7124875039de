"""The parameters that one worker of a replica needs: a part of the whole vector, in one vector of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.index.layout import Layout, Stretch
from dbmpi.network.layer import Arrays, Layer
from dbmpi.replica.arrangement import Arrangement, equal
from dbmpi.replica.group import Group, Shelf
from dbmpi.replica.placement import Placement
from dbmpi.replica.tensors import Part, stretches, tensor_boxes, tensor_parts


class _Local(NamedTuple):
    """The box of a tensor that this worker needs."""

    short: str
    box: Box
    local: int
    """Where it starts in the worker's vector."""


class LocalParameters:
    """The parameters that one worker needs for its boxes, one behind the other in a flat vector.

    Parameters
    ----------
    layers
        The layers from the input upwards.
    layout
        The whole parameters.
    placement
        What each worker computes.
    group
        The workers, of which this is one.
    dtype
        Of the vectors.

    Attributes
    ----------
    size
        Elements of the worker's vector.
    runs
        Where its elements lie in the whole vector, in the order of the worker's vector, and whether this worker is
        the one that pushes their gradient.
    parts
        For each layer, the range of the worker's vector that holds its parameters.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        layout: Layout,
        placement: Placement,
        group: Group,
        dtype: np.dtype[np.floating],
    ) -> None:
        self._dtype, self._group = dtype, group
        boxes = tensor_boxes(layers, placement, group.rank)
        parts = tensor_parts(layers, placement)
        self._parts = [part for part in parts if group.rank in part.workers]
        self._locals: dict[str, _Local] = {}
        self._layers: list[dict[str, _Local]] = []
        self._shared: list[list[tuple[Part, _Local, Shelf]]] = []
        self.parts: tuple[range, ...] = ()
        self.size = 0
        for layer in layers:
            begin, mine = self.size, {}
            for short, tensor in layer.tensors.items():
                mine[tensor.name] = _Local(short, boxes[tensor.name], self.size)
                self.size += boxes[tensor.name].size
            shared = [part for part in parts if part.shared and part.tensor.name in mine]
            self._shared.append([(part, mine[part.tensor.name], group.shelf(fixed=part.box.size)) for part in shared])
            self._layers.append(mine)
            self._locals |= mine
            self.parts += (range(begin, self.size),)
        self.runs = self.runs_in(equal(layout, 1))

    def runs_in(self, arrangement: Arrangement) -> tuple[Stretch, ...]:
        """Return :attr:`runs` as they lie in the shards' order, which `arrangement` says."""
        runs: list[Stretch] = []
        for part in self._parts:
            _, box, local = self._locals[part.tensor.name]
            runs += stretches(part, arrangement.ranges_of(part), box, local, self._group.rank)
        return tuple(sorted(runs, key=lambda run: run.local))

    def cut(self, vector: np.ndarray, what: str) -> list[np.ndarray]:
        """Return every layer's part of the worker's flat vector; views.

        Raises ValueError, which calls the vector `what`, if its shape, dtype or strides are wrong.
        """
        if vector.shape != (self.size,) or vector.dtype != self._dtype or not vector.flags.c_contiguous:
            raise ValueError(
                f"{what}: given {vector.dtype} {vector.shape}, expected contiguous {self._dtype} ({self.size},)"
            )
        return [vector[part.start : part.stop] for part in self.parts]

    def tensors(self, layer: int, part: np.ndarray) -> Arrays:
        """Return a layer's tensors, by their short names, as views into its part of a vector."""
        begin, locals_ = self.parts[layer].start, self._layers[layer].values()
        return {short: part[at - begin : at - begin + box.size].reshape(box.shape) for short, box, at in locals_}

    def views(self, vector: np.ndarray, what: str) -> list[Arrays]:
        """Return every layer's tensors, by short names, as views into `vector`; raises as `cut`, calling it `what`."""
        return [self.tensors(layer, part) for layer, part in enumerate(self.cut(vector, what))]

    def shared(self, layer: int) -> bool:
        """Whether several workers hold some of a layer's parameters."""
        return bool(self._shared[layer])

    def add_up(self, layer: int, gradient: np.ndarray) -> None:
        """Add up the gradient of what several workers hold of a layer, e.g. the weights of a convolution cut in space.

        Called by all workers with their layer's part of it; nothing is done for what one of them holds alone.
        """
        for part, mine, shelf in self._shared[layer]:
            if self._group.rank in part.workers:
                summand = self.tensors(layer, gradient)[mine.short][part.box.slices(mine.box)]
            else:
                summand = np.empty(part.box.shape, self._dtype)
            values = np.ascontiguousarray(summand)
            summand[...] = self._group.sum(shelf, values, part.workers, "the gradient of shared parameters")

    def take(self, whole: np.ndarray) -> np.ndarray:
        """Return this worker's part of a whole parameter vector; a new array."""
        return np.concatenate([whole[run.start : run.start + run.length] for run in self.runs] or [whole[:0]])
