"""Locally connected layers: filters that are not shared between positions.

Weights are (rows, columns, maps, field rows, field columns, channels): those of a position are one piece, so that a box
of positions is a few long runs.  Within a filter the rows come first, as they do in `_Window`.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from dbmpi.kernels.activations import CODES, LINEAR, derive
from dbmpi.kernels.compile import THREADS, Kernel, inlined, parallel_kernel
from dbmpi.kernels.fields import BY_ROWS, MAPS, Blocks, bands_of, contiguous, field_of, flat
from dbmpi.kernels.filters import Filters
from dbmpi.kernels.llvm.lanes import sum_along_rows, transpose_block
from dbmpi.kernels.llvm.rows import add_maps_to_rows, multiply_rows, prefetch
from dbmpi.kernels.llvm.writer import REGISTERS, lanes
from dbmpi.kernels.memory import Rows, rows_of

Shape = tuple[int, int, int, int]

ROWS, ROWS_OF_FEW_MAPS = 6, 8 if REGISTERS == 32 else 6
"""Most rows of a field in a block whose sums stay in registers while the maps are added: found by trying.

Of 5, 6, 8 and 10, for 16 maps 6 was the fastest, and for 8 maps, where a block is soon done, 8.
"""


POSITIONS = 4
"""Neighbouring positions that are taken together where they read the same rows of inputs."""


class Untied(Filters):
    """Filters of its own at every position."""

    tied, order = False, BY_ROWS

    def input_gradient(self, weights: np.ndarray, gradient: np.ndarray, result: np.ndarray) -> None:
        """Write the gradient for the inputs (see `Filters`)."""
        maps, rows, columns, samples = gradient.shape
        shape = self.field_shape(weights)
        field, run = field_of(self.order, shape, result.shape), shape[1] * result.shape[0]
        blocks = Blocks.of(run, ROWS if maps > MAPS else ROWS_OF_FEW_MAPS)
        width = blocks.vectors * lanes(gradient.itemsize)
        beyond = field.beyond if samples > width else field.beyond[:0]
        bands = bands_of(rows, result.shape[1], shape[0], self.stride, THREADS)
        contiguous(result)
        _input_gradient(blocks.tile)(
            *(flat(weights), rows_of(gradient), result, (field.offsets, beyond, run)),
            *(blocks.numbers, bands, (self.stride, width, (maps, rows, columns))),
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
        rows, columns = self.field_shape(weight_gradient)
        window, blocks = _window_of(rows, inputs.shape, inputs.itemsize), Blocks.of(gradient.shape[0])
        width, code = blocks.vectors * window.lanes, CODES[self.activation]
        _parameter_gradient(blocks.tile)(
            *(flat(inputs), rows_of(outputs), rows_of(gradient), flat(weight_gradient), flat(bias_gradient)),
            *(np.empty((THREADS, window.size), inputs.dtype), tuple(window), blocks.numbers),
            ((rows, columns), inputs.shape, gradient.shape, self.stride, width, code),
        )


@cache
def _input_gradient(tile: tuple[int, int, int]) -> Kernel[..., None]:
    """Return the kernel for blocks of rows of a field.

    Every thread writes a band of rows of its own, from the fields that reach into it.  Filters come
    from memory, each once, and are added up over the maps while some rows of the field stay in registers.
    """

    def input_gradient(
        w: np.ndarray,
        gradient_rows: Rows,
        result: np.ndarray,
        field: tuple[np.ndarray, np.ndarray, int],
        blocks: tuple[int, int],
        bands: np.ndarray,
        sizes: tuple[int, int, tuple[int, int, int]],
    ) -> None:
        (gradient, steps), (offsets, beyond, run) = gradient_rows, field
        stride, width, (maps, out_height, out_width) = sizes
        in_width, samples, target = result.shape[2], result.shape[3], result.reshape(-1)
        depth, plane = offsets.size, steps[0]
        for band in prange(bands.size - 1):
            top, bottom = bands[band], bands[band + 1]
            result[:, top:bottom] = 0
            for i in range(out_height):
                first = max(0, top - i * stride) * run
                last = min(depth, (bottom - i * stride) * run)
                if first >= last:
                    continue
                for j in range(out_width):
                    w_start = (i * out_width + j) * maps * depth
                    for start in range(0, samples, width):
                        filled = min(width, samples - start)
                        x_start = (i * in_width + j) * stride * samples + start
                        g_start = i * steps[1] + j * samples + start
                        for offset in beyond:
                            prefetch(target, x_start + offset, x_start + offset + filled, True)
                        for m in range(maps):
                            later = g_start + m * plane + width
                            prefetch(gradient, later, min(later + width, gradient.size), False)
                        for row in range(first, last, run):
                            # fmt: off
                            add_maps_to_rows(
                                tile, blocks, w, w_start, depth, gradient, g_start, plane,
                                target, x_start, offsets, row, maps, filled,
                            )
                            # fmt: on

    return parallel_kernel(input_gradient)


@cache
def _parameter_gradient(tile: tuple[int, int, int]) -> Kernel[..., None]:
    """Return the kernel for blocks of maps, and some vectors of weights at a time."""

    def parameter_gradient(
        x: np.ndarray,
        y_rows: Rows,
        gradient_rows: Rows,
        weight_gradient: np.ndarray,
        bias_gradient: np.ndarray,
        windows: np.ndarray,
        of_window: tuple[np.ndarray, np.ndarray, int, int, int],
        blocks: tuple[int, int],
        sizes: tuple[tuple[int, int], Shape, Shape, int, int, int],
    ) -> None:
        (y, y_steps), (gradient, steps) = y_rows, gradient_rows
        offsets, starts, slot, _, vector = of_window
        field, x_shape, (maps, out_height, out_width, samples), stride, width, code = sizes
        plane, row_size = steps[0], out_width * samples
        rows, run = field[0], field[1] * x_shape[0]
        depth, bands = rows * run, windows.shape[0]
        for band in prange(bands):
            window = windows[band]
            done = 0
            for i in range(band * out_height // bands, (band + 1) * out_height // bands):
                g_start, y_start = i * steps[1], i * y_steps[1]
                if code != LINEAR:
                    for m in range(maps):
                        outputs = y[m * y_steps[0] + y_start :][:row_size]
                        derive(gradient[m * plane + g_start :][:row_size], outputs, code)
                for j in range(out_width):
                    # fmt: off
                    sum_along_rows(
                        tile, blocks, gradient, g_start + j * samples, plane, samples,
                        bias_gradient, (i * out_width + j) * maps,
                    )
                    # fmt: on
                top = i * stride
                # fmt: off
                _fill_window(
                    x, x_shape[2] * samples, max(done, top), top + rows, samples,
                    window, offsets, starts, slot, rows, vector,
                )
                # fmt: on
                done = top + rows
                # Some positions for each row of their fields, which stays in the first cache meanwhile.
                for left in range(0, out_width, POSITIONS):
                    for u in range(rows):
                        for j in range(left, min(left + POSITIONS, out_width)):
                            w_start = (i * out_width + j) * maps * depth
                            x_start = (top + u) % rows * slot + j * stride * x_shape[0]
                            for first in range(0, run, width):
                                filled = min(width, run - first)
                                ahead = w_start + maps * (POSITIONS * depth + u * run + first)
                                prefetch(weight_gradient, ahead, min(ahead + maps * filled, weight_gradient.size), True)
                                # fmt: off
                                multiply_rows(
                                    tile, blocks, gradient, g_start + j * samples, plane, window, x_start + first,
                                    starts, 0, samples, weight_gradient, w_start + u * run + first, depth,
                                    filled, False, None, 0, False,
                                )
                                # fmt: on

    return parallel_kernel(parameter_gradient)


class _Window(NamedTuple):
    """The rows of inputs that the current position's field covers, transposed for sums over samples.

    Each is (samples, columns x channels), so that a row of the field is one piece.  The next row of positions shares
    most of these rows with the current one: row number n stays in slot n modulo the field's rows.
    """

    offsets: np.ndarray
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
    offsets = (np.arange(width)[:, None] + np.arange(channels) * height * width) * samples
    return _Window(offsets.reshape(-1).astype(np.int64), starts, starts.size * step, field_rows, vector)


@inlined
def _fill_window(
    x: np.ndarray,
    x_step: int,
    first: int,
    last: int,
    samples: int,
    window: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    slot: int,
    slots: int,
    vector: int,
) -> None:
    """Bring rows ``first <= n < last`` of the inputs, `x_step` elements each, into the window."""
    for n in range(first, last):
        for first_offset in range(0, offsets.size, vector):
            for sample in range(0, samples, vector):
                # fmt: off
                transpose_block(
                    x, n * x_step + sample, offsets, first_offset, offsets.size - first_offset, samples - sample,
                    window, n % slots * slot + starts[sample] + first_offset, starts[1],
                )
                # fmt: on
