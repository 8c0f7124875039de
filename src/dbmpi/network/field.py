"""What locally connected layers and convolutions have in common: filters that see a field of all maps below."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.index.layout import Tensor
from dbmpi.kernels.filters import Filters
from dbmpi.network import windows
from dbmpi.network.initial import fill_uniform, weight_deviation
from dbmpi.network.layer import Arrays, Backward, Forward


@dataclass(frozen=True)
class FieldLayer:
    """A layer of filters, valid borders.

    Inputs are ``(channels, height, width)``, outputs ``(maps, (height - rows) // stride + 1, (width - columns) //
    stride + 1)`` for a field of ``(rows, columns)``.

    Raises
    ------
    UserError
        If the inputs have no rows and columns, or the field is larger than they are.
    """

    _kernels: ClassVar[Filters]

    name: str
    input_shape: tuple[int, ...]
    maps: int
    field: tuple[int, int]
    stride: int = 1
    activation: str = "linear"
    initial_scale: float = 1.0
    reconstruction: float = 0.0
    """Weight of the squared error of the inputs' estimate; if not 0, there is a ``decoder`` like the weights."""

    def __post_init__(self) -> None:
        windows.check_windows(self.name, "a field", self.field, self.input_shape)

    @property
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the weights and of the bias."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, section: config.Local | config.Convolution, name: str, input_shape: tuple[int, ...]) -> Self:
        """Make the layer that a configuration describes."""
        field = section.field if isinstance(section.field, tuple) else (section.field, section.field)
        return cls(
            name,
            input_shape,
            section.maps,
            field,
            section.stride,
            section.activation,
            section.initial_scale,
            section.reconstruction,
        )

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample."""
        return (self.maps, *windows.count(self.input_shape, self.field, self.stride))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters: short name in `Arrays` -> tensor of the layout."""
        weights, bias = self._shapes
        shapes = {"weights": weights, "bias": bias} | ({"decoder": weights} if self.reconstruction > 0 else {})
        return {short: Tensor(f"{self.name}/{short}", shape) for short, shape in shapes.items()}

    @property
    def inputs(self) -> int:
        """Number of inputs of one output."""
        return self.input_shape[0] * self.field[0] * self.field[1]

    def input_box(self, output: Box) -> Box:
        """Return the rows and columns of the fields, of all channels."""
        return windows.seen(output, (0, self.input_shape[0]), self.field, self.stride)

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the floating-point operations of the filters in a forward and a backward pass."""
        return (6 if input_gradient else 4) * output.size * self.inputs * samples

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

    def forward(self, task: Forward) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        self.forward_part(task, task.output)

    def forward_part(self, task: Forward, part: Box) -> None:
        """Compute a part of the outputs in a box: all of its maps at some positions."""
        rows, columns = ((one.start, one.stop) for one in part.slices(task.output)[1:])
        weights, bias = task.parameters["weights"], task.parameters["bias"]
        self._kernels.forward(weights, bias, task.inputs, task.outputs, self.stride, self.activation, (rows, columns))

    def backward(self, task: Backward) -> None:
        """Compute the gradients of a box (see the contract of a layer)."""
        gradient = task.gradient
        weights, bias = task.parameter_gradient["weights"], task.parameter_gradient["bias"]
        # The gradient before the activation is a by-product of the parameters'; without an activation it is there now.
        early = self.activation == "linear"
        if early and task.input_gradient is not None:
            self._kernels.input_gradient(task.parameters["weights"], gradient, task.input_gradient, self.stride)
            task.inputs_done()
        self._kernels.parameter_gradient(
            task.inputs, task.outputs, gradient, weights, bias, self.stride, self.activation
        )
        if not early and task.input_gradient is not None:
            self._kernels.input_gradient(task.parameters["weights"], gradient, task.input_gradient, self.stride)

    def reconstruct(self, output: Box, parameters: Arrays, outputs: np.ndarray, estimate: np.ndarray) -> None:
        """Estimate the inputs: every output times its filter of the decoder, added up where fields overlap."""
        self._kernels.input_gradient(parameters["decoder"], outputs, estimate, self.stride)

    def reconstruct_backward(
        self,
        output: Box,
        parameters: Arrays,
        outputs: np.ndarray,
        estimate_gradient: np.ndarray,
        parameter_gradient: Arrays,
        gradient: np.ndarray,
    ) -> None:
        """Compute the gradients of an estimate (see the contract of a reconstructing layer)."""
        decoder, of_decoder = parameters["decoder"], parameter_gradient["decoder"]
        self._kernels.add_sums(decoder, estimate_gradient, gradient, self.stride)
        # For the decoder, outputs and the estimate's gradient have each other's part: a linear filter from one to the
        # other.  (The kernel changes its gradient for other activations only.)
        unused = np.empty_like(parameters["bias"])
        self._kernels.parameter_gradient(estimate_gradient, outputs, outputs, of_decoder, unused, self.stride, "linear")
