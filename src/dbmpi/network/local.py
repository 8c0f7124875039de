"""The locally connected layer: filters of its own at every place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dbmpi.kernels import local
from dbmpi.network.field import FieldLayer
from dbmpi.network.layer import Arrays, Context
from dbmpi.paramserver.layout import Tensor
from dbmpi.partition.boxes import Box


@dataclass(frozen=True)
class Local(FieldLayer):
    """A locally connected layer, whose filters are not shared (Le et al., ICML 2012; the image networks of the paper).

    Weights are ``(rows, columns, maps, field columns, channels, field rows)`` and biases ``(rows, columns, maps)``: the
    parameters of a row of places lie together, so that those of a box are a few long runs.
    """

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters: short name in `Arrays` -> tensor of the layout."""
        maps, *places = self.output_shape
        rows, columns = self.field
        return {
            "weights": Tensor(f"{self.name}/weights", (*places, maps, columns, self.input_shape[0], rows)),
            "bias": Tensor(f"{self.name}/bias", (*places, maps)),
        }

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return the filters of the places and maps in the box."""
        whole = Box.whole(self.tensors[tensor].shape)
        return Box(
            (*output.starts[1:], output.starts[0], *whole.starts[3:]),
            (*output.stops[1:], output.stops[0], *whole.stops[3:]),
        )

    def forward(
        self, output: Box, parameters: Arrays, inputs: np.ndarray, outputs: np.ndarray, context: Context
    ) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        if not output.empty:
            local.forward(parameters["weights"], parameters["bias"], inputs, outputs, self.stride, self.activation)

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
        local.parameter_gradient(inputs, outputs, gradient, weights, bias, self.stride, self.activation)
        if input_gradient is not None:
            local.input_gradient(parameters["weights"], gradient, input_gradient, self.stride)
