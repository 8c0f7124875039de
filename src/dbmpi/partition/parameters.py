"""The parameters that one worker of a replica holds: a part of the whole vector, in one vector of its own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dbmpi.network.layer import Arrays, Layer
from dbmpi.paramserver.layout import Layout, Run
from dbmpi.partition.boxes import Box
from dbmpi.partition.placement import Placement
from dbmpi.partition.tensors import Part, pushed_runs, tensor_boxes, tensor_parts
from dbmpi.runtime import waiting

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 9


class _Held(NamedTuple):
    """A tensor's box on this worker."""

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
    worker
        Number of the worker.
    dtype
        Of the vectors.

    Attributes
    ----------
    size
        Elements of the worker's vector.
    runs
        Where its elements lie in the whole vector, in the order of the worker's vector, and whether this worker is
        the one that pushes their gradient.
    serve
        Called while this worker waits for others.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        layout: Layout,
        placement: Placement,
        worker: int,
        dtype: np.dtype[np.floating],
    ) -> None:
        self._dtype = dtype
        self._worker = worker
        self.serve: Callable[[], bool] | None = None
        boxes = tensor_boxes(layers, placement, worker)
        parts = tensor_parts(layers, placement)
        self._layers: list[list[_Held]] = []
        self._shared: list[list[tuple[Part, _Held]]] = []
        runs: list[Run] = []
        position = 0
        pushed = pushed_runs(layout, parts, worker)
        for layer in layers:
            held, shared = [], []
            for short, tensor in layer.tensors.items():
                mine = _Held(short, boxes[tensor.name], position)
                held.append(mine)
                shared += [(part, mine) for part in parts if part.tensor is tensor and part.shared]
                for run in mine.box.runs(tensor.shape):
                    offset = layout.offsets[tensor.name]
                    for piece, push in _divided(range(offset + run.start, offset + run.stop), pushed):
                        runs.append(Run(piece.start, position, len(piece), push))
                        position += len(piece)
            self._layers.append(held)
            self._shared.append([(part, mine) for part, mine in shared if worker in part.workers])
        self.size = position
        self.runs = tuple(runs)

    @property
    def parts(self) -> tuple[range, ...]:
        """For each layer, the range of the worker's vector that holds its parameters."""
        starts = [0]
        for held in self._layers:
            starts.append(starts[-1] + sum(one.box.size for one in held))
        return tuple(range(start, stop) for start, stop in pairwise(starts))

    def views(self, vector: np.ndarray, what: str) -> list[Arrays]:
        """Return every layer's tensors, by their short names, as views into the worker's flat vector."""
        if vector.shape != (self.size,) or vector.dtype != self._dtype or not vector.flags.c_contiguous:
            raise ValueError(
                f"{what}: given {vector.dtype} {vector.shape}, expected contiguous {self._dtype} ({self.size},)"
            )
        return [{part.short: _view(vector, part) for part in held} for held in self._layers]

    def add_up(self, layer: int, gradient: np.ndarray, comm: MPI.Intracomm | None) -> None:
        """Add up the gradient of what several workers hold of a layer, e.g. the weights of a convolution cut in space.

        Called by all workers; those that hold a part together add it up, and nothing is done for what one holds alone.
        """
        if comm is None:
            return
        for part, held in self._shared[layer]:
            place = _view(gradient, held)[part.box.slices(held.box)]
            place[...] = self._sum(np.ascontiguousarray(place), part, comm)

    def take(self, whole: np.ndarray) -> np.ndarray:
        """Return this worker's part of a whole parameter vector; a new array."""
        return np.concatenate([whole[run.start : run.start + run.length] for run in self.runs] or [whole[:0]])

    def _sum(self, mine: np.ndarray, part: Part, comm: MPI.Intracomm) -> np.ndarray:
        """Return the sum over the part's workers, in their order: the owner adds, and sends what comes out."""
        what = "the gradient of shared weights"
        if len(part.workers) == comm.size:
            from mpi4py import MPI

            return waiting.allreduce(comm, mine, MPI.SUM, what, serve=self.serve)
        others = [worker for worker in part.workers if worker != part.owner]
        if self._worker != part.owner:
            waiting.complete(comm.Isend(mine, part.owner, _TAG), what, serve=self.serve)
            waiting.complete(comm.Irecv(mine, part.owner, _TAG), what, serve=self.serve)
            return mine
        buffers = [mine if worker == part.owner else np.empty_like(mine) for worker in part.workers]
        requests = [
            comm.Irecv(buffer, worker, _TAG)
            for worker, buffer in zip(part.workers, buffers, strict=True)
            if worker != part.owner
        ]
        for request in requests:
            waiting.complete(request, what, serve=self.serve)
        total = buffers[0].copy()
        for buffer in buffers[1:]:
            total += buffer
        for request in [comm.Isend(total, worker, _TAG) for worker in others]:
            waiting.complete(request, what, serve=self.serve)
        return total


def _view(vector: np.ndarray, held: _Held) -> np.ndarray:
    return vector[held.local :][: held.box.size].reshape(held.box.shape)


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
