"""Pooling layers: each output sums up one window of one map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.kernels import pooling
from dbmpi.kernels.memory import rows_of, widened
from dbmpi.network import windows
from dbmpi.network.layer import Backward, Forward, Parameterless

EPSILON = 1e-8
"""Added to the sum of squares in L2 pooling, so that the root has a derivative where all inputs are zero."""


@dataclass(frozen=True)
class PoolingLayer(Parameterless):
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
        windows.check_windows(self.name, "a window", self.size, self.input_shape)

    @classmethod
    def from_config(cls, section: config.Pooling, name: str, input_shape: tuple[int, ...]) -> PoolingLayer:
        """Make the layer that a configuration describes."""
        size = section.size if isinstance(section.size, tuple) else (section.size, section.size)
        return cls(name, input_shape, section.kind, size, section.stride, section.penalty)

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample."""
        return (self.input_shape[0], *windows.count(self.input_shape, self.size, self.stride))

    def input_box(self, output: Box) -> Box:
        """Return the rows and columns of the windows, of the same maps."""
        return windows.seen(output, (output.starts[0], output.stops[0]), self.size, self.stride)

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the operations of windows that share nothing: those of the forward pass, and as many backward."""
        an_input = 2 if self.kind == "l2" else 1
        return (2 if input_gradient else 1) * an_input * self.size[0] * self.size[1] * output.size * samples

    def forward(self, task: Forward) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        inputs, window = task.inputs, (*self.size, self.stride)
        shape, (elements, steps) = task.outputs.shape, rows_of(task.outputs)
        if self.kind == "l2":
            # float32 cannot hold the squares, where it can still hold their root
            if not pooling.l2_forward(inputs, *window, EPSILON, shape, elements, steps) and inputs.dtype == np.float32:
                with widened(task.outputs) as wide:
                    pooling.l2_forward(inputs.astype(wide.dtype), *window, EPSILON, shape, *rows_of(wide))
        elif self.kind == "average":
            pooling.average_forward(inputs, *window, shape, elements, steps)
        else:
            pooling.max_forward(inputs, *window, shape, elements, steps)

    def backward(self, task: Backward) -> None:
        """Compute the inputs' gradient (see the contract of a layer)."""
        if task.input_gradient is None:
            return
        inputs, outputs, gradient, input_gradient = task.inputs, task.outputs, task.gradient, task.input_gradient
        window, shape = (*self.size, self.stride), outputs.shape
        if self.kind == "l2":
            if pooling.l2_backward(inputs, shape, *rows_of(outputs), *rows_of(gradient), *window, input_gradient):
                return
            with widened(input_gradient) as wide:
                inputs, outputs, gradient = (array.astype(wide.dtype) for array in (inputs, outputs, gradient))
                pooling.l2_backward(inputs, shape, *rows_of(outputs), *rows_of(gradient), *window, wide)
        elif self.kind == "average":
            pooling.average_backward(shape, *rows_of(gradient), *window, input_gradient)
        else:
            pooling.max_backward(inputs, shape, *rows_of(outputs), *rows_of(gradient), *window, input_gradient)
