"""Convolutions: filters that are shared by all positions; valid borders.

Weights are (maps, channels, field rows, field columns).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from dbmpi.kernels.activations import ACTIVATIONS
from dbmpi.kernels.compile import THREADS, Kernel, parallel_kernel
from dbmpi.kernels.fields import Blocks, bands_of, contiguous, field_of, flat, piece_of
from dbmpi.kernels.filters import Filters
from dbmpi.kernels.llvm.lanes import multiply_along_rows
from dbmpi.kernels.llvm.rows import add_to_rows, multiply_rows
from dbmpi.kernels.llvm.writer import REGISTERS, lanes

BANDS = 16
"""Most bands of rows whose sums for the weights are kept apart until the end, whatever the number of threads."""
_GATHERED = 6
"""Channels from which the inputs' gradient is gathered: the rows of a tile; fewer do not fill it."""
PIECE = 1024
"""Elements of a row of outputs that are multiplied in one go: those of a block of maps fit into the first cache."""
_MOST = 1 << 24  # elements that they may take, altogether


class Tied(Filters):
    """Filters that all positions share."""

    tied, order = True, "cuv"

    def input_gradient(self, weights: np.ndarray, gradient: np.ndarray, result: np.ndarray) -> None:
        """Write the gradient for the inputs (see `Filters`).

        At stride 1 every input is visited once, to sum up the gradients of the outputs whose fields it lies in.
        """
        if self.stride > 1 or weights.shape[1] < _GATHERED:
            self._added_gradient(weights, gradient, result)
            return
        feeding = _feeding(weights.shape[2:], gradient.shape)
        blocks = Blocks.of_tied(weights.shape[1], gradient.shape[3], gradient.itemsize)
        sorted_weights = weights.transpose(1, 2, 0, 3)
        filters = [sorted_weights[..., left:right][..., ::-1].reshape(-1) for left, right in feeding.columns]
        contiguous(gradient, result)
        _gathered_gradient(blocks.tile)(
            *(np.concatenate(filters), gradient, result, (feeding.offsets, feeding.starts, feeding.kinds)),
            *(weights.shape[2], blocks.numbers, blocks.vectors * lanes(gradient.itemsize)),
        )

    def _added_gradient(self, weights: np.ndarray, gradient: np.ndarray, result: np.ndarray) -> None:
        """Write the gradient for the inputs: for every output, add it to the inputs in its field."""
        shape = self.field_shape(weights)
        field, blocks = field_of(self.order, shape, result.shape), Blocks.of(len(weights))
        bands = bands_of(gradient.shape[1], result.shape[1], shape[0], self.stride, THREADS)
        contiguous(gradient, result)
        _added_gradient(blocks.tile)(
            *(flat(weights), gradient, result, field.offsets, blocks.numbers, bands),
            (shape, self.stride, blocks.vectors * lanes(gradient.itemsize)),
        )

    def parameter_gradient(
        self,
        inputs: np.ndarray,
        outputs: np.ndarray,
        gradient: np.ndarray,
        weight_gradient: np.ndarray,
        bias_gradient: np.ndarray,
    ) -> None:
        """Write the gradients for weights and bias (see `Filters`)."""
        contiguous(inputs, outputs, gradient, weight_gradient)
        maps = len(weight_gradient)
        ACTIVATIONS[self.activation].backward(outputs.reshape(maps, -1), gradient.reshape(maps, -1), bias_gradient)
        blocks = Blocks.of(maps)
        columns = 3 if blocks.height > 4 or REGISTERS < 32 else 6
        offsets = field_of(self.order, self.field_shape(weight_gradient), inputs.shape).offsets
        depth = -(-offsets.size // columns) * columns  # the last offset is taken again until the tiles are full
        bands = max(1, min(BANDS, gradient.shape[1], _MOST // (maps * depth)))
        sums = np.zeros((bands, maps * depth), inputs.dtype)
        every = np.pad(offsets, (0, depth - offsets.size), "edge")
        _weight_gradient((*blocks.heights, columns))(inputs, gradient, sums, every, blocks.numbers, self.stride)
        total, first_short = sums.sum(axis=0), blocks.tall * blocks.height
        of_maps = weight_gradient.reshape(maps, -1)
        for height, first, last in ((blocks.height, 0, first_short), (blocks.height - 1, first_short, maps)):
            if last > first:
                tiles = total[first * depth : last * depth].reshape(-1, depth, height)
                of_maps[first:last] = tiles.swapaxes(1, 2).reshape(-1, depth)[:, : offsets.size]


class _Feeding(NamedTuple):
    """Which outputs the inputs feed, at stride 1.

    Columns of the inputs are of one kind if they feed outputs by the same columns of the filters: those near the
    borders do so by some, and all between them by all.
    """

    columns: list[tuple[int, int]]
    """First and last (exclusive) column of the filters, for every kind."""
    kinds: np.ndarray
    """Kind of every column of the inputs, int64."""
    offsets: np.ndarray
    """Positions of the outputs relative to that at an input's own row and column, for one kind after the other, int64.

    Each by rows of the filters first, so that the rows that count are one piece; then by maps, and by columns of the
    outputs, in the order in which they are read.
    """
    starts: np.ndarray
    """Where each kind starts in `offsets`, and the end, int64."""


@lru_cache(maxsize=256)
def _feeding(shape: tuple[int, int], gradient_shape: tuple[int, int, int, int]) -> _Feeding:
    """Return what inputs feed through filters of so many rows and columns."""
    maps, height, width, samples = gradient_shape
    spans = [(max(0, column - width + 1), min(shape[1], column + 1)) for column in range(width + shape[1] - 1)]
    columns, offsets = sorted(set(spans)), []
    for left, right in columns:
        u, m, v = np.meshgrid(range(shape[0]), range(maps), range(left, right)[::-1], indexing="ij")
        offsets.append((((m * height - u) * width - v) * samples).reshape(-1))
    starts = np.cumsum([0, *map(len, offsets)], dtype=np.int64)
    return _Feeding(columns, np.array([columns.index(span) for span in spans]), np.concatenate(offsets), starts)


@cache
def _added_gradient(tile: tuple[int, int, int]) -> Kernel[..., None]:
    """Return the kernel of the inputs' gradient that adds to them, for blocks of maps.

    Every thread writes a band of rows of its own, from the fields that reach into it.  Filters stay in
    the caches, unlike those of a local layer, and so it is the gradients of a block of maps that stay in registers.
    Columns of the field come after one another: rows of several channels, which may lie a multiple of 4096 bytes apart,
    would wait for each other (twice the time for 128 samples of 100 x 100).
    """

    def added_gradient(
        w: np.ndarray,
        gradient: np.ndarray,
        result: np.ndarray,
        offsets: np.ndarray,
        blocks: tuple[int, int],
        bands: np.ndarray,
        sizes: tuple[tuple[int, int], int, int],
    ) -> None:
        field, stride, width = sizes
        _, out_height, out_width, samples = gradient.shape
        in_width, source, target = result.shape[2], gradient.reshape(-1), result.reshape(-1)
        depth, plane, size = offsets.size, out_height * out_width * samples, field[0] * field[1]
        for band in prange(bands.size - 1):
            top, bottom = bands[band], bands[band + 1]
            result[:, top:bottom] = 0
            for i in range(out_height):
                above, below = max(0, top - i * stride), min(field[0], bottom - i * stride)
                if above >= below:
                    continue
                # The rows that are in the band are one piece of all channels, or one of each.
                pieces, length = (
                    (1, depth) if below - above == field[0] else (depth // size, (below - above) * field[1])
                )
                longest = piece_of(length)
                for j in range(out_width):
                    for start in range(0, samples, width):
                        filled = min(width, samples - start)
                        x_start = (i * in_width + j) * stride * samples + start
                        g_start = (i * out_width + j) * samples + start
                        for piece in range(pieces):
                            begin = piece * size + above * field[1]
                            for first in range(begin, begin + length, longest):
                                # fmt: off
                                add_to_rows(
                                    tile, blocks, w, 0, depth, source, g_start, plane,
                                    target, x_start, offsets, first, min(first + longest, begin + length), filled,
                                )
                                # fmt: on

    return parallel_kernel(added_gradient)


@cache
def _gathered_gradient(tile: tuple[int, int, int]) -> Kernel[..., None]:
    """Return the kernel of the inputs' gradient at stride 1, for blocks of channels.

    It takes the filters in the order of `_Feeding.offsets`, (channels, depth) for each kind.
    """

    def gathered_gradient(
        w: np.ndarray,
        gradient: np.ndarray,
        result: np.ndarray,
        feeding: tuple[np.ndarray, np.ndarray, np.ndarray],
        field_height: int,
        blocks: tuple[int, int],
        width: int,
    ) -> None:
        offsets, starts, kinds = feeding
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
                        # fmt: off
                        multiply_rows(
                            tile, blocks, w, (channels - 1) * start_of_kind, depth, source, g_start, offsets,
                            first, last, target, x_start, plane, filled, first > begin, None, 0, False,
                        )
                        # fmt: on

    return parallel_kernel(gathered_gradient)


@cache
def _weight_gradient(tile: tuple[int, int, int]) -> Kernel[..., None]:
    """Return the kernel for blocks of maps, and some weights of each at a time.

    It adds the gradients of each band of rows to its row of `sums`, where each block is (depth, maps).

    A row of outputs, columns by samples, is one piece, and so are the inputs that one weight multiplies if the stride
    is 1: the sums run along both, and nothing is transposed.  With other strides there is a piece for every column.
    """

    def weight_gradient(
        x: np.ndarray, gradient: np.ndarray, sums: np.ndarray, offsets: np.ndarray, blocks: tuple[int, int], stride: int
    ) -> None:
        _, out_height, out_width, samples = gradient.shape
        plane, row, step = out_height * out_width * samples, x.shape[2] * samples, stride * samples
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
                        x_start = i * stride * row + run * step + start
                        g_start = (i * out_width + run) * samples + start
                        # fmt: off
                        multiply_along_rows(
                            tile, blocks, source, g_start, plane, samples, below, x_start, step,
                            offsets, offsets.size, some, elements, out,
                        )
                        # fmt: on

    return parallel_kernel(weight_gradient)
