"""Pooling layers: each output sums up one window of one map."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.kernels import pooling
from dbmpi.kernels.memory import rows_of, widened
from dbmpi.network import windows
from dbmpi.network.builtin import BuiltIn
from dbmpi.network.layer import Backward, Forward

EPSILON = 1e-8
"""Added to the sum of squares in L2 pooling, so that the root has a derivative where all inputs are zero."""


class PoolingLayer(BuiltIn[config.Pooling]):
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

    def __post_init__(self) -> None:
        windows.check_windows(self.name, "a window", self.size, self.input_shape)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a window."""
        return windows.rows_and_columns(self.section.size)

    @cached_property
    def _window(self) -> tuple[int, int, int]:
        return (*self.size, self.section.stride)

    @property
    def penalty(self) -> float:
        """Weight of the sum of the outputs in the loss."""
        return self.section.penalty

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample."""
        return (self.input_shape[0], *windows.count(self.input_shape, self.size, self.section.stride))

    def input_box(self, output: Box) -> Box:
        """Return the rows and columns of the windows, of the same maps."""
        return windows.seen(output, (output.starts[0], output.stops[0]), self.size, self.section.stride)

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the operations for the box `output`, as if windows shared nothing: forward, and as many backward."""
        an_input = 2 if self.section.kind == "l2" else 1
        return (2 if input_gradient else 1) * an_input * self.size[0] * self.size[1] * output.size * samples

    def forward(self, task: Forward) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        inputs, outputs, shape = task.inputs, task.outputs, task.outputs.shape
        if self.section.kind == "l2":
            # float32 cannot hold the squares, where it can still hold their root
            safe = pooling.l2_forward(inputs, self._window, EPSILON, shape, rows_of(outputs))
            if not safe and inputs.dtype == np.float32:
                with widened(outputs, np.float64) as wide:
                    pooling.l2_forward(inputs.astype(wide.dtype), self._window, EPSILON, shape, rows_of(wide))
        elif self.section.kind == "average":
            pooling.average_forward(inputs, self._window, shape, rows_of(outputs))
        else:
            pooling.max_forward(inputs, self._window, shape, rows_of(outputs))

    def backward(self, task: Backward) -> None:
        """Compute the inputs' gradient (see the contract of a layer)."""
        if task.input_gradient is None:
            return
        arrays, shape, window = (task.inputs, task.outputs, task.gradient), task.outputs.shape, self._window
        inputs, outputs, gradient = arrays
        if self.section.kind == "l2":
            if pooling.l2_backward(inputs, window, shape, rows_of(outputs), rows_of(gradient), task.input_gradient):
                return
            with widened(task.input_gradient, np.float64) as wide:
                inputs, outputs, gradient = (array.astype(wide.dtype) for array in arrays)
                pooling.l2_backward(inputs, window, shape, rows_of(outputs), rows_of(gradient), wide)
        elif self.section.kind == "average":
            pooling.average_backward(window, shape, rows_of(gradient), task.input_gradient)
        else:
            pooling.max_backward(inputs, window, shape, rows_of(outputs), rows_of(gradient), task.input_gradient)
