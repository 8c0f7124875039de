"""Locally connected layers: filters that are not shared between places.

Weights are (rows, columns, maps, field columns, channels, field rows): what belongs to a place is one piece, so that a
box of places is a few long runs.  Within a filter the columns come first, as a field moves by columns from place to
place (see :class:`dbmpi.kernels.fields.Window`).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import prange

from dbmpi.kernels import fields
from dbmpi.kernels.compile import THREADS, Kernel, inlined, parallel_kernel
from dbmpi.kernels.fields import CODES, RELU, SIGMOID, TANH, field_of, fill_window, flat, sum_blocks, window_of
from dbmpi.kernels.vector import multiply_rows, prefetch_written

ORDER = "vcu"
"""Axes of a filter: column, channel, row."""


def forward(
    weights: np.ndarray, bias: np.ndarray, inputs: np.ndarray, outputs: np.ndarray, stride: int, activation: str
) -> None:
    """Write ``activation(sum of weights times field + bias)``.

    ``outputs[m, i, j, b] = f(sum over v, c, u of weights[i, j, m, v, c, u] * inputs[c, i*stride+u, j*stride+v, b]
    + bias[i, j, m])``

    Parameters
    ----------
    weights : (rows, columns, maps, field columns, channels, field rows) array
        float32 or float64, as all others; all are C-contiguous.
    bias : (rows, columns, maps) array
    inputs : (channels, height, width, samples) array
    outputs : (maps, rows, columns, samples) array
    stride : int
    activation : str
        One of `CODES`.
    """
    field = field_of(ORDER, _field_shape(weights), inputs.shape)
    fields.forward(weights, bias, inputs, outputs, field, stride, activation, tied=False)


def input_gradient(weights: np.ndarray, gradient: np.ndarray, result: np.ndarray, stride: int) -> None:
    """Write the gradient for the inputs into `result`, from that before the activation."""
    field = field_of(ORDER, _field_shape(weights), result.shape)
    fields.input_gradient(weights, gradient, result, field, stride, tied=False)


def parameter_gradient(
    inputs: np.ndarray,
    outputs: np.ndarray,
    gradient: np.ndarray,
    weight_gradient: np.ndarray,
    bias_gradient: np.ndarray,
    stride: int,
    activation: str,
) -> None:
    """Write the gradients for weights and bias; afterwards `gradient` is that before the activation.

    Parameters
    ----------
    inputs, outputs, stride, activation
        As in `forward`, after it.
    gradient : (maps, rows, columns, samples) array
        For the outputs.
    weight_gradient, bias_gradient : arrays like weights and bias
    """
    shape = _field_shape(weight_gradient)
    window = window_of(shape, inputs.shape, inputs.itemsize)
    blocks, vectors = sum_blocks(gradient.shape[0])
    flat(outputs), flat(gradient)
    _parameter_gradient(*blocks.heights, vectors)(
        *(flat(inputs), outputs, gradient, flat(weight_gradient), flat(bias_gradient)),
        *(np.empty((THREADS, window.size), inputs.dtype), window.column, window.rows),
        *(blocks.tall, blocks.short, shape[1], inputs.shape[2], stride, window.lanes, vectors * window.lanes),
        CODES[activation],
    )


def _field_shape(weights: np.ndarray) -> tuple[int, int]:
    return weights.shape[5], weights.shape[3]


@cache
def _parameter_gradient(height: int, shorter: int, vectors: int) -> Kernel[..., None]:
    """Return the kernel for blocks of `height` and `shorter` maps, `vectors` vectors of weights at a time."""

    def parameter_gradient(
        x: np.ndarray,
        y: np.ndarray,
        gradient: np.ndarray,
        weight_gradient: np.ndarray,
        bias_gradient: np.ndarray,
        windows: np.ndarray,
        column: np.ndarray,
        rows: np.ndarray,
        tall: int,
        short: int,
        field_width: int,
        in_width: int,
        stride: int,
        vector: int,
        width: int,
        code: int,
    ) -> None:
        maps, out_height, out_width, samples = gradient.shape
        depth, plane, source = column.size * field_width, out_height * out_width * samples, gradient.reshape(-1)
        step = windows.shape[1] // rows.size
        bands = windows.shape[0]
        for band in prange(bands):
            window = windows[band]
            for i in range(band * out_height // bands, (band + 1) * out_height // bands):
                for m in range(maps):
                    for j in range(out_width):
                        _derive(gradient, y, m, i, j, code)
                        total = 0.0
                        for b in range(samples):
                            total += np.float64(gradient[m, i, j, b])
                        bias_gradient[(i * out_width + j) * maps + m] = total
                done = 0
                for j in range(out_width):
                    left = j * stride
                    start = i * stride * in_width * samples
                    # fmt: off
                    fill_window(
                        x, start, max(done, left), left + field_width, column, field_width, samples,
                        window, step, vector,
                    )
                    done = left + field_width
                    place = (i * out_width + j) * maps * depth
                    turned = left % field_width * column.size
                    for first in range(0, depth, width):
                        filled = min(width, depth - first)
                        ahead = place + maps * (depth + first)
                        prefetch_written(weight_gradient, ahead, min(ahead + maps * filled, weight_gradient.size))
                        g_start = (i * out_width + j) * samples
                        w_start = place + first
                        for _ in range(tall):
                            multiply_rows(
                                height, vectors, source, g_start, plane, window, turned + first, rows, 0, samples,
                                weight_gradient, w_start, depth, filled, False,
                            )
                            g_start += height * plane
                            w_start += height * depth
                        for _ in range(short):
                            multiply_rows(
                                shorter, vectors, source, g_start, plane, window, turned + first, rows, 0, samples,
                                weight_gradient, w_start, depth, filled, False,
                            )
                            g_start += shorter * plane
                            w_start += shorter * depth
                    # fmt: on

    return parallel_kernel(parameter_gradient)


@inlined
def _derive(gradient: np.ndarray, y: np.ndarray, m: int, i: int, j: int, code: int) -> None:
    """Multiply the gradient of one map at one place by the activation's derivative."""
    if code == SIGMOID:
        for b in range(y.shape[3]):
            gradient[m, i, j, b] *= y[m, i, j, b] - y[m, i, j, b] * y[m, i, j, b]
    elif code == TANH:
        for b in range(y.shape[3]):
            gradient[m, i, j, b] -= gradient[m, i, j, b] * (y[m, i, j, b] * y[m, i, j, b])
    elif code == RELU:
        for b in range(y.shape[3]):
            gradient[m, i, j, b] = gradient.dtype.type(0) if y[m, i, j, b] <= 0 else gradient[m, i, j, b]
