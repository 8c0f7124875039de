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

from functools import cache
from typing import ClassVar

import numpy as np
from numba import prange

from dbmpi.kernels.compile import Kernel, inlined, parallel_kernel
from dbmpi.kernels.elementary import sigmoid, tanh
from dbmpi.kernels.fields import Blocks, field_of, flat, piece_of
from dbmpi.kernels.llvm.rows import multiply_rows, prefetch
from dbmpi.kernels.llvm.writer import lanes
from dbmpi.kernels.memory import rows_of

CODES = {"linear": 0, "sigmoid": 1, "tanh": 2, "relu": 3}
"""How kernels know the activations."""
LINEAR, SIGMOID, TANH, RELU = CODES["linear"], CODES["sigmoid"], CODES["tanh"], CODES["relu"]


Places = tuple[tuple[int, int], tuple[int, int]]
"""First and last (exclusive) row and column of outputs."""


class Filters:
    """The passes of a layer of filters: those of :mod:`dbmpi.kernels.local` and of :mod:`dbmpi.kernels.convolution`.

    All arrays are C-contiguous, and float32 or float64 alike.  Untied, `outputs` and `gradient` may be parts of larger
    arrays, with rows in one piece.
    """

    tied: ClassVar[bool]
    """Whether all places share their filters."""
    order: ClassVar[str]
    """Axes of a filter in the weights: a permutation of ``c`` (channel), ``u`` (row) and ``v`` (column)."""

    def forward(
        self,
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
        weights : (rows, columns, maps, *filter) array, tied: (maps, *filter)
            Axes of the filter in this `order`.
        bias : (rows, columns, maps) array, tied: (maps,)
        inputs : (channels, height, width, samples) array
        outputs : (maps, rows, columns, samples) array
        stride : int
        activation : str
            One of `CODES`.
        places
            Which rows and columns of the outputs to write; by default all.
        """
        self._multiply(weights, flat(bias), inputs, outputs, stride, activation, places)

    def add_sums(self, weights: np.ndarray, inputs: np.ndarray, outputs: np.ndarray, stride: int) -> None:
        """Add the sums of weights times field to `outputs`: as `forward`, without bias and activation."""
        self._multiply(weights, None, inputs, outputs, stride, "linear", None)

    def _multiply(
        self,
        weights: np.ndarray,
        bias: np.ndarray | None,
        inputs: np.ndarray,
        outputs: np.ndarray,
        stride: int,
        activation: str,
        places: Places | None,
    ) -> None:
        """Compute sums with a bias, or add them where there is none."""
        maps, rows, columns, samples = outputs.shape
        within = places or ((0, rows), (0, columns))
        field = field_of(self.order, self.field_shape(weights), inputs.shape)
        blocks = Blocks.of_tied(maps, samples, outputs.itemsize) if self.tied else Blocks.of(maps)
        step, place, width = stride * samples, 0 if self.tied else maps, blocks.vectors * lanes(outputs.itemsize)
        beyond = field.beyond if samples > width else field.beyond[:0]
        _forward(blocks.tile, not self.tied)(
            *(flat(weights), flat(weights)[:0] if bias is None else bias, flat(inputs), *rows_of(outputs)),
            *(field.places, beyond, blocks.numbers, bias is None),
            *((step * inputs.shape[2], step), (columns * place, place), width, CODES[activation]),
            *((maps, samples), *within),
        )

    def input_gradient(self, weights: np.ndarray, gradient: np.ndarray, result: np.ndarray, stride: int) -> None:
        """Write the gradient for the inputs into `result`, from that for the outputs before the activation."""
        raise NotImplementedError

    def parameter_gradient(
        self,
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
        raise NotImplementedError

    def field_shape(self, weights: np.ndarray) -> tuple[int, int]:
        """Return the rows and columns of the field."""
        filters = dict(zip(self.order, weights.shape[-3:], strict=True))
        return filters["u"], filters["v"]


@cache
def _forward(tile: tuple[int, int, int], ahead: bool) -> Kernel[..., None]:
    """Return the kernel for blocks of maps.

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
        blocks: tuple[int, int],
        add: bool,
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
                        y_start = i * y_steps[1] + j * samples + start
                        if ahead:
                            for place in beyond:
                                prefetch(x, x_start + place, x_start + place + filled, False)
                        # fmt: off
                        multiply_rows(
                            tile, blocks, w, filters_start * depth, depth, x, x_start, places, first, last,
                            y, y_start, plane, filled, add or first > 0, bias, filters_start, ahead,
                        )
                        # fmt: on
                if code == LINEAR:
                    continue
                for m in range(maps):
                    _activate(y[m * plane + i * y_steps[1] + j * samples :][:samples], code)

    return parallel_kernel(forward)


@inlined
def _activate(y: np.ndarray, code: int) -> None:
    """Apply an activation that is not linear to the outputs (samples,) of one map at one place."""
    if code == SIGMOID:
        for sample in range(y.size):
            y[sample] = sigmoid(y[sample])
    elif code == TANH:
        for sample in range(y.size):
            y[sample] = tanh(y[sample])
    elif code == RELU:
        for sample in range(y.size):
            y[sample] = y.dtype.type(0) if y[sample] < 0 else y[sample]
