"""Convolutions of bfloat16 numbers as matrix products.

The fields of some positions are gathered side by side, (depth, positions x samples), a block that stays in the second
cache; the filters, (maps, depth), are multiplied by it.  As samples are innermost, a row of fields is a copy of long
pieces.  For the gradient for the inputs, products of the turned filters give the gradients for such fields, which are
added up where the fields lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numba import prange

from dbmpi.kernels import bfloat16
from dbmpi.kernels.activations import ACTIVATIONS
from dbmpi.kernels.bfloat16_filters import RoundedFilters, rounded_copy
from dbmpi.kernels.compile import exact_parallel_kernel
from dbmpi.kernels.filters import Filters, Region
from dbmpi.kernels.memory import aligned_empty
from dbmpi.machine import caches

BLOCK = caches.found().second // 2
"""Bytes of a block of fields, whatever the number of threads: half of the second cache."""

DEPTH, MAPS, MAPS_BACKWARD = 256, 32, 64
"""Least numbers of weights of a filter, of maps, and of maps for the inputs' gradient, for products of matrices.

With fewer, to gather fields and to add them up takes longer than to multiply vectors of float32, as was measured.
"""
TURNED = 64
"""Rows that are transposed at a time."""


def pays(filters: Filters, shape: tuple[int, ...]) -> bool:
    """Whether `filters` with weights of that `shape` are multiplied faster as matrices."""
    large = filters.tied and shape[0] >= MAPS and math.prod(shape[1:]) >= DEPTH
    return large and bfloat16.engine() != "float32"


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
        if len(weights) < MAPS_BACKWARD:
            super().input_gradient(weights, gradient, result)
            return
        of_sums, filters, shape = rounded_copy(gradient), weights.reshape(len(weights), -1).T, weights.shape[2:]
        memory = np.empty(0, np.float32)
        result.fill(0)
        for i, j, height, width in self._blocks(len(filters), gradient, result.itemsize):
            of_block = np.ascontiguousarray(of_sums[:, i : i + height, j : j + width]).reshape(len(weights), -1)
            size = len(filters) * of_block.shape[1]
            memory = memory if memory.size >= size else aligned_empty(size)
            fields = memory[:size].reshape(len(filters), -1)
            bfloat16.product(filters, of_block, fields)
            block = fields.reshape(len(filters), height, width * gradient.shape[-1])
            _add_fields(block, result, shape, self.filters.stride, (i, j))

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
        memory = np.empty((2, 0), np.float32)
        for place, fields in self._fields(shape, inputs, outputs, region):
            size = len(filters) * fields.shape[1]
            memory = memory if memory.shape[1] >= size else aligned_empty((2, size))
            # Products of many rows by few are the faster ones.
            turned, sums = memory[0, :size].reshape(-1, len(filters)), memory[1, :size].reshape(len(filters), -1)
            bfloat16.product(fields.T, filters.T, turned)
            _turn(turned, sums)
            yield place, sums

    def _fields(
        self, shape: tuple[int, int], inputs: np.ndarray, outputs: np.ndarray, region: Region | None = None
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Yield fields of `shape`, (depth, positions x samples), block by block, and where their outputs are.

        The memory of a block is used again for the next one.
        """
        depth, samples = len(inputs) * shape[0] * shape[1], inputs.shape[-1]
        memory = np.empty(0, bfloat16.BFLOAT16)
        for i, j, height, width in self._blocks(depth, outputs, inputs.itemsize, region):
            size = depth * height * width * samples
            memory = memory if memory.size >= size else aligned_empty(size, bfloat16.BFLOAT16)
            block = memory[:size].reshape(depth, height, width * samples)
            _gather_fields(inputs, block, shape, self.filters.stride, (i, j))
            yield np.s_[:, i : i + height, j : j + width], block.reshape(depth, -1)

    @staticmethod
    def _blocks(
        depth: int, outputs: np.ndarray, itemsize: int, region: Region | None = None
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield first row and column, rows and columns of blocks of outputs whose fields fill a cache."""
        (top, bottom), (left, right) = region or ((0, outputs.shape[1]), (0, outputs.shape[2]))
        positions = max(1, BLOCK // (depth * outputs.shape[-1] * itemsize))
        columns = max(1, min(right - left, positions))
        rows = max(1, positions // columns)
        for i in range(top, bottom, rows):
            for j in range(left, right, columns):
                yield i, j, min(rows, bottom - i), min(columns, right - j)


@exact_parallel_kernel
def _turn(source: np.ndarray, target: np.ndarray) -> None:
    """Transpose the many rows of a `source`, some of which stay in the first cache."""
    size = source.shape[0]
    for part in prange(-(-size // TURNED)):
        first = part * TURNED
        some = source[first : first + TURNED]
        for column in range(some.shape[1]):
            row = target[column, first : first + TURNED]
            for n in range(some.shape[0]):
                row[n] = some[n, column]


@exact_parallel_kernel
def _gather_fields(x: np.ndarray, out: np.ndarray, field: tuple[int, int], stride: int, first: tuple[int, int]) -> None:
    """Write fields, (channels x rows x columns of a field, rows, columns x samples), from a position on."""
    depth, rows, length = out.shape
    samples, size = x.shape[3], field[0] * field[1]
    for one in prange(depth * rows):
        k, i = one // rows, one % rows
        row = x[k // size, (first[0] + i) * stride + k % size // field[1]].reshape(-1)
        start = (first[1] * stride + k % field[1]) * samples
        run = length if stride == 1 else samples
        for j in range(length // run):
            source, target = row[start + j * stride * samples :][:run], out[k, i, j * run :][:run]
            for n in range(run):
                target[n] = source[n]


@exact_parallel_kernel
def _add_fields(
    fields: np.ndarray, result: np.ndarray, field: tuple[int, int], stride: int, first: tuple[int, int]
) -> None:
    """Add fields as those of `_gather_fields` to what they are fields of, a channel after the other on a thread."""
    rows, length = fields.shape[1:]
    samples, size = result.shape[3], field[0] * field[1]
    for channel in prange(result.shape[0]):
        for k in range(channel * size, (channel + 1) * size):
            start = (first[1] * stride + k % field[1]) * samples
            run = length if stride == 1 else samples
            for i in range(rows):
                row = result[channel, (first[0] + i) * stride + k % size // field[1]].reshape(-1)
                for j in range(length // run):
                    source, target = fields[k, i, j * run :][:run], row[start + j * stride * samples :][:run]
                    for n in range(run):
                        target[n] += source[n]
