"""The convolution: the same filters at every place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dbmpi.kernels import convolution
from dbmpi.network.field import FieldLayer
from dbmpi.network.layer import Arrays, Context
from dbmpi.paramserver.layout import Tensor
from dbmpi.partition.boxes import Box


@dataclass(frozen=True)
class Convolution(FieldLayer):
    """A convolution (a correlation, as everywhere in the field); valid borders.

    Weights are ``(maps, channels, field rows, field columns)`` and biases ``(maps,)``.  Boxes of different places share
    the filters of their maps; their gradients for these add up.
    """

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters: short name in `Arrays` -> tensor of the layout."""
        return {
            "weights": Tensor(f"{self.name}/weights", (self.maps, self.input_shape[0], *self.field)),
            "bias": Tensor(f"{self.name}/bias", (self.maps,)),
        }

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return the filters of the maps in the box."""
        whole = Box.whole(self.tensors[tensor].shape)
        stop = output.starts[0] if output.empty else output.stops[0]
        return Box((output.starts[0], *whole.starts[1:]), (stop, *whole.stops[1:]))

    def forward(
        self, output: Box, parameters: Arrays, inputs: np.ndarray, outputs: np.ndarray, context: Context
    ) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        if not output.empty:
            convolution.forward(
                parameters["weights"], parameters["bias"], inputs, outputs, self.stride, self.activation
            )

    def backward(
        self,
        output: Box,
        parameters: Arrays,
        inputs: np.ndarray,
        outputs: np.ndarray,
        gradient: np.ndarray,
        parameter_gradient: Arrays,
        input_gradient: np.ndarray | None,
        context: Context,
    ) -> None:
        """Compute the gradients of a box (see the contract of a layer)."""
        if output.empty:
            return
        weights, bias = parameter_gradient["weights"], parameter_gradient["bias"]
        convolution.parameter_gradient(inputs, outputs, gradient, weights, bias, self.stride, self.activation)
        if input_gradient is not None:
            convolution.input_gradient(parameters["weights"], gradient, input_gradient, self.stride)
