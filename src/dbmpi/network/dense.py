"""The dense layer: a matrix product, a bias, an activation."""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.kernels import bfloat16
from dbmpi.kernels.activations import ACTIVATIONS
from dbmpi.kernels.matmul import product
from dbmpi.network.builtin import Weighted
from dbmpi.network.layer import Arrays, Backward, Forward, SplitByInputs


class DenseLayer(Weighted[config.Dense], SplitByInputs):
    """A fully connected layer: ``y = activation(W x + b)`` with W of shape (units, inputs)."""

    accruing: ClassVar[bool] = True
    takes_bfloat16: ClassVar[bool] = True

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample."""
        return (self.section.units,)

    @cached_property
    def inputs(self) -> int:
        """Number of inputs of one sample, all of which each output needs."""
        return math.prod(self.input_shape)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weights": (self.section.units, self.inputs), "bias": (self.section.units,)}

    def input_box(self, output: Box) -> Box:
        """Every unit needs all inputs."""
        return Box.whole(self.input_shape)

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return the rows of the units in the box."""
        whole = Box.whole(self.tensors[tensor].shape)
        return Box(output.starts + whole.starts[1:], output.stops + whole.stops[1:])

    def forward(self, task: Forward) -> None:
        """Compute the outputs (units in the box, samples) of inputs ``(*input shape, samples)``."""
        self.partial_forward(task.parameters, task.inputs, task.outputs)
        self.finish_forward(task.parameters, task.outputs)

    def backward(self, task: Backward) -> None:
        """Compute the gradients of a loss from its gradient for the outputs (see the contract of a layer)."""
        self.begin_backward(task)
        self.partial_backward(task)

    # Split by inputs (see the contract of such a layer)

    def partial_tensor_box(self, tensor: str, inputs: Box, output: Box) -> Box:
        """Return the columns of the inputs; the biases of the outputs."""
        if tensor == "bias":
            return output
        return Box((0, *inputs.starts), (0 if inputs.empty else self.section.units, *inputs.stops))

    def partial_forward(self, parameters: Arrays, inputs: np.ndarray, sums: np.ndarray) -> None:
        """Multiply the inputs by their columns of the weights in `parameters`."""
        _product(parameters["weights"], _rows(inputs), sums)

    def finish_forward(self, parameters: Arrays, outputs: np.ndarray) -> None:
        """Add the bias in `parameters` to sums over all inputs, and apply the activation."""
        ACTIVATIONS[self.section.activation].forward(outputs, parameters["bias"])

    def begin_backward(self, task: Backward) -> None:
        """Turn the gradient for the outputs of `task` into that for the sums, and write that for the bias."""
        bias = task.parameter_gradient["bias"]
        of_this_pass = np.empty_like(bias) if task.add else bias
        ACTIVATIONS[self.section.activation].backward(task.outputs, task.gradient, of_this_pass)
        if task.add:
            bias += of_this_pass

    def partial_backward(self, task: Backward) -> None:
        """Compute the gradients for weights and inputs from that for the sums."""
        # The parameters' gradient comes last: once it is complete, the parameters may be changed at once.
        gradient = task.gradient
        if task.rounded_gradient is not None:
            gradient = task.rounded_gradient
            bfloat16.rounded(task.gradient, gradient)
        if task.input_gradient is not None:
            _product(task.parameters["weights"].T, gradient, _rows(task.input_gradient))
            task.inputs_done()
        _product(gradient, _rows(task.inputs).T, task.parameter_gradient["weights"], task.add)


def _product(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
    """Multiply matrices of the network's precision."""
    multiply = bfloat16.product if a.dtype == bfloat16.BFLOAT16 else product
    multiply(a, b, out, add)


def _rows(activations: np.ndarray) -> np.ndarray:
    """Return activations ``(*features, samples)`` as a matrix (features, samples); a view."""
    return activations.reshape(-1, activations.shape[-1])
