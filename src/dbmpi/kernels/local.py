"""Locally connected layers: filters that are not shared between places.

Weights are (rows, columns, maps, field rows, field columns, channels): what belongs to a place is one piece, so that a
box of places is a few long runs.  Within a filter the rows come first, as they do in `_Window`.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from dbmpi.kernels import fields
from dbmpi.kernels.compile import THREADS, Kernel, inlined, parallel_kernel
from dbmpi.kernels.fields import CODES, RELU, SIGMOID, TANH, Blocks, Places, field_of, flat
from dbmpi.kernels.memory import rows_of
from dbmpi.kernels.vector import lanes
from dbmpi.kernels.vector_lanes import transpose_block
from dbmpi.kernels.vector_rows import multiply_rows, prefetch

ORDER = "uvc"
"""Axes of a filter: row, column, channel."""


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

    ``outputs[m, i, j, b] = f(sum over u, v, c of weights[i, j, m, u, v, c] * inputs[c, i*stride+u, j*stride+v, b]
    + bias[i, j, m])``

    Parameters
    ----------
    weights : (rows, columns, maps, field rows, field columns, channels) array
        float32 or float64, as all others; all but `outputs` are C-contiguous.
    bias : (rows, columns, maps) array
    inputs : (channels, height, width, samples) array
    outputs : (maps, rows, columns, samples) array
        May be a part of a larger one, with rows in one piece.
    stride : int
    activation : str
        One of `CODES`.
    places
        Which rows and columns of the outputs to write; by default all.
    """
    field = field_of(ORDER, _field_shape(weights), inputs.shape)
    fields.forward(weights, bias, inputs, outputs, field, stride, activation, tied=False, places=places)


def input_gradient(weights: np.ndarray, gradient: np.ndarray, result: np.ndarray, stride: int) -> None:
    """Write the gradient for the inputs into `result`, from that before the activation; `gradient` as `outputs`."""
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
        For the outputs; may be a part of a larger one, too.
    weight_gradient, bias_gradient : arrays like weights and bias
    """
    rows, columns = _field_shape(weight_gradient)
    window, blocks = _window_of(rows, inputs.shape, inputs.itemsize), Blocks.of(gradient.shape[0])
    _parameter_gradient(*blocks.heights, blocks.vectors)(
        *(flat(inputs), *rows_of(outputs), *rows_of(gradient), flat(weight_gradient), flat(bias_gradient)),
        *(np.empty((THREADS, window.size), inputs.dtype), window.places, window.samples, window.slot, window.lanes),
        *(blocks.tall, blocks.short, (rows, columns), inputs.shape, gradient.shape, stride),
        *(blocks.vectors * window.lanes, CODES[activation]),
    )


def _field_shape(weights: np.ndarray) -> tuple[int, int]:
    return weights.shape[3], weights.shape[4]


@cache
def _parameter_gradient(height: int, shorter: int, vectors: int) -> Kernel[..., None]:
    """Return the kernel for blocks of `height` and `shorter` maps, `vectors` vectors of weights at a time."""

    def parameter_gradient(
        x: np.ndarray,
        y: np.ndarray,
        y_steps: tuple[int, int],
        gradient: np.ndarray,
        steps: tuple[int, int],
        weight_gradient: np.ndarray,
        bias_gradient: np.ndarray,
        windows: np.ndarray,
        places: np.ndarray,
        starts: np.ndarray,
        slot: int,
        vector: int,
        tall: int,
        short: int,
        field: tuple[int, int],
        x_shape: tuple[int, int, int, int],
        shape: tuple[int, int, int, int],
        stride: int,
        width: int,
        code: int,
    ) -> None:
        maps, out_height, out_width, samples = shape
        plane, row_size = steps[0], out_width * samples
        rows, run = field[0], field[1] * x_shape[0]
        depth, bands = rows * run, windows.shape[0]
        for band in prange(bands):
            window = windows[band]
            done = 0
            for i in range(band * out_height // bands, (band + 1) * out_height // bands):
                for m in range(maps):
                    of_row = gradient[m * plane + i * steps[1] :][:row_size]
                    _derive(of_row, y[m * y_steps[0] + i * y_steps[1] :][:row_size], code)
                    for j in range(out_width):
                        of_place, total = of_row[j * samples : (j + 1) * samples], gradient.dtype.type(0)
                        for b in range(of_place.size):
                            total += of_place[b]
                        bias_gradient[(i * out_width + j) * maps + m] = total
                top = i * stride
                # fmt: off
                _fill_window(
                    x, x_shape[2] * samples, max(done, top), top + rows, samples,
                    window, places, starts, slot, rows, vector,
                )
                # fmt: on
                done = top + rows
                for j in range(out_width):
                    place = (i * out_width + j) * maps * depth
                    for u in range(rows):
                        x_start = (top + u) % rows * slot + j * stride * x_shape[0]
                        for first in range(0, run, width):
                            filled = min(width, run - first)
                            ahead = place + maps * (depth + u * run + first)
                            prefetch(weight_gradient, ahead, min(ahead + maps * filled, weight_gradient.size), True)
                            g_start = i * steps[1] + j * samples
                            w_start = place + u * run + first
                            # fmt: off
                            for _ in range(tall):
                                multiply_rows(
                                    height, vectors, gradient, g_start, plane, window, x_start + first,
                                    starts, 0, samples, weight_gradient, w_start, depth, filled, False, False,
                                )
                                g_start += height * plane
                                w_start += height * depth
                            for _ in range(short):
                                multiply_rows(
                                    shorter, vectors, gradient, g_start, plane, window, x_start + first,
                                    starts, 0, samples, weight_gradient, w_start, depth, filled, False, False,
                                )
                                g_start += shorter * plane
                                w_start += shorter * depth
                            # fmt: on

    return parallel_kernel(parameter_gradient)


class _Window(NamedTuple):
    """The rows of inputs that the present place's field lies in, transposed for sums over samples.

    Each is (samples, columns x channels), so that a row of the field is one piece.  The next row of places has all but
    some of its rows in common with the present one: row number n stays in slot n modulo the field's rows.
    """

    places: np.ndarray
    """Positions in the inputs of the elements of the first row, int64 (columns x channels,)."""
    samples: np.ndarray
    """Where each sample starts in a slot, int64."""
    slot: int
    """Elements of a slot."""
    slots: int
    """Rows of the field."""
    lanes: int
    """Lanes of a vector."""

    @property
    def size(self) -> int:
        """Elements of all slots."""
        return self.slot * self.slots


@lru_cache(maxsize=256)
def _window_of(field_rows: int, input_shape: tuple[int, int, int, int], itemsize: int) -> _Window:
    """Return the window on inputs (channels, height, width, samples) for fields of so many rows."""
    channels, height, width, samples = input_shape
    vector = lanes(itemsize)
    # An odd number of vectors from sample to sample, so that a column does not fall into few sets of the cache.
    step = (-(-channels * width // vector) | 1) * vector
    starts = np.arange(-(-samples // vector) * vector, dtype=np.int64) * step
    places = (np.arange(width)[:, None] + np.arange(channels) * height * width) * samples
    return _Window(places.reshape(-1).astype(np.int64), starts, starts.size * step, field_rows, vector)


@inlined
def _fill_window(
    x: np.ndarray,
    x_step: int,
    first: int,
    last: int,
    samples: int,
    window: np.ndarray,
    places: np.ndarray,
    starts: np.ndarray,
    slot: int,
    slots: int,
    vector: int,
) -> None:
    """Bring rows ``first <= n < last`` of the inputs, `x_step` elements each, into the window."""
    for n in range(first, last):
        for place in range(0, places.size, vector):
            for sample in range(0, samples, vector):
                # fmt: off
                transpose_block(
                    x, n * x_step + sample, places, place, places.size - place, samples - sample,
                    window, n % slots * slot + starts[sample] + place, starts[1],
                )
                # fmt: on


@inlined
def _derive(gradient: np.ndarray, y: np.ndarray, code: int) -> None:
    """Multiply the gradient of a row of one map by the activation's derivative."""
    if code == SIGMOID:
        for b in range(y.size):
            gradient[b] *= y[b] - y[b] * y[b]
    elif code == TANH:
        for b in range(y.size):
            gradient[b] -= gradient[b] * (y[b] * y[b])
    elif code == RELU:
        for b in range(y.size):
            gradient[b] = gradient.dtype.type(0) if y[b] <= 0 else gradient[b]
