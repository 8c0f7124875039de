"""Pooling layers: each output sums up one window of one map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.kernels import pooling
from dbmpi.kernels.memory import rows_of
from dbmpi.network.layer import Arrays, Context
from dbmpi.paramserver.layout import Tensor
from dbmpi.partition.boxes import Box

EPSILON = 1e-8
"""Added to the sum of squares in L2 pooling, so that the root has a derivative where all inputs are zero."""


@dataclass(frozen=True)
class Pooling:
    """Pooling without parameters, valid borders; windows overlap where the stride is less than their size.

    ``l2``: ``sqrt(epsilon + sum of squares)`` (Le et al., "Building high-level features using large scale unsupervised
    learning", ICML 2012, section 3); ``average``: mean; ``max``: maximum, whose gradient goes to the first maximum of
    a window, row after row.

    Inputs are ``(maps, height, width)``, outputs ``(maps, (height - rows) // stride + 1, (width - columns) // stride
    + 1)`` for windows of `size` ``(rows, columns)``.

    Raises
    ------
    UserError
        If the inputs have no rows and columns, or a window is larger than they are.
    """

    takes_parts: ClassVar[bool] = True

    name: str
    input_shape: tuple[int, ...]
    kind: str
    size: tuple[int, int]
    stride: int = 1
    penalty: float = 0.0
    """Weight of the sum of the outputs in the loss."""

    def __post_init__(self) -> None:
        if len(self.input_shape) != 3:
            raise UserError(
                f"layer {self.name!r}: pooling needs inputs of shape (maps, height, width), and those are of shape "
                f"{self.input_shape}: it can follow a layer with maps, or images"
            )
        if any(window > length for window, length in zip(self.size, self.input_shape[1:], strict=True)):
            raise UserError(
                f"layer {self.name!r}: a window of shape {self.size} does not fit into inputs of shape "
                f"{self.input_shape} (maps, height, width): make its size smaller, or the strides below it"
            )

    @classmethod
    def described(cls, section: config.Pooling, name: str, input_shape: tuple[int, ...]) -> Pooling:
        """Make the layer that a configuration describes."""
        size = section.size if isinstance(section.size, tuple) else (section.size, section.size)
        return cls(name, input_shape, section.kind, size, section.stride, section.penalty)

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample."""
        maps, *space = self.input_shape
        return (
            maps,
            *((length - window) // self.stride + 1 for length, window in zip(space, self.size, strict=True)),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """No parameters."""
        return {}

    def initial(self, tensor: str, out: np.ndarray, seed: int, number: int, start: int) -> None:
        """Never called: there are no parameters."""
        raise KeyError(tensor)

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Never called: there are no parameters."""
        raise KeyError(tensor)

    def input_box(self, output: Box) -> Box:
        """Return the rows and columns of the windows, of the same maps."""
        starts = (output.starts[0], *(start * self.stride for start in output.starts[1:]))
        stops = (
            output.stops[0],
            *((stop - 1) * self.stride + window for stop, window in zip(output.stops[1:], self.size, strict=True)),
        )
        return Box(starts, stops)

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the operations of windows that share nothing: those of the forward pass, and as many backward."""
        an_input = 2 if self.kind == "l2" else 1
        return (2 if input_gradient else 1) * an_input * self.size[0] * self.size[1] * output.size * samples

    def forward(
        self, output: Box, parameters: Arrays, inputs: np.ndarray, outputs: np.ndarray, context: Context
    ) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        windows, shape, (elements, steps) = (*self.size, self.stride), outputs.shape, rows_of(outputs)
        if self.kind == "l2":
            pooling.l2_forward(inputs, *windows, EPSILON, shape, elements, steps)
        elif self.kind == "average":
            pooling.average_forward(inputs, *windows, shape, elements, steps)
        else:
            pooling.max_forward(inputs, *windows, shape, elements, steps)

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
        """Compute the inputs' gradient (see the contract of a layer)."""
        if input_gradient is None:
            return
        windows, shape = (*self.size, self.stride), outputs.shape
        if self.kind == "l2":
            pooling.l2_backward(inputs, shape, *rows_of(outputs), *rows_of(gradient), *windows, input_gradient)
        elif self.kind == "average":
            pooling.average_backward(shape, *rows_of(gradient), *windows, input_gradient)
        else:
            pooling.max_backward(inputs, shape, *rows_of(outputs), *rows_of(gradient), *windows, input_gradient)
