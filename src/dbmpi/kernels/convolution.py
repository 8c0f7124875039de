"""Convolutions: filters that are shared by all places; valid borders.

Weights are (maps, channels, field rows, field columns).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from dbmpi.kernels import fields
from dbmpi.kernels.activations import ACTIVATIONS
from dbmpi.kernels.compile import Kernel, parallel_kernel
from dbmpi.kernels.fields import Blocks, Places, field_of, flat, piece_of
from dbmpi.kernels.vector import REGISTERS, lanes
from dbmpi.kernels.vector_lanes import multiply_along_rows
from dbmpi.kernels.vector_rows import multiply_rows

ORDER = "cuv"
"""Axes of a filter: channel, row, column."""
BANDS = 16
"""Most bands of rows whose sums for the weights are kept apart until the end, whatever the number of threads."""
_GATHERED = 6
"""Channels from which the inputs' gradient is gathered: the rows of a tile; fewer do not fill it."""
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
    if stride > 1 or weights.shape[1] < _GATHERED:
        field = field_of(ORDER, weights.shape[2:], result.shape)
        fields.input_gradient(weights, gradient, result, field, stride, tied=True)
        return
    # Every input is looked at once: it sums up the gradients of the outputs whose fields it lies in.
    feeding, blocks = _feeding(weights.shape[2:], gradient.shape), Blocks.of(weights.shape[1])
    sorted_weights = weights.transpose(1, 2, 0, 3)
    filters = [sorted_weights[..., left:right][..., ::-1].reshape(-1) for left, right in feeding.columns]
    flat(gradient), flat(result)
    _input_gradient(*blocks.heights, blocks.vectors)(
        *(np.concatenate(filters), gradient, result, feeding.places, feeding.starts, feeding.kinds, weights.shape[2]),
        *(blocks.tall, blocks.short, blocks.vectors * lanes(gradient.itemsize)),
    )


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


class _Feeding(NamedTuple):
    """Which outputs the inputs feed, at stride 1.

    Columns of the inputs are of one kind if they feed outputs by the same columns of the filters: those near the
    borders do so by some, and all between them by all.
    """

    columns: list[tuple[int, int]]
    """First and last (exclusive) column of the filters, for every kind."""
    kinds: np.ndarray
    """Kind of every column of the inputs, int64."""
    places: np.ndarray
    """Positions of the outputs relative to that at an input's own row and column, for one kind after the other, int64.

    Each by rows of the filters first, so that the rows that count are one piece; then by maps, and by columns of the
    outputs, so that what is read together is together in memory.
    """
    starts: np.ndarray
    """Where each kind starts in `places`, and the end, int64."""


@lru_cache(maxsize=256)
def _feeding(shape: tuple[int, int], gradient_shape: tuple[int, int, int, int]) -> _Feeding:
    """Return what inputs feed through filters of so many rows and columns."""
    maps, height, width, samples = gradient_shape
    spans = [(max(0, column - width + 1), min(shape[1], column + 1)) for column in range(width + shape[1] - 1)]
    columns, places = sorted(set(spans)), []
    for left, right in columns:
        u, m, v = np.meshgrid(range(shape[0]), range(maps), range(left, right)[::-1], indexing="ij")
        places.append((((m * height - u) * width - v) * samples).reshape(-1))
    starts = np.cumsum([0, *map(len, places)], dtype=np.int64)
    return _Feeding(columns, np.array([columns.index(span) for span in spans]), np.concatenate(places), starts)


@cache
def _input_gradient(height: int, shorter: int, vectors: int) -> Kernel[..., None]:
    """Return the kernel for stride 1, blocks of `height` and `shorter` channels, `vectors` vectors of samples each.

    It takes the filters in the order of `_Feeding.places`, (channels, depth) for each kind.
    """

    def input_gradient(
        w: np.ndarray,
        gradient: np.ndarray,
        result: np.ndarray,
        places: np.ndarray,
        starts: np.ndarray,
        kinds: np.ndarray,
        field_height: int,
        tall: int,
        short: int,
        width: int,
    ) -> None:
        _, out_height, out_width, samples = gradient.shape
        channels, in_height, in_width, _ = result.shape
        source, target, plane = gradient.reshape(-1), result.reshape(-1), in_height * in_width * samples
        for i in prange(in_height):
            top, bottom = max(0, i - out_height + 1), min(field_height, i + 1)
            for j in range(in_width):
                start_of_kind = starts[kinds[j]]
                depth = starts[kinds[j] + 1] - start_of_kind
                begin = start_of_kind + top * (depth // field_height)
                end = start_of_kind + bottom * (depth // field_height)
                piece = piece_of(depth)
                for first in range(begin, end, piece):
                    last = min(first + piece, end)
                    for start in range(0, samples, width):
                        filled = min(width, samples - start)
                        g_start = (i * out_width + j) * samples + start
                        x_start = (i * in_width + j) * samples + start
                        w_start = (channels - 1) * start_of_kind
                        # fmt: off
                        for _ in range(tall):
                            multiply_rows(
                                height, vectors, w, w_start, depth, source, g_start, places, first, last,
                                target, x_start, plane, filled, first > begin, False,
                            )
                            w_start += height * depth
                            x_start += height * plane
                        for _ in range(short):
                            multiply_rows(
                                shorter, vectors, w, w_start, depth, source, g_start, places, first, last,
                                target, x_start, plane, filled, first > begin, False,
                            )
                            w_start += shorter * depth
                            x_start += shorter * plane
                        # fmt: on

    return parallel_kernel(input_gradient)


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
