"""The dense layer: a matrix product, a bias, an activation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.index.layout import Tensor
from dbmpi.kernels.activations import ACTIVATIONS
from dbmpi.kernels.matmul import product
from dbmpi.network.initial import fill_uniform, weight_deviation
from dbmpi.network.layer import Arrays, Backward, Forward


@dataclass(frozen=True)
class DenseLayer:
    """A fully connected layer: ``y = activation(W x + b)`` with W of shape (units, inputs)."""

    name: str
    input_shape: tuple[int, ...]
    units: int
    activation: str
    initial_scale: float = 1.0
    accruing: ClassVar[bool] = True

    @classmethod
    def from_config(cls, section: config.Dense, name: str, input_shape: tuple[int, ...]) -> DenseLayer:
        """Make the layer that a configuration describes."""
        return cls(name, input_shape, section.units, section.activation, section.initial_scale)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample."""
        return (self.units,)

    @cached_property
    def inputs(self) -> int:
        """Number of inputs of one sample."""
        return math.prod(self.input_shape)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters: short name in `Arrays` -> tensor of the layout."""
        return {
            "weights": Tensor(f"{self.name}/weights", (self.units, self.inputs)),
            "bias": Tensor(f"{self.name}/bias", (self.units,)),
        }

    def initial(self, tensor: str, out: np.ndarray, seed: int, number: int, start: int) -> None:
        """Fill `out` with the initial values of a flattened tensor from position `start` on.

        Parameters
        ----------
        tensor : str
            Short name of the tensor.
        out : 1-D array
        seed, number : int
            Seed of the run and number of the tensor in the layout.
        start : int
        """
        if tensor == "bias":
            out[:] = 0
        else:
            deviation = self.initial_scale * weight_deviation(self.inputs, self.activation)
            fill_uniform(out, seed, number, start, deviation)

    def input_box(self, output: Box) -> Box:
        """Every unit needs all inputs."""
        return Box.whole(self.input_shape)

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return the rows of the units in the box."""
        whole = Box.whole(self.tensors[tensor].shape)
        return Box(output.starts + whole.starts[1:], output.stops + whole.stops[1:])

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the floating-point operations of the matrix products of a forward and a backward pass."""
        return (6 if input_gradient else 4) * output.size * self.inputs * samples

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
        return Box((0, *inputs.starts), (0 if inputs.empty else self.units, *inputs.stops))

    def partial_forward(self, parameters: Arrays, inputs: np.ndarray, sums: np.ndarray) -> None:
        """Multiply inputs by the weights that are there for them."""
        product(parameters["weights"], _rows(inputs), sums)

    def finish_forward(self, parameters: Arrays, outputs: np.ndarray) -> None:
        """Turn sums over all inputs into outputs."""
        ACTIVATIONS[self.activation].forward(outputs, parameters["bias"])

    def begin_backward(self, task: Backward) -> None:
        """Turn the gradient for the outputs into that for the sums."""
        bias = task.parameter_gradient["bias"]
        of_this_pass = np.empty_like(bias) if task.add else bias
        ACTIVATIONS[self.activation].backward(task.outputs, task.gradient, of_this_pass)
        if task.add:
            bias += of_this_pass

    def partial_backward(self, task: Backward) -> None:
        """Compute the gradients for weights and inputs from that for the sums."""
        # The parameters' gradient comes last: once it is complete, the parameters may be changed at once.
        if task.input_gradient is not None:
            product(task.parameters["weights"].T, task.gradient, _rows(task.input_gradient))
            task.inputs_done()
        product(task.gradient, _rows(task.inputs).T, task.parameter_gradient["weights"], task.add)


def _rows(activations: np.ndarray) -> np.ndarray:
    """Return activations ``(*features, samples)`` as a matrix (features, samples); a view."""
    return activations.reshape(-1, activations.shape[-1])
