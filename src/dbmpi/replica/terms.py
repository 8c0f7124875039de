"""Learning without targets: terms that layers in the middle of a network add to the loss.

Together, over the stages of a network, these are the objective of Le et al. ("Building high-level features using large
scale unsupervised learning", ICML 2012, equation 1): for each, ``|W2 W1^T x - x|^2 + lambda sum_j sqrt(epsilon +
H_j (W1^T x)^2)``, where the second term is the sum of the outputs of L2 pooling.  All layers are trained jointly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

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


class Term(ABC):
    """A term of the loss that depends on a layer's outputs, and perhaps its inputs, on one worker.

    Parameters
    ----------
    number
        Of the layer.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    @abstractmethod
    def forward(self, parameters: Arrays, work: Workspace) -> float:
        """Return this worker's part of the term, summed over the samples, after the layer's forward pass.

        Parameters
        ----------
        parameters
            Of the layer on this worker.
        work
            With the layer's inputs and outputs.
        """

    @abstractmethod
    def backward(self, parameters: Arrays, gradient: Arrays, work: Workspace) -> None:
        """Add the gradient of the term's mean to that for the layer's outputs, before its backward pass.

        Parameters
        ----------
        parameters, work
            As for `forward`.
        gradient
            Arrays for the gradient of the parameters: overwritten for those that only the term depends on.
        """

    @abstractmethod
    def backward_below(self, work: Workspace) -> None:
        """Add the gradient of the term's mean to that in `work` for the layer below, which is complete."""


def terms(layers: Sequence[Layer], placement: Placement, group: Group) -> dict[int, Term]:
    """Return the terms of a network on one worker, by the number of the layer.

    Parameters
    ----------
    layers, placement
        The network, and what each worker computes.
    group
        The workers, of which this is one.
    """
    result: dict[int, Term] = {}
    for number, layer in enumerate(layers):
        penalty = getattr(layer, "penalty", 0.0)
        if isinstance(layer, Reconstructing) and layer.reconstruction > 0:
            output = placement.boxes[number][group.rank]
            needed = needed_inputs(layers, placement)[number]
            owned = placement.boxes[number - 1] if number > 0 else _shared_out(layer, placement.boxes[0])
            plan = ExchangePlan(tuple(layer.input_shape), owned, needed)
            result[number] = _Reconstruction(number, layer, output, Exchange(group, plan))
        elif penalty > 0:
            result[number] = _Penalty(number, penalty)
    return result


class _Penalty(Term):
    """``penalty * sum of the outputs``, which are not negative."""

    def __init__(self, number: int, penalty: float) -> None:
        super().__init__(number)
        self._penalty = penalty

    def forward(self, parameters: Arrays, work: Workspace) -> float:
        outputs = _maps(work.outputs[self._number])
        return self._penalty * float(total(rows_of(outputs), outputs.shape))

    def backward(self, parameters: Arrays, gradient: Arrays, work: Workspace) -> None:
        of_outputs = work.output_gradient(self._number)
        of_outputs += of_outputs.dtype.type(self._penalty / of_outputs.shape[-1])

    def backward_below(self, work: Workspace) -> None:
        pass


class _Reconstruction(Term):
    """``weight * sum (estimate - input)^2``; each worker adds up the estimate of its inputs."""

    def __init__(self, number: int, layer: Reconstructing, output: Box, exchange: Exchange) -> None:
        super().__init__(number)
        self._layer, self._output, self._exchange = layer, output, exchange
        self._error = self._spread = np.empty(0)

    def forward(self, parameters: Arrays, work: Workspace) -> float:
        number, outputs, exchange = self._number, work.outputs[self._number], self._exchange
        samples, dtype = outputs.shape[-1], outputs.dtype
        if self._error.shape != (*exchange.owned.shape, samples):
            self._error = np.empty((*exchange.owned.shape, samples), dtype)
            self._spread = np.empty((*exchange.needed.shape, samples), dtype)
        if not self._output.empty:
            self._layer.reconstruct(self._output, parameters, outputs, self._spread)
        exchange.add(self._spread, self._error)
        below = _maps(work.outputs[number - 1] if number > 0 else work.batch[exchange.owned.slices()])
        weight = self._layer.reconstruction
        return weight * float(squared_error(_maps(self._error), rows_of(below), 2 * weight / samples))

    def backward(self, parameters: Arrays, gradient: Arrays, work: Workspace) -> None:
        self._exchange.fill(self._error, self._spread)
        if not self._output.empty:
            outputs, of_outputs = work.outputs[self._number], work.output_gradient(self._number)
            self._layer.reconstruct_backward(self._output, parameters, outputs, self._spread, gradient, of_outputs)

    def backward_below(self, work: Workspace) -> None:
        if self._number > 0:
            of_inputs = work.output_gradient(self._number - 1)
            of_inputs -= self._error


def _maps(activations: np.ndarray) -> np.ndarray:
    """Return activations of any shape as (maps, rows, columns, samples); a view where they have no gaps."""
    if activations.ndim == 4:
        return activations
    return np.ascontiguousarray(activations).reshape(-1, 1, 1, activations.shape[-1])


def _shared_out(layer: Layer, boxes: Sequence[Box]) -> tuple[Box, ...]:
    """Give each input of a network to one worker: about those at the positions of the outputs that it owns."""
    sizes = list(zip(layer.input_shape, layer.output_shape, strict=True))
    return tuple(
        Box(
            tuple(start * inputs // outputs for start, (inputs, outputs) in zip(box.starts, sizes, strict=True)),
            tuple(stop * inputs // outputs for stop, (inputs, outputs) in zip(box.stops, sizes, strict=True)),
        )
        for box in boxes
    )
