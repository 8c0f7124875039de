"""What is learned without targets: terms that layers in the middle of a network add to the loss.

Together, over the stages of a network, these are the objective of Le et al. ("Building high-level features using large
scale unsupervised learning", ICML 2012, equation 1): for each, ``|W2 W1^T x - x|^2 + lambda sum_j sqrt(epsilon +
H_j (W1^T x)^2)``, where the second term is the sum of the outputs of L2 pooling.  All layers are trained jointly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.kernels.memory import rows_of
from dbmpi.kernels.reconstruction import squared_error, total
from dbmpi.network.layer import Arrays, Layer, Reconstructing
from dbmpi.replica.exchange import Exchange
from dbmpi.replica.group import Group
from dbmpi.replica.placement import Placement, needed_inputs
from dbmpi.replica.plan import ExchangePlan

if TYPE_CHECKING:
    from dbmpi.replica.workspace import Workspace


class Term(Protocol):
    """A term of the loss that depends on a layer's outputs, and perhaps its inputs, on one worker."""

    place: int
    """Number of the layer."""

    def forward(self, parameters: Arrays, inputs: np.ndarray, work: Workspace) -> float:
        """Return this worker's part of the term, summed over the samples, after the layer's forward pass.

        `inputs` are those of the network, ``(*input shape, samples)``.
        """
        ...

    def backward(self, parameters: Arrays, parameter_gradient: Arrays, work: Workspace) -> None:
        """Add the gradient of the term's mean to that for the layer's outputs, before its backward pass."""
        ...

    def backward_below(self, work: Workspace) -> None:
        """Add the gradient of the term's mean to that for the outputs of the layer below, when that is complete."""
        ...


def objectives(layers: Sequence[Layer], placement: Placement, group: Group) -> dict[int, Term]:
    """Return the terms of a network on one worker, by the number of the layer."""
    found: dict[int, Term] = {}
    for place, layer in enumerate(layers):
        penalty = getattr(layer, "penalty", 0.0)
        if isinstance(layer, Reconstructing) and layer.reconstruction > 0:
            output = placement.boxes[place][group.rank]
            needed = needed_inputs(layers, placement)[place]
            owned = placement.boxes[place - 1] if place > 0 else _shared_out(layer, placement.boxes[0])
            plan = ExchangePlan(tuple(layer.input_shape), owned, needed)
            found[place] = _Reconstruction(place, layer, output, Exchange(group, plan))
        elif penalty > 0:
            found[place] = _Penalty(place, penalty)
    return found


class _Penalty:
    """``penalty * sum of the outputs``, which are not negative."""

    def __init__(self, place: int, penalty: float) -> None:
        self.place, self._penalty = place, penalty

    def forward(self, parameters: Arrays, inputs: np.ndarray, work: Workspace) -> float:
        outputs = _maps(work.outputs[self.place])
        return self._penalty * float(total(rows_of(outputs), outputs.shape))

    def backward(self, parameters: Arrays, parameter_gradient: Arrays, work: Workspace) -> None:
        gradient = work.gradient(self.place + 1)
        gradient += gradient.dtype.type(self._penalty / gradient.shape[-1])

    def backward_below(self, work: Workspace) -> None:
        pass


class _Reconstruction:
    """``weight * sum (estimate - input)^2``; the estimate is added up in those who own the inputs."""

    def __init__(self, place: int, layer: Reconstructing, output: Box, exchange: Exchange) -> None:
        self.place, self._layer, self._output, self._exchange = place, layer, output, exchange
        self._error = self._spread = np.empty(0)

    def forward(self, parameters: Arrays, inputs: np.ndarray, work: Workspace) -> float:
        outputs, exchange = work.outputs[self.place], self._exchange
        samples, dtype = outputs.shape[-1], outputs.dtype
        if self._error.shape != (*exchange.mine.shape, samples):
            self._error = np.empty((*exchange.mine.shape, samples), dtype)
            self._spread = np.empty((*exchange.needed.shape, samples), dtype)
        if not self._output.empty:
            self._layer.reconstruct(self._output, parameters, outputs, self._spread)
        exchange.add(self._spread, self._error)
        below = _maps(work.outputs[self.place - 1] if self.place > 0 else inputs[exchange.mine.slices()])
        weight = self._layer.reconstruction
        return weight * float(squared_error(_maps(self._error), rows_of(below), 2 * weight / samples))

    def backward(self, parameters: Arrays, parameter_gradient: Arrays, work: Workspace) -> None:
        self._exchange.fill(self._error, self._spread)
        if not self._output.empty:
            outputs, gradient = work.outputs[self.place], work.gradient(self.place + 1)
            self._layer.reconstruct_backward(
                self._output, parameters, outputs, self._spread, parameter_gradient, gradient
            )

    def backward_below(self, work: Workspace) -> None:
        if self.place > 0:
            gradient = work.gradient(self.place)
            gradient -= self._error


def _maps(activations: np.ndarray) -> np.ndarray:
    """Return activations of any shape as (maps, rows, columns, samples); a view where they have no gaps."""
    if activations.ndim == 4:
        return activations
    return np.ascontiguousarray(activations).reshape(-1, 1, 1, activations.shape[-1])


def _shared_out(layer: Layer, boxes: Sequence[Box]) -> tuple[Box, ...]:
    """Give each input of a network to one worker: about those at the places of the outputs that it owns."""
    sizes = list(zip(layer.input_shape, layer.output_shape, strict=True))
    return tuple(
        Box(
            tuple(start * inputs // outputs for start, (inputs, outputs) in zip(box.starts, sizes, strict=True)),
            tuple(stop * inputs // outputs for stop, (inputs, outputs) in zip(box.stops, sizes, strict=True)),
        )
        for box in boxes
    )
