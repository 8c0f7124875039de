"""Convolutions of bfloat16 numbers as matrix products.

The fields of some positions are gathered side by side, (depth, positions x samples), a block that stays in the second
cache; the filters, (maps, depth), are multiplied by it.  As samples are innermost, a row of fields is a copy of long
pieces.  At stride 1 the gradient for the inputs is a convolution, too: of the gradient for the outputs, with zeros
around it, and filters that are turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numba import prange

from dbmpi.kernels import bfloat16
from dbmpi.kernels.activations import ACTIVATIONS
from dbmpi.kernels.bfloat16_filters import RoundedFilters, rounded_copy
from dbmpi.kernels.compile import THREADS, exact_parallel_kernel
from dbmpi.kernels.filters import Region
from dbmpi.kernels.memory import aligned_empty

BLOCK = 1 << 19
"""Numbers of a block of fields, for each thread: a MiB, half of the second cache of Intel's processors with AMX."""


@dataclass(frozen=True)
class RoundedConvolution(RoundedFilters):
    """The passes of a convolution, as those of `RoundedFilters`, by products of matrices."""

    def forward(
        self,
        weights: np.ndarray,
        bias: np.ndarray,
        inputs: np.ndarray,
        outputs: np.ndarray,
        region: Region | None = None,
    ) -> None:
        """Write ``activation(sum of weights times field + bias)`` (see `Filters.forward`)."""
        activate = ACTIVATIONS[self.filters.activation].forward
        for place, sums in self._sums(weights, inputs, outputs, region):
            activate(sums, bias)
            outputs[place] = sums.reshape(outputs[place].shape)

    def add_sums(self, weights: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """Add the sums of weights times the field in float32 `inputs`, rounded here, to `outputs`."""
        for place, sums in self._sums(weights, rounded_copy(inputs), outputs):
            outputs[place] += sums.reshape(outputs[place].shape)

    def input_gradient(self, weights: np.ndarray, gradient: np.ndarray, result: np.ndarray) -> None:
        """Write the gradient for the inputs, from a float32 `gradient` that is rounded here."""
        if self.filters.stride > 1:
            super().input_gradient(weights, gradient, result)
            return
        (rows, columns), (maps, height, width, samples) = self.filters.field_shape(weights), gradient.shape
        around = np.zeros((maps, height + 2 * rows - 2, width + 2 * columns - 2, samples), bfloat16.BFLOAT16)
        around[:, rows - 1 : rows - 1 + height, columns - 1 : columns - 1 + width] = rounded_copy(gradient)
        turned = np.ascontiguousarray(weights[:, :, ::-1, ::-1].swapaxes(0, 1))
        for place, sums in self._sums(turned, around, result):
            result[place] = sums.reshape(result[place].shape)

    def _weight_gradient(self, inputs: np.ndarray, gradient: np.ndarray, weight_gradient: np.ndarray) -> None:
        of_sums, of_maps = rounded_copy(gradient), weight_gradient.reshape(len(weight_gradient), -1)
        shape, add = self.filters.field_shape(weight_gradient), False
        for place, fields in self._fields(shape, inputs, of_sums):
            of_block = np.ascontiguousarray(of_sums[place]).reshape(len(of_sums), -1)
            bfloat16.product(of_block, fields.T, of_maps, add)
            add = True

    def _sums(
        self, weights: np.ndarray, inputs: np.ndarray, outputs: np.ndarray, region: Region | None = None
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Yield sums of `weights` times fields, (maps, positions x samples), and where they are in the outputs."""
        filters, shape = weights.reshape(len(weights), -1), self.filters.field_shape(weights)
        memory = np.empty(0, np.float32)
        for place, fields in self._fields(shape, inputs, outputs, region):
            size = len(filters) * fields.shape[1]
            if memory.size < size:
                memory = aligned_empty(size)
            sums = memory[:size].reshape(len(filters), -1)
            bfloat16.product(filters, fields, sums)
            yield place, sums

    def _fields(
        self, shape: tuple[int, int], inputs: np.ndarray, outputs: np.ndarray, region: Region | None = None
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Yield fields of `shape`, (depth, positions x samples), block by block, and where their outputs are.

        The memory of a block is used again for the next one.
        """
        (top, bottom), (left, right) = region or ((0, outputs.shape[1]), (0, outputs.shape[2]))
        depth, samples = len(inputs) * shape[0] * shape[1], inputs.shape[-1]
        if bottom <= top or right <= left:
            return
        positions = max(1, BLOCK * THREADS // (depth * samples))
        columns = min(right - left, positions)
        rows = min(bottom - top, max(1, positions // columns))
        memory = aligned_empty(depth * rows * columns * samples, bfloat16.BFLOAT16)
        for i in range(top, bottom, rows):
            for j in range(left, right, columns):
                height, width = min(rows, bottom - i), min(columns, right - j)
                block = memory[: depth * height * width * samples].reshape(depth, height, width * samples)
                _gather_fields(inputs, block, shape, self.filters.stride, (i, j), width)
                yield np.s_[:, i : i + height, j : j + width], block.reshape(depth, -1)


@exact_parallel_kernel
def _gather_fields(
    x: np.ndarray, out: np.ndarray, field: tuple[int, int], stride: int, first: tuple[int, int], columns: int
) -> None:
    """Write fields, (channels x rows x columns of a field, rows, columns x samples), from a position on."""
    depth, rows, length = out.shape
    samples, size = x.shape[3], field[0] * field[1]
    for one in prange(depth * rows):
        k, i = one // rows, one % rows
        row = x[k // size, (first[0] + i) * stride + k % size // field[1]].reshape(-1)
        start, target = (first[1] * stride + k % field[1]) * samples, out[k, i]
        if stride == 1:
            for n in range(length):
                target[n] = row[start + n]
        else:
            for j in range(columns):
                for n in range(samples):
                    target[j * samples + n] = row[start + j * stride * samples + n]
