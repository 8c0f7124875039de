"""Pooling of windows of ``(maps, rows, columns, samples)``: root of the sum of squares, mean and maximum.

A window is summed by its rows first and then by its columns, so that overlapping windows share the sums of columns.
Loops over the samples, which lie side by side, vectorise; loops over the rows of all maps are shared by the threads.
Output row `r` is made of the input rows ``r * stride`` to ``r * stride + size``, columns alike, whichever part of a
layer the arrays are: an output's sum has the same order everywhere.

Outputs and their gradient, (maps, rows, columns, samples), may be parts of larger arrays: kernels take their shape, and
them as :func:`dbmpi.kernels.memory.rows_of` gives them.  A window is (rows, columns, stride): its size, and the
distance of two windows.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from dbmpi.kernels.compile import Kernel, inlined, parallel_kernel
from dbmpi.kernels.elementary import add, copy
from dbmpi.kernels.memory import SAFE, Rows

Shape = tuple[int, int, int, int]
Window = tuple[int, int, int]


@parallel_kernel
def l2_forward(inputs: np.ndarray, window: Window, epsilon: float, shape: Shape, output_rows: Rows) -> bool:
    """Compute the root of `epsilon` plus the sum of squares of each window.

    Parameters
    ----------
    inputs : array (maps, input rows, input columns, samples)
    window : (int, int, int)
    epsilon : float
    shape, output_rows
        The outputs, which are overwritten.

    Returns
    -------
    bool
        Whether all outputs, but for NaN, are at most `SAFE`; perhaps False where some are not far below.
    """
    (rows, columns, stride), (outputs, steps) = window, output_rows
    maps, height, width, samples = shape
    square = inputs.reshape(maps, inputs.shape[1], inputs.shape[2] * samples)
    unsafe, apart = np.zeros(maps * height, np.uint8), max(1, rows // stride)
    large = inputs.dtype.type(SAFE / math.sqrt(rows * columns))
    for line in prange(maps * height):
        m, row = line // height, line % height
        sums = np.zeros(square.shape[2], inputs.dtype)
        for below in range(row * stride, row * stride + rows):
            _add_squares(sums, square[m, below])
        first = m * steps[0] + row * steps[1]
        for column in range(width):
            output = outputs[first + column * samples : first + (column + 1) * samples]
            output[:] = epsilon
            for right in range(column * stride, column * stride + columns):
                add(output, sums[right * samples : (right + 1) * samples])
            for sample in range(samples):
                output[sample] = np.sqrt(output[sample])
        # Windows that lie side by side hold all inputs.
        if row % apart == 0 or row == height - 1:
            unsafe[line] = _any_above(outputs[first : first + width * samples], large)
    return not unsafe.any()


def _combined(combine: Kernel[..., None], finish: Kernel[..., None]) -> Kernel[..., None]:
    """Return the forward pass that combines the elements of each window, and finishes the results."""

    def forward(inputs: np.ndarray, window: Window, shape: Shape, output_rows: Rows) -> None:
        (rows, columns, stride), (outputs, steps) = window, output_rows
        maps, height, width, samples = shape
        flat = inputs.reshape(maps, inputs.shape[1], inputs.shape[2] * samples)
        factor = inputs.dtype.type(1.0 / (rows * columns))
        for line in prange(maps * height):
            m, row = line // height, line % height
            combined = flat[m, row * stride].copy()
            for below in range(row * stride + 1, row * stride + rows):
                combine(combined, flat[m, below])
            first = m * steps[0] + row * steps[1]
            for column in range(width):
                output = outputs[first + column * samples : first + (column + 1) * samples]
                copy(output, combined[column * stride * samples : (column * stride + 1) * samples])
                for right in range(column * stride + 1, column * stride + columns):
                    combine(output, combined[right * samples : (right + 1) * samples])
                finish(output, factor)

    return parallel_kernel(forward)


@parallel_kernel
def l2_backward(
    inputs: np.ndarray,
    window: Window,
    shape: Shape,
    output_rows: Rows,
    gradient_rows: Rows,
    input_gradient: np.ndarray,
) -> bool:
    """Compute the inputs' gradient: input times the sum of gradient over output, of the windows that hold it.

    Parameters
    ----------
    inputs, window, shape, output_rows
        As for `l2_forward`.
    gradient_rows
        For the outputs; overwritten with its quotient by the outputs.
    input_gradient
        Overwritten.

    Returns
    -------
    bool
        False where float32 may not do, and nothing has been computed: some outputs are above `SAFE`, or not far below.
    """
    (rows, columns, stride), (outputs, output_steps), (gradient, steps) = window, output_rows, gradient_rows
    maps, out_height, width, samples = shape
    unsafe, apart = np.zeros(maps * out_height, np.uint8), max(1, rows // stride)
    large = inputs.dtype.type(SAFE / math.sqrt(rows * columns))
    for line in prange(maps * out_height):
        m, row = line // out_height, line % out_height
        below = outputs[m * output_steps[0] + row * output_steps[1] :][: width * samples]
        if row % apart == 0 or row == out_height - 1:
            unsafe[line] = _any_above(below, large)
    if inputs.itemsize == 4 and unsafe.any():
        return False
    for line in prange(maps * out_height):
        m, row = line // out_height, line % out_height
        above = gradient[m * steps[0] + row * steps[1] :][: width * samples]
        below = outputs[m * output_steps[0] + row * output_steps[1] :][: width * samples]
        for i in range(above.size):
            above[i] /= below[i]
    height = inputs.shape[1]
    for line in prange(inputs.shape[0] * height):
        m, row = line // height, line % height
        target = input_gradient[m, row]
        _spread_row(shape, gradient[m * steps[0] :], steps[1], row, rows, columns, stride, target)
        for column in range(target.shape[0]):
            factor, result = inputs[m, row, column], target[column]
            for sample in range(result.size):
                result[sample] *= factor[sample]
    return True


@parallel_kernel
def average_backward(window: Window, shape: Shape, gradient_rows: Rows, input_gradient: np.ndarray) -> None:
    """Compute the inputs' gradient: the sum of the gradient of the windows that hold it, over the size of a window.

    Parameters
    ----------
    window, shape, gradient_rows, input_gradient
        As for `l2_backward`; the gradient for the outputs stays as it is.
    """
    (rows, columns, stride), (gradient, steps) = window, gradient_rows
    height = input_gradient.shape[1]
    factor = gradient.dtype.type(1.0 / (rows * columns))
    for line in prange(input_gradient.shape[0] * height):
        m, row = line // height, line % height
        target = input_gradient[m, row]
        _spread_row(shape, gradient[m * steps[0] :], steps[1], row, rows, columns, stride, target)
        for column in range(target.shape[0]):
            result = target[column]
            for sample in range(result.size):
                result[sample] *= factor


@parallel_kernel
def max_backward(
    inputs: np.ndarray,
    window: Window,
    shape: Shape,
    output_rows: Rows,
    gradient_rows: Rows,
    input_gradient: np.ndarray,
) -> None:
    """Give each window's gradient to its first maximum, row after row.

    Parameters
    ----------
    inputs, window, shape, output_rows, gradient_rows, input_gradient
        As for `l2_backward`; the gradient for the outputs is overwritten.
    """
    (rows, columns, stride), (outputs, output_steps), (gradient, steps) = window, output_rows, gradient_rows
    maps, height, width, samples = shape
    for m in prange(maps):
        input_gradient[m] = 0
        largest, passed = np.empty(samples, inputs.dtype), np.empty(samples, inputs.dtype)
        # Each row of inputs hands out what the rows above it, which come first in all windows, have left.
        for row in range(inputs.shape[1]):
            first, last = _windows(row, rows, stride, height)
            if first > last:
                continue
            values, targets = inputs[m, row], input_gradient[m, row]
            for column in range(width):
                left = column * stride
                copy(largest, values[left])
                for right in range(left + 1, left + columns):
                    _keep_larger(largest, values[right])
                passed[:] = 0
                for reached in range(first, last + 1):
                    output = outputs[m * output_steps[0] + reached * output_steps[1] + column * samples :][:samples]
                    handed = gradient[m * steps[0] + reached * steps[1] + column * samples :][:samples]
                    _hand_over(largest, output, handed, passed)
                for right in range(left, left + columns):
                    _hand_over(values[right], largest, passed, targets[right])


@inlined
def _spread_row(
    shape: Shape,
    gradient: np.ndarray,
    step: int,
    row: int,
    rows: int,
    columns: int,
    stride: int,
    target: np.ndarray,
) -> None:
    """Set a row of inputs (columns, samples) to the sums of one map's gradient over the windows that hold each input.

    `gradient` starts at the map, and `step` is the distance of its rows.
    """
    _, height, width, samples = shape
    first, last = _windows(row, rows, stride, height)
    if first > last:
        target[:] = 0
        return
    sums = gradient[first * step :][: width * samples].copy()
    for above in range(first + 1, last + 1):
        add(sums, gradient[above * step :][: width * samples])
    for column in range(target.shape[0]):
        result = target[column]
        left, right = _windows(column, columns, stride, width)
        if left > right:
            result[:] = 0
        else:
            copy(result, sums[left * samples : (left + 1) * samples])
        for window in range(left + 1, right + 1):
            add(result, sums[window * samples : (window + 1) * samples])


@inlined
def _windows(position: int, size: int, stride: int, windows: int) -> tuple[int, int]:
    """Return the first and the last window that holds a position of an axis; none if the last is before the first."""
    return max(0, (position - size + stride) // stride), min(windows - 1, position // stride)


@inlined
def _add_squares(total: np.ndarray, values: np.ndarray) -> None:
    for i in range(total.size):
        total[i] += values[i] * values[i]


@inlined
def _any_above(values: np.ndarray, large: float) -> bool:
    found = False
    for i in range(values.size):
        found |= values[i] > large
    return found


@inlined
def _keep_larger(largest: np.ndarray, values: np.ndarray) -> None:
    for i in range(largest.size):
        value, known = values[i], largest[i]
        largest[i] = value if (value > known) | (value != value) else known  # noqa: PLR0124 - NaN


@inlined
def _scale(values: np.ndarray, factor: float) -> None:
    for i in range(values.size):
        values[i] *= factor


@inlined
def _leave(values: np.ndarray, factor: float) -> None:
    pass


@inlined
def _hand_over(values: np.ndarray, largest: np.ndarray, gradient: np.ndarray, target: np.ndarray) -> None:
    """Move the gradient to the target where a value is the largest, or NaN; the gradient becomes zero there."""
    zero = gradient.dtype.type(0)
    for i in range(values.size):
        value = values[i]
        found = (value == largest[i]) | (value != value)  # noqa: PLR0124 - NaN
        target[i] += gradient[i] if found else zero
        gradient[i] = zero if found else gradient[i]


average_forward = _combined(add, _scale)
"""``average_forward(inputs, window, shape, output_rows)``: the mean of each window; arguments as for `l2_forward`."""
max_forward = _combined(_keep_larger, _leave)
"""``max_forward(inputs, window, shape, output_rows)``: the maximum of each window, NaN if it holds one."""
