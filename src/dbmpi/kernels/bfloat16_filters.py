"""Filters on fields that multiply bfloat16 numbers by the kernels of float32.

Products of two bfloat16 numbers are exact in float32, so that results are those of bfloat16 with sums in float32; the
time is that of float32, and a little more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dbmpi.kernels import bfloat16
from dbmpi.kernels.activations import ACTIVATIONS
from dbmpi.kernels.filters import Filters, Region
from dbmpi.kernels.memory import aligned_empty

_BLOCK = 1 << 16
"""Numbers that are rounded and widened at a time: they are still in a cache."""


@dataclass(frozen=True)
class RoundedFilters:
    """The passes of a layer of filters, as those of `Filters`, with weights and inputs of bfloat16 (uint16).

    Biases, outputs, and all gradients are float32.

    Parameters
    ----------
    filters : Filters
        The same in float32.
    """

    filters: Filters

    def forward(
        self,
        weights: np.ndarray,
        bias: np.ndarray,
        inputs: np.ndarray,
        outputs: np.ndarray,
        region: Region | None = None,
    ) -> None:
        """Write ``activation(sum of weights times field + bias)`` (see `Filters.forward`).

        Parameters
        ----------
        weights, inputs : uint16 arrays
            As for `Filters`.
        bias, outputs : float32 arrays
            As for `Filters`.
        region
            Which rows and columns of the outputs to write; by default all.
        """
        self.filters.forward(wide(weights), bias, wide(inputs), outputs, region)

    def add_sums(self, weights: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """Add the sums of weights times the field in float32 `inputs`, rounded here, to `outputs`."""
        self.filters.add_sums(wide(weights), rounded(inputs), outputs)

    def input_gradient(self, weights: np.ndarray, gradient: np.ndarray, result: np.ndarray) -> None:
        """Write the gradient for the inputs into `result`, from `weights` and a `gradient` that is rounded here."""
        self.filters.input_gradient(wide(weights), rounded(gradient), result)

    def parameter_gradient(
        self,
        inputs: np.ndarray,
        outputs: np.ndarray,
        gradient: np.ndarray,
        weight_gradient: np.ndarray,
        bias_gradient: np.ndarray,
    ) -> None:
        """Write the gradients for weights and bias; afterwards `gradient` is that before the activation, not rounded.

        The gradient for the bias is the sum of that before the activation, which is rounded for the weights only.

        Parameters
        ----------
        inputs : uint16 array
            As in `forward`.
        outputs, gradient : float32 arrays
            As for `Filters`.
        weight_gradient, bias_gradient : float32 arrays
            Like weights and bias; overwritten.
        """
        maps, samples = gradient.shape[0], gradient.shape[-1]
        # A row has a bias of its own: of all positions of a map where they share it, or of one.
        rows = (maps, -1) if self.filters.tied else (-1, samples)
        of_sums, sums = (np.ascontiguousarray(array).reshape(rows) for array in (gradient, outputs))
        of_biases = np.empty(len(of_sums), bias_gradient.dtype)
        ACTIVATIONS[self.filters.activation].backward(sums, of_sums, of_biases)
        if not np.shares_memory(of_sums, gradient):
            gradient[...] = of_sums.reshape(gradient.shape)
        self._weight_gradient(inputs, gradient, weight_gradient)
        if self.filters.tied:
            bias_gradient[...] = of_biases
        else:
            bias_gradient[...] = np.moveaxis(of_biases.reshape(gradient.shape[:-1]), 0, -1)

    def _weight_gradient(self, inputs: np.ndarray, gradient: np.ndarray, weight_gradient: np.ndarray) -> None:
        """Write the gradient for the weights from that before the activation, which is rounded here."""
        of_biases = np.empty(weight_gradient.shape[: -3 if self.filters.tied else 3], weight_gradient.dtype)
        linear, of_sums = replace(self.filters, activation="linear"), rounded(gradient)
        linear.parameter_gradient(wide(inputs), of_sums, of_sums, weight_gradient, of_biases)


def wide(values: np.ndarray) -> np.ndarray:
    """Return bfloat16 `values` as a new array of float32."""
    result = np.empty(values.shape, np.float32)
    bfloat16.widened(values, result)
    return result


def rounded(values: np.ndarray) -> np.ndarray:
    """Return float32 `values` as a new array of float32 that is rounded to bfloat16."""
    result = np.empty(values.shape, np.float32)
    half = np.empty(min(_BLOCK, values.size), bfloat16.BFLOAT16)
    source, target = np.ascontiguousarray(values).reshape(-1), result.reshape(-1)
    for first in range(0, values.size, _BLOCK):
        block = slice(first, min(first + _BLOCK, values.size))
        some = half[: block.stop - first]
        bfloat16.rounded(source[block], some)
        bfloat16.widened(some, target[block])
    return result


def rounded_copy(values: np.ndarray) -> np.ndarray:
    """Return float32 `values` as a new array of bfloat16 numbers."""
    result = aligned_empty(values.shape, bfloat16.BFLOAT16)
    bfloat16.rounded(values, result)
    return result
