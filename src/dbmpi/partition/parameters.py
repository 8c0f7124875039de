"""Which part of the parameters a worker holds, and where it lies in the whole vector and in the worker's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dbmpi.network.layer import Arrays, Layer
from dbmpi.paramserver.layout import Layout, Run
from dbmpi.partition.boxes import Box
from dbmpi.runtime import waiting

if TYPE_CHECKING:
    from mpi4py import MPI


class _Held(NamedTuple):
    short: str
    whole: tuple[int, ...]
    box: Box
    local: int
    shared: bool


class LocalParameters:
    """The parameters that one worker needs for its boxes, one behind the other in a flat vector.

    Parameters
    ----------
    layers
        The layers from the input upwards.
    layout
        The whole parameters.
    boxes
        For each layer, the box of its outputs that each worker computes.
    worker
        Number of the worker.
    dtype
        Of the vectors.

    Attributes
    ----------
    size
        Elements of the worker's vector.
    runs
        Where its elements lie in the whole vector, in the order of the worker's vector.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        layout: Layout,
        boxes: Sequence[Sequence[Box]],
        worker: int,
        dtype: np.dtype[np.floating],
    ) -> None:
        self._dtype = dtype
        self.serve: Callable[[], bool] | None = None
        self._layers: list[list[_Held]] = []
        self.runs: tuple[Run, ...] = ()
        runs: list[Run] = []
        position = 0
        for layer, owned in zip(layers, boxes, strict=True):
            held = []
            for short, tensor in layer.tensors.items():
                mine = _tensor_box(layer, short, owned[worker])
                others = [_tensor_box(layer, short, box) for place, box in enumerate(owned) if place != worker]
                shared = any(not mine.meet(other).empty for other in others)
                # The same on all workers: whether any two of them hold the same element.
                every = [*others, mine]
                common = sum(box.size for box in every) > tensor.size
                assert common or not shared
                pushed = not any(box.holds(mine) for box in others[:worker]) if shared else True
                held.append(_Held(short, tensor.shape, mine, position, common))
                for run in mine.runs(tensor.shape):
                    runs.append(Run(layout.offsets[tensor.name] + run.start, position, len(run), pushed))
                    position += len(run)
            self._layers.append(held)
        self.size = position
        self.runs = tuple(runs)

    def views(self, vector: np.ndarray, what: str) -> list[Arrays]:
        """Return every layer's tensors, by their short names, as views into the worker's flat vector."""
        if vector.shape != (self.size,) or vector.dtype != self._dtype or not vector.flags.c_contiguous:
            raise ValueError(
                f"{what}: given {vector.dtype} {vector.shape}, expected contiguous {self._dtype} ({self.size},)"
            )
        return [
            {part.short: vector[part.local :][: part.box.size].reshape(part.box.shape) for part in held}
            for held in self._layers
        ]

    def add_up(self, layer: int, gradient: np.ndarray, comm: MPI.Intracomm | None) -> None:
        """Add up the gradient of what several workers hold of a layer, e.g. the weights of a convolution cut in space.

        Collective over `comm`; nothing is done for parameters that one worker holds alone.
        """
        for part in self._layers[layer]:
            if not part.shared or comm is None:
                continue
            from mpi4py import MPI

            whole = np.zeros(part.whole, gradient.dtype)
            mine = gradient[part.local :][: part.box.size].reshape(part.box.shape)
            whole[part.box.slices()] = mine
            total = waiting.allreduce(comm, whole, MPI.SUM, "the gradient of shared weights", serve=self.serve)
            mine[...] = total[part.box.slices()]

    def take(self, whole: np.ndarray) -> np.ndarray:
        """Return this worker's part of a whole parameter vector; a new array."""
        return np.concatenate([whole[run.start : run.start + run.length] for run in self.runs] or [whole[:0]])


def _tensor_box(layer: Layer, short: str, output: Box) -> Box:
    if output.empty:
        axes = len(layer.tensors[short].shape)
        return Box((0,) * axes, (0,) * axes)
    return layer.tensor_box(short, output)
