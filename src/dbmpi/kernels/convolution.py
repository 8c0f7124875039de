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
from dbmpi.kernels.fields import Blocks, Places, field_of, flat
from dbmpi.kernels.vector import REGISTERS
from dbmpi.kernels.vector_lanes import multiply_along_rows

ORDER = "cuv"
"""Axes of a filter: channel, row, column."""
BANDS = 16
"""Most bands of rows whose sums for the weights are kept apart until the end, whatever the number of threads."""
PIECE = 1024
"""Elements of a row of outputs that are multiplied in one go: those of a block of maps fit into the first cache."""
_MOST = 1 << 24  # elements that they may take, altogether


def forward(
    weights: np.ndarray,
    bias: np.ndarray,
    inputs: np.ndarray,
    outputs: np.ndarray,
    stride: int,
    activation: str,
    places: Places | None = None,
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
    places
        Which rows and columns of the outputs to write; by default all.
    """
    field = field_of(ORDER, weights.shape[2:], inputs.shape)
    fields.forward(weights, bias, inputs, outputs, field, stride, activation, tied=True, places=places)


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
    maps, shape = len(weight_gradient), weight_gradient.shape[2:]
    flat(outputs), flat(gradient)
    ACTIVATIONS[activation].backward(outputs.reshape(maps, -1), gradient.reshape(maps, -1), bias_gradient)
    flat(inputs), flat(weight_gradient)
    blocks = Blocks.of(maps)
    columns = 3 if blocks.height > 4 or REGISTERS < 32 else 6
    places = field_of(ORDER, shape, inputs.shape).places
    depth = -(-places.size // columns) * columns  # the last place is taken again until the tiles are full
    bands = max(1, min(BANDS, gradient.shape[1], _MOST // (maps * depth)))
    sums = np.zeros((bands, maps * depth), inputs.dtype)
    _weight_gradient(*blocks.heights, columns)(
        *(inputs, gradient, sums, np.pad(places, (0, depth - places.size), "edge"), blocks.tall, blocks.short, stride)
    )
    total, first_short = sums.sum(axis=0), blocks.tall * blocks.height
    of_maps = weight_gradient.reshape(maps, -1)
    for height, first, last in ((blocks.height, 0, first_short), (blocks.height - 1, first_short, maps)):
        if last > first:
            tiles = total[first * depth : last * depth].reshape(-1, depth, height)
            of_maps[first:last] = tiles.swapaxes(1, 2).reshape(-1, depth)[:, : places.size]


@cache
def _weight_gradient(height: int, shorter: int, columns: int) -> Kernel[..., None]:
    """Return the kernel for blocks of `height` and `shorter` maps, `columns` weights of each at a time.

    It adds the gradients of each band of rows to its row of `sums`, where each block is (depth, maps).

    A row of outputs, columns by samples, is one piece, and so are the inputs that one weight multiplies if the stride
    is 1: the sums run along both, and nothing is transposed.  With other strides there is a piece for every column.
    """

    def weight_gradient(
        x: np.ndarray,
        gradient: np.ndarray,
        sums: np.ndarray,
        places: np.ndarray,
        tall: int,
        short: int,
        stride: int,
    ) -> None:
        _, out_height, out_width, samples = gradient.shape
        plane, row = out_height * out_width * samples, x.shape[2] * samples
        source, below = gradient.reshape(-1), x.reshape(-1)
        runs, length = (1, out_width * samples) if stride == 1 else (out_width, samples)
        runs_at_a_time = max(1, PIECE // length)
        bands = sums.shape[0]
        for band in prange(bands):
            out = sums[band]
            for i in range(band * out_height // bands, (band + 1) * out_height // bands):
                for run in range(0, runs, runs_at_a_time):
                    some = min(runs_at_a_time, runs - run)
                    for start in range(0, length, PIECE):
                        elements = min(PIECE, length - start)
                        x_start = i * stride * row + run * stride * samples + start
                        g_start = (i * out_width + run) * samples + start
                        block = 0
                        # fmt: off
                        for _ in range(tall):
                            for first in range(0, places.size, columns):
                                multiply_along_rows(
                                    height, columns, source, g_start, plane, samples, below, x_start, stride * samples,
                                    places, first, out, block + first * height, some, elements,
                                )
                            g_start += height * plane
                            block += height * places.size
                        for _ in range(short):
                            for first in range(0, places.size, columns):
                                multiply_along_rows(
                                    shorter, columns, source, g_start, plane, samples, below, x_start, stride * samples,
                                    places, first, out, block + first * shorter, some, elements,
                                )
                            g_start += shorter * plane
                            block += shorter * places.size
                        # fmt: on

    return parallel_kernel(weight_gradient)
