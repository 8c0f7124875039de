"""Local contrast normalisation: each value against its neighbourhood in all maps."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.kernels import normalisation as kernels
from dbmpi.kernels.memory import rows_of, widened
from dbmpi.network.builtin import BuiltIn
from dbmpi.network.layer import Backward, Forward
from dbmpi.network.windows import check_maps

WIDTH = 0.25
"""Standard deviation of the Gaussian window as a part of its size; the papers give none, Torch took a quarter."""


class NormalisationLayer(BuiltIn[config.Normalisation]):
    """Subtractive, then divisive normalisation over a Gaussian window in all maps; no parameters.

    ``g[i, y, x] = h[i, y, x] - sum over j, u, v of w[u, v] h[j, y + u, x + v]`` and ``outputs[i, y, x] = g[i, y, x] /
    max(floor, sqrt(sum over j, u, v of w[u, v] g[j, y + u, x + v]**2))``, where the weights of each window, all maps
    counted, sum to one: Le et al., "Building high-level features using large scale unsupervised learning", ICML 2012,
    section 3 (and its constant floor of 0.01), after Jarrett et al., "What is the best multi-stage architecture for
    object recognition?", ICCV 2009, section 2.

    At the borders only the part of the window within the image counts, its weights again with a sum of one, so that
    constant inputs give zero everywhere.  Inputs and outputs are ``(maps, height, width)``.

    Raises
    ------
    UserError
        If the inputs have no rows and columns.
    """

    takes_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_maps(self.name, "local contrast normalisation", self.input_shape)

    def input_box(self, output: Box) -> Box:
        """Return all maps of the windows of the windows: a mean is subtracted from each value of a deviation."""
        return self._around(output, 2)

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the operations for the box `output` alone, without those of the windows that reach beyond it."""
        some, height, width = output.shape
        maps, smoothing = self.input_shape[0], 4 * self.section.window
        forward = 4 * maps + 2 * some + 2 * smoothing + 2
        backward = 8 * maps + 6 * some + 4 * smoothing + 6  # the statistics are computed again
        return (forward + (backward if input_gradient else 0)) * height * width * samples

    def forward(self, task: Forward) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        output, near, far = task.output, self._around(task.output, 1), self._around(task.output, 2)
        inputs, _, mean, divisor = self._statistics(output, task.inputs)
        with widened(task.outputs, inputs.dtype) as outputs:
            kernels.normalise(
                *(inputs, _start(output, far), mean, _corner(output, near), divisor),
                *(len(outputs), rows_of(outputs)),
            )

    def backward(self, task: Backward) -> None:
        """Compute the inputs' gradient (see the contract of a layer)."""
        if task.input_gradient is None:
            return
        output, near, far = task.output, self._around(task.output, 1), self._around(task.output, 2)
        inputs, total, mean, divisor = self._statistics(output, task.inputs)
        outputs, gradient = (array.astype(inputs.dtype, copy=False) for array in (task.outputs, task.gradient))
        squares, divided, centred = np.empty_like(divisor), np.empty_like(divisor), np.empty_like(mean)
        kernels.divide_gradient(
            *(len(outputs), rows_of(outputs), rows_of(gradient)), divisor, self.section.floor, squares, divided
        )
        of_squares = self._smoothed(squares, output, near, transposed=True)
        kernels.sum_centred_gradient(
            of_squares, total, _corner(near, far), mean, self.input_shape[0], divided, _corner(output, near), centred
        )
        of_mean = self._smoothed(centred, near, far, transposed=True)
        with widened(task.input_gradient, inputs.dtype) as input_gradient:
            kernels.input_gradient(
                *(inputs, mean, _corner(near, far), of_squares, of_mean),
                *(rows_of(gradient), gradient.shape[:3], _start(output, far), input_gradient),
            )

    def _around(self, output: Box, times: int) -> Box:
        """Return all maps of the positions up to so many times the window's radius away."""
        reach = times * (self.section.window // 2)
        _, height, width = self.input_shape
        _, top, left = output.starts
        _, bottom, right = output.stops
        return Box(
            (0, max(top - reach, 0), max(left - reach, 0)),
            (self.input_shape[0], min(bottom + reach, height), min(right + reach, width)),
        )

    def _statistics(self, output: Box, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the inputs, their sum over the maps, their local mean around the box and the divisor in it.

        All are float64 where float32 cannot hold the squares: they overflow, or vanish, long before the outputs do.
        """
        near, far = self._around(output, 1), self._around(output, 2)
        total = np.empty(inputs.shape[1:], inputs.dtype)
        kernels.sum_maps(inputs, total)
        mean = self._smoothed(total, far, near)
        squares = np.empty_like(mean)
        row, column = _corner(near, far)
        kernels.sum_centred_squares(inputs, row, column, mean, squares)
        divisor = self._smoothed(squares, near, output)
        if not kernels.deviation(divisor, self.section.floor) and inputs.dtype == np.float32:
            return self._statistics(output, inputs.astype(np.float64))
        return inputs, total, mean, divisor

    def _smoothed(self, field: np.ndarray, given: Box, wanted: Box, transposed: bool = False) -> np.ndarray:
        """Return the weighted sums of `field`, over the maps' number.

        Parameters
        ----------
        field : (rows, columns, samples) array
            Values in the rows and columns of `given`.
        given, wanted : Box
            Where the values, and where the sums are.
        transposed : bool
            Sum as for a gradient.

        Returns
        -------
        (rows, columns, samples) array
            In the rows and columns of `wanted`.
        """
        rows, row_weights = self._taps_along(1, given, wanted, transposed)
        columns, column_weights = self._taps_along(2, given, wanted, transposed)
        row_weights = (row_weights / self.input_shape[0]).astype(field.dtype)
        result = np.empty((*wanted.shape[1:], field.shape[-1]), field.dtype)
        kernels.smooth(field, rows, row_weights, columns, column_weights.astype(field.dtype), result)
        return result

    def _taps_along(self, axis: int, given: Box, wanted: Box, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        some, others = (given.starts[axis], given.stops[axis]), (wanted.starts[axis], wanted.stops[axis])
        return _taps(self.input_shape[axis], self.section.window, some, others, transposed)


def smoothing(length: int, window: int) -> np.ndarray:
    """Return the weights of all windows along an axis, (length, length): a row for each position, with a sum of one.

    Parameters
    ----------
    length
        Of the axis.
    window
        Size of the windows, odd.
    """
    first, weights = _taps(length, window, (0, length), (0, length), False)
    matrix = np.zeros((length, length))
    for row, start, taps in zip(matrix, first, weights, strict=True):
        inside = slice(max(-start, 0), length - start)
        row[max(start, 0) : start + len(taps)] = taps[inside]
    return matrix


def _start(inner: Box, outer: Box) -> tuple[int, int, int]:
    """Return at which map, row and column of another a box starts."""
    first_map, row, column = (a - b for a, b in zip(inner.starts, outer.starts, strict=True))
    return first_map, row, column


def _corner(inner: Box, outer: Box) -> tuple[int, int]:
    """Return at which row and column of another a box starts."""
    return _start(inner, outer)[1:]


@lru_cache(maxsize=256)
def _taps(
    length: int, window: int, given: tuple[int, int], wanted: tuple[int, int], transposed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of an axis: for each wanted position, the index in `given` of its first tap, and its taps.

    `transposed` are those of the gradient: what a position gets from the positions whose windows hold it.
    """
    radius = min(window // 2, length - 1)  # nothing lies farther away
    offsets = np.arange(-radius, radius + 1)
    gaussian = np.exp(-0.5 * (offsets / (WIDTH * window)) ** 2)
    positions = np.arange(length)[:, np.newaxis] + offsets
    # sums[position]: of the weights of the window around it that lie on the axis
    sums = (gaussian * ((positions >= 0) & (positions < length))).sum(axis=1)
    taps = np.arange(*wanted)[:, np.newaxis] + offsets
    inside = (taps >= given[0]) & (taps < given[1])
    windows = np.clip(taps, 0, length - 1) if transposed else np.arange(*wanted)[:, np.newaxis]
    weights = np.where(inside, gaussian / sums[windows], 0.0)
    assert transposed or math.isclose(weights.sum(), len(weights)), "a window reaches beyond what is given"
    return np.ascontiguousarray(taps[:, 0] - given[0]), weights
