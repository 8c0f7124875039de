"""Filters on fields: the products that locally connected layers and convolutions have in common.

Every position of the output is a small matrix product: the filters of the position, (maps, depth), times its field of
the inputs, (depth, samples), where depth is channels x field rows x field columns.  Samples are innermost, so that one
weight multiplies vectors of them.  The field is not copied: a table says where its rows of samples are.  A block of
maps times two vectors of samples is summed in registers.

Untied filters are read once for all samples; forward and backward pass then do ``6 * samples`` operations for every
weight, whose 4 bytes are read twice and, as its gradient, written once.  With few samples that flow of memory is as
much of a limit as the arithmetic, so the next filters are prefetched.  With many samples the rows of inputs under a
field exceed the second cache: the column that the next field takes in is then prefetched, too.

Every output is summed in an order that depends on the depth alone, not on the box that is computed, its maps, the
samples or the threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numba import prange

from dbmpi.kernels.activations import CODES, LINEAR, activate
from dbmpi.kernels.compile import Kernel, parallel_kernel
from dbmpi.kernels.fields import Blocks, field_of, flat, piece_of
from dbmpi.kernels.llvm.rows import multiply_rows, prefetch
from dbmpi.kernels.llvm.writer import lanes
from dbmpi.kernels.memory import Rows, rows_of

Region = tuple[tuple[int, int], tuple[int, int]]
"""First and last (exclusive) row and column of outputs."""


@dataclass(frozen=True)
class Filters:
    """The passes of a layer of filters: those of :mod:`dbmpi.kernels.local` and of :mod:`dbmpi.kernels.convolution`.

    All arrays are C-contiguous, and float32 or float64 alike.  Untied, `outputs` and `gradient` may be parts of larger
    arrays, with rows in one piece.

    ========================  ===============================================================
    weights                   (rows, columns, maps, *filter), tied: (maps, *filter)
    bias                      (rows, columns, maps), tied: (maps,)
    inputs                    (channels, height, width, samples)
    outputs, their gradient   (maps, rows, columns, samples)
    ========================  ===============================================================

    Parameters
    ----------
    stride : int
        Rows, and columns, of the inputs from one field to the next.
    activation : str
        One of `ACTIVATIONS`.
    """

    tied: ClassVar[bool]
    """Whether all positions share their filters."""
    order: ClassVar[str]
    """Axes of a filter in the weights: a permutation of ``c`` (channel), ``u`` (row) and ``v`` (column)."""

    stride: int
    activation: str = "linear"

    def forward(
        self,
        weights: np.ndarray,
        bias: np.ndarray,
        inputs: np.ndarray,
        outputs: np.ndarray,
        region: Region | None = None,
    ) -> None:
        """Write ``activation(sum of weights times field + bias)``.

        ``outputs[m, i, j, b] = f(sum over u, v, c of weights[i, j, m, u, v, c] * inputs[c, i*stride+u, j*stride+v, b]
        + bias[i, j, m])``

        Parameters
        ----------
        weights, bias, inputs, outputs
            As above.
        region
            Which rows and columns of the outputs to write; by default all.
        """
        self._multiply(weights, flat(bias), inputs, outputs, CODES[self.activation], region)

    def add_sums(self, weights: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """Add the sums of `weights` times the field in `inputs` to `outputs`, without bias and activation."""
        self._multiply(weights, None, inputs, outputs, LINEAR, None)

    def _multiply(
        self,
        weights: np.ndarray,
        bias: np.ndarray | None,
        inputs: np.ndarray,
        outputs: np.ndarray,
        code: int,
        region: Region | None,
    ) -> None:
        """Compute sums with a bias, or add them where there is none."""
        maps, rows, columns, samples = outputs.shape
        within = region or ((0, rows), (0, columns))
        field = field_of(self.order, self.field_shape(weights), inputs.shape)
        blocks = Blocks.of_tied(maps, samples, outputs.itemsize) if self.tied else Blocks.of(maps)
        step, filters, width = self.stride * samples, 0 if self.tied else maps, blocks.vectors * lanes(outputs.itemsize)
        beyond = field.beyond if samples > width else field.beyond[:0]
        _forward(blocks.tile, not self.tied)(
            *(flat(weights), flat(weights)[:0] if bias is None else bias, flat(inputs), rows_of(outputs)),
            *((field.offsets, beyond), blocks.numbers, bias is None),
            *(((step * inputs.shape[2], step), (columns * filters, filters), width, maps, samples), code, within),
        )

    def input_gradient(self, weights: np.ndarray, gradient: np.ndarray, result: np.ndarray) -> None:
        """Write the gradient for the inputs into `result`.

        Parameters
        ----------
        weights : array
        gradient : (maps, rows, columns, samples) array
            For the outputs before the activation.
        result : (channels, height, width, samples) array
        """
        raise NotImplementedError

    def parameter_gradient(
        self,
        inputs: np.ndarray,
        outputs: np.ndarray,
        gradient: np.ndarray,
        weight_gradient: np.ndarray,
        bias_gradient: np.ndarray,
    ) -> None:
        """Write the gradients for weights and bias; afterwards `gradient` is that before the activation.

        Parameters
        ----------
        inputs, outputs
            As in `forward`, after it.
        gradient : (maps, rows, columns, samples) array
            For the outputs.
        weight_gradient, bias_gradient : arrays like weights and bias
        """
        raise NotImplementedError

    def field_shape(self, weights: np.ndarray) -> tuple[int, int]:
        """Return the rows and columns of the field, from the shape of `weights`."""
        filters = dict(zip(self.order, weights.shape[-3:], strict=True))
        return filters["u"], filters["v"]


@cache
def _forward(tile: tuple[int, int, int], ahead: bool) -> Kernel[..., None]:
    """Return the kernel for blocks of maps.

    With `ahead` it prefetches the filters of the next block: where positions have their own, they come from memory.
    """

    def forward(
        w: np.ndarray,
        bias: np.ndarray,
        x: np.ndarray,
        y_rows: Rows,
        field: tuple[np.ndarray, np.ndarray],
        blocks: tuple[int, int],
        add: bool,
        sizes: tuple[tuple[int, int], tuple[int, int], int, int, int],
        code: int,
        region: Region,
    ) -> None:
        (y, y_steps), (offsets, beyond), (rows, columns) = y_rows, field, region
        steps, filters, width, maps, samples = sizes
        depth, plane = offsets.size, y_steps[0]
        piece = piece_of(depth)
        for i in prange(rows[0], rows[1]):
            for j in range(columns[0], columns[1]):
                filters_start = i * filters[0] + j * filters[1]
                for first in range(0, depth, piece):
                    last = min(depth, first + piece)
                    for start in range(0, samples, width):
                        filled = min(width, samples - start)
                        x_start = i * steps[0] + j * steps[1] + start
                        y_start = i * y_steps[1] + j * samples + start
                        if ahead:
                            for offset in beyond:
                                prefetch(x, x_start + offset, x_start + offset + filled, False)
                        # fmt: off
                        multiply_rows(
                            tile, blocks, w, filters_start * depth, depth, x, x_start, offsets, first, last,
                            y, y_start, plane, filled, add or first > 0, bias, filters_start, ahead,
                        )
                        # fmt: on
                if code == LINEAR:
                    continue
                for m in range(maps):
                    activate(y[m * plane + i * y_steps[1] + j * samples :][:samples], code)

    return parallel_kernel(forward)
