"""The parameters that one worker of a replica holds: a part of the whole vector, in one vector of its own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.index.layout import Layout, Stretch
from dbmpi.network.layer import Arrays, Layer
from dbmpi.replica.arrangement import Arrangement
from dbmpi.replica.group import Group, Shelf
from dbmpi.replica.placement import Placement
from dbmpi.replica.tensors import Part, pushed_runs, tensor_boxes, tensor_parts


class _Held(NamedTuple):
    """A tensor's box on this worker."""

    short: str
    box: Box
    local: int
    """Where it starts in the layer's part of the worker's vector."""


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
        worker = group.rank
        self._dtype = dtype
        self._group = group
        boxes = tensor_boxes(layers, placement, worker)
        parts = tensor_parts(layers, placement)
        self._layers: list[list[_Held]] = []
        self._shared: list[list[tuple[Part, _Held, Shelf]]] = []
        self._held: dict[str, tuple[Box, int]] = {}
        runs: list[Stretch] = []
        ends = [0]
        position = 0
        pushed = pushed_runs(layout, parts, worker)
        for layer in layers:
            held, shared = [], []
            for short, tensor in layer.tensors.items():
                mine = _Held(short, boxes[tensor.name], position - ends[-1])
                held.append(mine)
                self._held[tensor.name] = mine.box, position
                for part in parts:
                    if part.tensor == tensor and part.shared:
                        shared.append((part, mine, group.shelf(fixed=part.box.size)))
                for run in mine.box.runs(tensor.shape):
                    offset = layout.offsets[tensor.name]
                    for piece, push in _divided(range(offset + run.start, offset + run.stop), pushed):
                        runs.append(Stretch(piece.start, position, len(piece), push))
                        position += len(piece)
            self._layers.append(held)
            self._shared.append(shared)
            ends.append(position)
        self.size = position
        self.runs = tuple(runs)
        self.parts = tuple(range(start, stop) for start, stop in pairwise(ends))

    def runs_in(self, arrangement: Arrangement) -> tuple[Stretch, ...]:
        """Return :attr:`runs` as they lie in the shards' order."""
        if not arrangement.parts:
            return self.runs
        return arrangement.runs(self._group.rank, self._held)

    def cut(self, vector: np.ndarray, what: str) -> list[np.ndarray]:
        """Return every layer's part of the worker's flat vector; views."""
        if vector.shape != (self.size,) or vector.dtype != self._dtype or not vector.flags.c_contiguous:
            raise ValueError(
                f"{what}: given {vector.dtype} {vector.shape}, expected contiguous {self._dtype} ({self.size},)"
            )
        return [vector[part.start : part.stop] for part in self.parts]

    def tensors(self, layer: int, part: np.ndarray) -> Arrays:
        """Return a layer's tensors, by their short names, as views into its part of a vector."""
        return {held.short: _view(part, held) for held in self._layers[layer]}

    def views(self, vector: np.ndarray, what: str) -> list[Arrays]:
        """Return every layer's tensors, by their short names, as views into the worker's flat vector."""
        return [self.tensors(layer, part) for layer, part in enumerate(self.cut(vector, what))]

    def shared(self, layer: int) -> bool:
        """Whether several workers hold some of a layer's parameters."""
        return bool(self._shared[layer])

    def add_up(self, layer: int, gradient: np.ndarray) -> None:
        """Add up the gradient of what several workers hold of a layer, e.g. the weights of a convolution cut in space.

        Called by all workers with their layer's part of it; nothing is done for what one of them holds alone.
        """
        for part, held, shelf in self._shared[layer]:
            if self._group.rank in part.workers:
                place = _view(gradient, held)[part.box.slices(held.box)]
            else:
                place = np.empty(part.box.shape, self._dtype)
            values = np.ascontiguousarray(place)
            place[...] = self._group.sum(shelf, values, part.workers, "the gradient of shared parameters")

    def take(self, whole: np.ndarray) -> np.ndarray:
        """Return this worker's part of a whole parameter vector; a new array."""
        return np.concatenate([whole[run.start : run.start + run.length] for run in self.runs] or [whole[:0]])


def _view(part: np.ndarray, held: _Held) -> np.ndarray:
    return part[held.local :][: held.box.size].reshape(held.box.shape)


def _divided(run: range, pushed: Sequence[range]) -> Iterator[tuple[range, bool]]:
    """Cut a run where the sorted ranges that are pushed begin and end."""
    start = run.start
    place = max(bisect_right(pushed, start, key=lambda one: one.start) - 1, 0)
    while start < run.stop:
        while place < len(pushed) and pushed[place].stop <= start:
            place += 1
        inside = place < len(pushed) and pushed[place].start <= start
        border = pushed[place].stop if inside else pushed[place].start if place < len(pushed) else run.stop
        stop = min(run.stop, border)
        yield range(start, stop), inside
        start = stop
