"""Layers: what each computes from its inputs, and the gradient that it gives back.

A layer is a description; it holds no arrays.  Activations are ``(*features, samples)``.  `forward` and `backward` look
only at the arrays that they are given, so that a caller may hand them a part of a layer's units: the matching rows of
its weights, biases, outputs and gradients.  The gradient for the inputs is then the part of these units, and the parts
add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dbmpi import config
from dbmpi.kernels.activations import ACTIVATIONS
from dbmpi.kernels.matmul import product
from dbmpi.network.initial import fill_uniform, weight_deviation
from dbmpi.paramserver.layout import Tensor

Arrays = Mapping[str, np.ndarray]
"""A layer's tensors by their short names, e.g. ``weights`` and ``bias``; views into a flat vector."""


@dataclass(frozen=True)
class Dense:
    """A fully connected layer: ``y = activation(W x + b)`` with W of shape (units, inputs)."""

    name: str
    input_shape: tuple[int, ...]
    units: int
    activation: str
    initial_scale: float = 1.0

    @classmethod
    def described(cls, section: config.Dense, name: str, input_shape: tuple[int, ...]) -> Dense:
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

    def flops(self, samples: int, *, input_gradient: bool = True) -> int:
        """Return the floating-point operations of the matrix products of a forward and a backward pass."""
        return (6 if input_gradient else 4) * self.units * self.inputs * samples

    def forward(self, parameters: Arrays, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """Compute the outputs (units, samples) of inputs (inputs, samples)."""
        product(parameters["weights"], inputs, outputs)
        ACTIVATIONS[self.activation].forward(outputs, parameters["bias"])

    def backward(
        self,
        parameters: Arrays,
        inputs: np.ndarray,
        outputs: np.ndarray,
        gradient: np.ndarray,
        parameter_gradient: Arrays,
        input_gradient: np.ndarray | None,
    ) -> None:
        """Compute the gradients of a loss from its gradient for the outputs.

        Parameters
        ----------
        parameters, inputs, outputs
            As in `forward`.
        gradient : (units, samples) array
            Gradient for the outputs; afterwards it is that before the activation.
        parameter_gradient : Arrays
            Where the gradient for the parameters is written.
        input_gradient : (inputs, samples) array, optional
            Where the gradient for the inputs is written, if anybody needs it.
        """
        ACTIVATIONS[self.activation].backward(outputs, gradient, parameter_gradient["bias"])
        # The parameters' gradient comes last: who learns that it is complete may change the parameters at once.
        if input_gradient is not None:
            product(parameters["weights"].T, gradient, input_gradient)
        product(gradient, inputs.T, parameter_gradient["weights"])
