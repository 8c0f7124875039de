"""Convolutions: filters that are shared by all places; valid borders.

Weights are (maps, channels, field rows, field columns).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import prange

from dbmpi.kernels import fields
from dbmpi.kernels.activations import ACTIVATIONS
from dbmpi.kernels.compile import Kernel, parallel_kernel
from dbmpi.kernels.fields import field_of, fill_window, flat, sum_blocks, window_of
from dbmpi.kernels.vector import multiply_rows

ORDER = "cuv"
"""Axes of a filter: channel, row, column."""
BANDS = 16
"""Most bands of rows whose sums for the weights are kept apart until the end, whatever the number of threads."""
_MOST = 1 << 24  # elements that they may take, altogether


def forward(
    weights: np.ndarray, bias: np.ndarray, inputs: np.ndarray, outputs: np.ndarray, stride: int, activation: str
) -> None:
    """Write ``activation(sum of weights times field + bias)``.

    ``outputs[m, i, j, b] = f(sum over c, u, v of weights[m, c, u, v] * inputs[c, i*stride+u, j*stride+v, b]
    + bias[m])``

    Parameters
    ----------
    weights : (maps, channels, field rows, field columns) array
        float32 or float64, as all others; all are C-contiguous.
    bias : (maps,) array
    inputs : (channels, height, width, samples) array
    outputs : (maps, rows, columns, samples) array
    stride : int
    activation : str
        One of :data:`dbmpi.kernels.fields.CODES`.
    """
    field = field_of(ORDER, weights.shape[2:], inputs.shape)
    fields.forward(weights, bias, inputs, outputs, field, stride, activation, tied=True)


def input_gradient(weights: np.ndarray, gradient: np.ndarray, result: np.ndarray, stride: int) -> None:
    """Write the gradient for the inputs into `result`, from that before the activation."""
    field = field_of(ORDER, weights.shape[2:], result.shape)
    fields.input_gradient(weights, gradient, result, field, stride, tied=True)


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
    maps, channels, *shape = weight_gradient.shape
    flat(outputs), flat(gradient)
    ACTIVATIONS[activation].backward(outputs.reshape(maps, -1), gradient.reshape(maps, -1), bias_gradient)
    window = window_of((shape[0], shape[1]), inputs.shape, inputs.itemsize)
    blocks, vectors = sum_blocks(maps)
    bands = max(1, min(BANDS, gradient.shape[1], _MOST // weight_gradient.size))
    sums = np.zeros((bands, maps, shape[1], channels, shape[0]), inputs.dtype)
    _weight_gradient(*blocks.heights, vectors)(
        *(flat(inputs), gradient, sums.reshape(bands, -1), window.column, window.rows, window.size),
        *(blocks.tall, blocks.short, shape[1], inputs.shape[2], stride, window.lanes, vectors * window.lanes),
    )
    weight_gradient[...] = sums.sum(axis=0).transpose(0, 2, 3, 1)


@cache
def _weight_gradient(height: int, shorter: int, vectors: int) -> Kernel[..., None]:
    """Return the kernel for blocks of `height` and `shorter` maps, `vectors` vectors of weights at a time.

    It adds the gradients of each band of rows to its row of `sums`; the axes of these are map, column, channel, row.
    """

    def weight_gradient(
        x: np.ndarray,
        gradient: np.ndarray,
        sums: np.ndarray,
        column: np.ndarray,
        rows: np.ndarray,
        window_size: int,
        tall: int,
        short: int,
        field_width: int,
        in_width: int,
        stride: int,
        vector: int,
        width: int,
    ) -> None:
        _, out_height, out_width, samples = gradient.shape
        depth, plane, source = column.size * field_width, out_height * out_width * samples, gradient.reshape(-1)
        step = window_size // rows.size
        bands = sums.shape[0]
        for band in prange(bands):
            window, out = np.empty(window_size, x.dtype), sums[band]
            for i in range(band * out_height // bands, (band + 1) * out_height // bands):
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
                    turned = left % field_width * column.size
                    for first in range(0, depth, width):
                        filled = min(width, depth - first)
                        g_start = (i * out_width + j) * samples
                        w_start = first
                        for _ in range(tall):
                            multiply_rows(
                                height, vectors, source, g_start, plane, window, turned + first, rows, 0, samples,
                                out, w_start, depth, filled, True,
                            )
                            g_start += height * plane
                            w_start += height * depth
                        for _ in range(short):
                            multiply_rows(
                                shorter, vectors, source, g_start, plane, window, turned + first, rows, 0, samples,
                                out, w_start, depth, filled, True,
                            )
                            g_start += shorter * plane
                            w_start += shorter * depth
                    # fmt: on

    return parallel_kernel(weight_gradient)
