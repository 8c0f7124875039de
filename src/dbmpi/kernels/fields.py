"""Filters on fields: the products that locally connected layers and convolutions have in common.

At every place of the output lies a small matrix product: the filters of the place, (maps, depth), times its field of
the inputs, (depth, samples), where depth is channels x field rows x field columns.  Samples are innermost, so that one
weight multiplies vectors of them.  The field is not copied: a table says where its rows of samples lie.  A block of
maps times two vectors of samples is summed in registers.

Untied filters are read once for all samples; forward and backward pass then do ``6 * samples`` operations for every
weight, of which 4 bytes are read twice and, as its gradient, written once.  With few samples that flow of memory is as
much of a limit as the arithmetic, and so what comes next is prefetched.  With many samples the rows of inputs under a
field exceed the second cache: the column that the next field takes in is then prefetched, too.

Every output is summed in an order that depends on the depth alone, not on the box that is computed, its maps, the
samples or the threads.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from dbmpi.kernels.compile import THREADS, Kernel, inlined, parallel_kernel
from dbmpi.kernels.elementary import sigmoid, tanh
from dbmpi.kernels.memory import rows_of
from dbmpi.kernels.vector import REGISTERS, lanes
from dbmpi.kernels.vector_rows import add_maps_to_rows, add_to_rows, multiply_rows, prefetch

DEPTH = 384
"""Most rows of a field that are multiplied in one go: with two vectors each they fit into the first cache."""
MAPS = 8 if REGISTERS == 32 else 4
"""Most maps in a block, whose sums stay in registers."""
ROWS, ROWS_OF_FEW_MAPS = 6, 8 if REGISTERS == 32 else 6
"""Most rows of a field in a block whose sums stay in registers while the maps are added: found by trying.

Of 5, 6, 8 and 10, for 16 maps 6 was the fastest, and for 8 maps, where a block is soon done, 8.
"""

CODES = {"linear": 0, "sigmoid": 1, "tanh": 2, "relu": 3}
"""How kernels know the activations."""
SIGMOID, TANH, RELU = CODES["sigmoid"], CODES["tanh"], CODES["relu"]


Places = tuple[tuple[int, int], tuple[int, int]]
"""First and last (exclusive) row and column of outputs."""


class Blocks(NamedTuple):
    """Maps or rows in blocks of nearly the same height: `tall` blocks of `height`, then `short` blocks of one less."""

    height: int
    tall: int
    short: int

    @classmethod
    def of(cls, maps: int, most: int = MAPS) -> Blocks:
        """Cut the maps into as few blocks as possible, of at most so many."""
        number = -(-maps // most)
        height = -(-maps // number)
        short = number * height - maps
        return cls(height, number - short, short)

    @property
    def heights(self) -> tuple[int, int]:
        """Heights of tall and short blocks that there are; 0 where there are no short ones."""
        return self.height, self.height - 1 if self.short else 0

    @property
    def vectors(self) -> int:
        """Vectors of samples that a block is multiplied by at a time, so that its sums do not wait for one another."""
        return 2 if self.height > 4 or REGISTERS < 32 else 4


class Field(NamedTuple):
    """Where the elements of a field lie in inputs (channels, height, width, samples); in the order of the weights."""

    places: np.ndarray
    """Positions (depth,) relative to the first element of the field, int64."""
    rows: np.ndarray
    """Row (depth,) of the field that each is in, int64."""
    beyond: np.ndarray
    """Positions (channels x rows,) of the column right of the field, which the next one takes in at stride 1; int64."""


@lru_cache(maxsize=256)
def field_of(order: str, shape: tuple[int, int], input_shape: tuple[int, int, int, int]) -> Field:
    """Return the field of an array of inputs.

    Parameters
    ----------
    order : str
        Axes of a filter, slowest first: a permutation of ``c`` (channel), ``u`` (row) and ``v`` (column).
    shape : tuple[int, int]
        Rows and columns of the field.
    input_shape : tuple[int, int, int, int]
    """
    channels, height, width, samples = input_shape
    axes = {"c": np.arange(channels), "u": np.arange(shape[0]), "v": np.arange(shape[1])}
    grid = dict(zip(order, np.meshgrid(*(axes[axis] for axis in order), indexing="ij"), strict=True))
    places = ((grid["c"] * height + grid["u"]) * width + grid["v"]) * samples
    beyond = places[grid["v"] == shape[1] - 1] + samples
    return Field(places.reshape(-1).astype(np.int64), grid["u"].reshape(-1).astype(np.int64), beyond.astype(np.int64))


def flat(array: np.ndarray) -> np.ndarray:
    """Return an array as one axis, without a copy.

    Raises
    ------
    ValueError
        If it is not C-contiguous.
    """
    if not array.flags.c_contiguous:
        raise ValueError(f"given an array {array.shape} with strides {array.strides}, expected a C-contiguous one")
    return array.reshape(-1)


def forward(
    weights: np.ndarray,
    bias: np.ndarray,
    inputs: np.ndarray,
    outputs: np.ndarray,
    field: Field,
    stride: int,
    activation: str,
    tied: bool,
    places: Places | None = None,
) -> None:
    """Write the outputs (maps, rows, columns, samples) of inputs (channels, height, width, samples).

    Parameters
    ----------
    weights, bias
        (maps, depth) and (maps,) in any shape if `tied`, else (rows, columns, maps, depth) and (rows, columns, maps).
    outputs
        May be a part of a larger array, with rows in one piece.
    places
        Which rows and columns of the outputs to write; by default all.
    """
    maps, rows, columns, samples = outputs.shape
    within = places or ((0, rows), (0, columns))
    blocks, step = Blocks.of(maps), stride * samples
    place, width = 0 if tied else maps, blocks.vectors * lanes(outputs.itemsize)
    beyond = field.beyond if samples > width else field.beyond[:0]
    _forward(*blocks.heights, blocks.vectors, not tied)(
        *(flat(weights), flat(bias), flat(inputs), *rows_of(outputs), field.places, beyond),
        *(blocks.tall, blocks.short, (step * inputs.shape[2], step), (columns * place, place), width),
        *(CODES[activation], (maps, samples), *within),
    )


def input_gradient(
    weights: np.ndarray, gradient: np.ndarray, result: np.ndarray, field: Field, stride: int, tied: bool
) -> None:
    """Write the gradient for the inputs, of that for the outputs before the activation; shapes as in `forward`.

    Of filters that are not tied, `gradient` may be a part of a larger array, with rows in one piece.
    """
    maps, rows, columns, samples = gradient.shape
    bands = _bands(rows, result.shape[1], int(field.rows.max()) + 1, stride, THREADS)
    if tied:
        blocks = Blocks.of(maps)
        _input_gradient(*blocks.heights, blocks.vectors)(
            *(flat(weights), _contiguous(gradient), _contiguous(result), field.places, field.rows),
            *(blocks.tall, blocks.short, bands, stride, (0, 0), blocks.vectors * lanes(gradient.itemsize)),
        )
        return
    run = len(field.rows) // (1 + int(np.count_nonzero(np.diff(field.rows))))  # elements in a row of the field
    blocks = Blocks.of(run, ROWS if maps > MAPS else ROWS_OF_FEW_MAPS)
    width = blocks.vectors * lanes(gradient.itemsize)
    beyond = field.beyond if samples > width else field.beyond[:0]
    _untied_input_gradient(*blocks.heights, blocks.vectors)(
        *(flat(weights), *rows_of(gradient), _contiguous(result), field.places, field.rows, beyond),
        *(run, blocks.tall, blocks.short, bands, stride, (columns * maps, maps), width, (maps, rows, columns)),
    )


@cache
def _forward(height: int, shorter: int, vectors: int, ahead: bool) -> Kernel[..., None]:
    """Return the kernel for blocks of `height` and `shorter` maps, `vectors` vectors of samples at a time.

    With `ahead` it asks for the filters of the next block early: where places have their own, they come from memory.
    """

    def forward(
        w: np.ndarray,
        bias: np.ndarray,
        x: np.ndarray,
        y: np.ndarray,
        y_steps: tuple[int, int],
        places: np.ndarray,
        beyond: np.ndarray,
        tall: int,
        short: int,
        steps: tuple[int, int],
        filters: tuple[int, int],
        width: int,
        code: int,
        shape: tuple[int, int],
        rows: tuple[int, int],
        columns: tuple[int, int],
    ) -> None:
        maps, samples = shape
        depth, plane = places.size, y_steps[0]
        piece = piece_of(depth)
        for i in prange(rows[0], rows[1]):
            for j in range(columns[0], columns[1]):
                filters_start = i * filters[0] + j * filters[1]
                for first in range(0, depth, piece):
                    last = min(depth, first + piece)
                    for start in range(0, samples, width):
                        filled = min(width, samples - start)
                        x_start = i * steps[0] + j * steps[1] + start
                        if ahead:
                            for place in beyond:
                                prefetch(x, x_start + place, x_start + place + filled, False)
                        w_start = filters_start * depth
                        y_start = i * y_steps[1] + j * samples + start
                        # fmt: off
                        for _ in range(tall):
                            multiply_rows(
                                height, vectors, w, w_start, depth, x, x_start, places, first, last,
                                y, y_start, plane, filled, first > 0, ahead,
                            )
                            w_start += height * depth
                            y_start += height * plane
                        for _ in range(short):
                            multiply_rows(
                                shorter, vectors, w, w_start, depth, x, x_start, places, first, last,
                                y, y_start, plane, filled, first > 0, ahead,
                            )
                            w_start += shorter * depth
                            y_start += shorter * plane
                        # fmt: on
                for m in range(maps):
                    y_start = m * plane + i * y_steps[1] + j * samples
                    _activate(y[y_start : y_start + samples], bias[filters_start + m], code)

    return parallel_kernel(forward)


@cache
def _input_gradient(height: int, shorter: int, vectors: int) -> Kernel[..., None]:
    """Return the kernel for blocks of `height` and `shorter` maps, `vectors` vectors of samples at a time.

    Every thread writes a band of rows of its own, for which it looks at the fields that reach into it.
    """

    def input_gradient(
        w: np.ndarray,
        gradient: np.ndarray,
        result: np.ndarray,
        places: np.ndarray,
        rows: np.ndarray,
        tall: int,
        short: int,
        bands: np.ndarray,
        stride: int,
        filters: tuple[int, int],
        width: int,
    ) -> None:
        _, out_height, out_width, samples = gradient.shape
        in_width, source, target = result.shape[2], gradient.reshape(-1), result.reshape(-1)
        depth, plane = places.size, out_height * out_width * samples
        field_height, piece = rows.max() + 1, piece_of(depth)
        for band in prange(bands.size - 1):
            top, bottom = bands[band], bands[band + 1]
            result[:, top:bottom] = 0
            inside, targets = np.empty(depth, np.int64), np.empty(depth, np.int64)
            for i in range(out_height):
                if i * stride + field_height <= top or i * stride >= bottom:
                    continue
                count = 0
                for k in range(depth):
                    if top <= i * stride + rows[k] < bottom:
                        inside[count], targets[count] = k, places[k]
                        count += 1
                for j in range(out_width):
                    for start in range(0, samples, width):
                        filled = min(width, samples - start)
                        x_start = (i * in_width + j) * stride * samples + start
                        for first in range(0, count, piece):
                            last = min(count, first + piece)
                            w_start = (i * filters[0] + j * filters[1]) * depth
                            g_start = (i * out_width + j) * samples + start
                            # fmt: off
                            for _ in range(tall):
                                add_to_rows(
                                    height, vectors, w, w_start, depth, source, g_start, plane,
                                    target, x_start, inside, targets, first, last, filled,
                                )
                                w_start += height * depth
                                g_start += height * plane
                            for _ in range(short):
                                add_to_rows(
                                    shorter, vectors, w, w_start, depth, source, g_start, plane,
                                    target, x_start, inside, targets, first, last, filled,
                                )
                                w_start += shorter * depth
                                g_start += shorter * plane
                            # fmt: on

    return parallel_kernel(input_gradient)


@cache
def _untied_input_gradient(height: int, shorter: int, vectors: int) -> Kernel[..., None]:
    """Return the kernel for blocks of `height` and `shorter` rows of a field, `vectors` vectors of samples at a time.

    Every thread writes a band of rows of its own, for which it looks at the fields that reach into it.
    """

    def untied_input_gradient(
        w: np.ndarray,
        gradient: np.ndarray,
        steps: tuple[int, int],
        result: np.ndarray,
        places: np.ndarray,
        rows: np.ndarray,
        beyond: np.ndarray,
        run: int,
        tall: int,
        short: int,
        bands: np.ndarray,
        stride: int,
        filters: tuple[int, int],
        width: int,
        shape: tuple[int, int, int],
    ) -> None:
        maps, out_height, out_width = shape
        in_width, samples, target = result.shape[2], result.shape[3], result.reshape(-1)
        depth, plane = places.size, steps[0]
        field_height = rows.max() + 1
        for band in prange(bands.size - 1):
            top, bottom = bands[band], bands[band + 1]
            result[:, top:bottom] = 0
            for i in range(out_height):
                if i * stride + field_height <= top or i * stride >= bottom:
                    continue
                for j in range(out_width):
                    w_start = (i * filters[0] + j * filters[1]) * depth
                    for start in range(0, samples, width):
                        filled = min(width, samples - start)
                        x_start = (i * in_width + j) * stride * samples + start
                        g_start = i * steps[1] + j * samples + start
                        for place in beyond:
                            prefetch(target, x_start + place, x_start + place + filled, True)
                        for m in range(maps):
                            ahead = g_start + m * plane + width
                            prefetch(gradient, ahead, min(ahead + width, gradient.size), False)
                        for first in range(0, depth, run):
                            if not top <= i * stride + rows[first] < bottom:
                                continue
                            # fmt: off
                            for block in range(tall):
                                add_maps_to_rows(
                                    height, vectors, w, w_start, depth, gradient, g_start, plane,
                                    target, x_start, places, first + block * height, maps, filled,
                                )
                            for block in range(short):
                                add_maps_to_rows(
                                    shorter, vectors, w, w_start, depth, gradient, g_start, plane,
                                    target, x_start, places, first + tall * height + block * shorter, maps, filled,
                                )
                            # fmt: on

    return parallel_kernel(untied_input_gradient)


@inlined
def piece_of(depth: int) -> int:
    """Return how many rows of a field to multiply in one go: nearly equal pieces."""
    pieces = -(-depth // DEPTH)
    return -(-depth // pieces)


@inlined
def _activate(y: np.ndarray, addend: float, code: int) -> None:
    """Add the bias to the outputs (samples,) of one map at one place and apply the activation."""
    if code == SIGMOID:
        for sample in range(y.size):
            y[sample] = sigmoid(y[sample] + addend)
    elif code == TANH:
        for sample in range(y.size):
            y[sample] = tanh(y[sample] + addend)
    elif code == RELU:
        for sample in range(y.size):
            value = y[sample] + addend
            y[sample] = y.dtype.type(0) if value < 0 else value
    else:
        for sample in range(y.size):
            y[sample] += addend


@lru_cache(maxsize=256)
def _bands(out_height: int, height: int, field_height: int, stride: int, number: int) -> np.ndarray:
    """Cut the rows of the inputs into bands into which about equally many rows of fields fall."""
    load = np.zeros(height)
    for i in range(out_height):
        load[i * stride : i * stride + field_height] += 1
    wanted = np.linspace(0, load.sum(), number + 1)[1:-1]
    return np.concatenate(([0], np.searchsorted(np.cumsum(load), wanted), [height])).astype(np.int64)


def _contiguous(array: np.ndarray) -> np.ndarray:
    flat(array)
    return array
