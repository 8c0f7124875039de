"""Local contrast normalisation: each value against its neighbourhood in all maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.kernels import normalisation as kernels
from dbmpi.kernels.memory import rows_of, widened
from dbmpi.network.layer import Backward, Forward, Parameterless
from dbmpi.network.windows import check_maps

WIDTH = 0.25
"""Standard deviation of the Gaussian window as a part of its size; the papers give none, Torch took a quarter."""


@dataclass(frozen=True)
class NormalisationLayer(Parameterless):
    """Subtractive, then divisive normalisation over a Gaussian window in all maps; no parameters.

    ``g[i, y, x] = h[i, y, x] - sum over j, u, v of w[u, v] h[j, y + u, x + v]`` and ``outputs[i, y, x] = g[i, y, x] /
    max(floor, sqrt(sum over j, u, v of w[u, v] g[j, y + u, x + v]**2))``, where the weights of each window, all maps
    counted, sum to one: Le et al., "Building high-level features using large scale unsupervised learning", ICML 2012,
    section 3 (and its constant floor of 0.01), after Jarrett et al., "What is the best multi-stage architecture for
    object recognition?", ICCV 2009, section 2.

    At the borders the window is what of it lies within the image, its weights again with a sum of one, so that
    constant inputs give zero everywhere.  Inputs and outputs are ``(maps, height, width)``.

    Raises
    ------
    UserError
        If the inputs have no rows and columns.
    """

    takes_parts: ClassVar[bool] = True

    name: str
    input_shape: tuple[int, ...]
    window: int = 5
    floor: float = 0.01

    def __post_init__(self) -> None:
        check_maps(self.name, "local contrast normalisation", self.input_shape)

    @classmethod
    def from_config(cls, section: config.Normalisation, name: str, input_shape: tuple[int, ...]) -> NormalisationLayer:
        """Make the layer that a configuration describes."""
        return cls(name, input_shape, section.window, section.floor)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample, that of the inputs."""
        return self.input_shape

    def input_box(self, output: Box) -> Box:
        """Return all maps of the windows of the windows: a mean is subtracted from each value of a deviation."""
        return self._around(output, 2)

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the operations for the outputs in a box, without those that its surroundings take again."""
        some, height, width = output.shape
        maps, smoothing = self.input_shape[0], 4 * self.window
        forward = 4 * maps + 2 * some + 2 * smoothing + 2
        backward = 8 * maps + 6 * some + 4 * smoothing + 6  # the statistics are computed again
        return (forward + (backward if input_gradient else 0)) * height * width * samples

    def forward(self, task: Forward) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        inputs, _, mean, divisor = self._statistics(task.output, task.inputs)
        if inputs is task.inputs:
            self._normalise(task.output, inputs, mean, divisor, task.outputs)
            return
        with widened(task.outputs) as outputs:
            self._normalise(task.output, inputs, mean, divisor, outputs)

    def _normalise(
        self, output: Box, inputs: np.ndarray, mean: np.ndarray, divisor: np.ndarray, outputs: np.ndarray
    ) -> None:
        kernels.normalise(
            inputs,
            _place(output, self._around(output, 2)),
            mean,
            _space(output, self._around(output, 1)),
            divisor,
            *(len(outputs), *rows_of(outputs)),
        )

    def backward(self, task: Backward) -> None:
        """Compute the inputs' gradient (see the contract of a layer)."""
        if task.input_gradient is None:
            return
        inputs, *statistics = self._statistics(task.output, task.inputs)
        if inputs is task.inputs:
            self._differentiate(task.output, inputs, statistics, task.outputs, task.gradient, task.input_gradient)
            return
        outputs, gradient = task.outputs.astype(inputs.dtype), task.gradient.astype(inputs.dtype)
        with widened(task.input_gradient) as input_gradient:
            self._differentiate(task.output, inputs, statistics, outputs, gradient, input_gradient)

    def _differentiate(
        self,
        output: Box,
        inputs: np.ndarray,
        statistics: Sequence[np.ndarray],
        outputs: np.ndarray,
        gradient: np.ndarray,
        input_gradient: np.ndarray,
    ) -> None:
        near, far = self._around(output, 1), self._around(output, 2)
        total, mean, divisor = statistics
        squares, divided = np.empty_like(divisor), np.empty_like(divisor)
        rows_of_gradient = rows_of(gradient)
        kernels.divide_gradient(
            *(len(outputs), *rows_of(outputs), *rows_of_gradient), divisor, self.floor, squares, divided
        )
        of_squares = self._smoothed(squares, output, near, transposed=True)
        centred = np.empty_like(mean)
        kernels.sum_centred_gradient(
            of_squares, total, _space(near, far), mean, self.input_shape[0], divided, _space(output, near), centred
        )
        of_mean = self._smoothed(centred, near, far, transposed=True)
        kernels.input_gradient(
            *(inputs, mean, _space(near, far), of_squares, of_mean),
            *(*rows_of_gradient, gradient.shape[:3], _place(output, far), input_gradient),
        )

    def _around(self, output: Box, times: int) -> Box:
        """Return all maps of the places up to so many times the window's radius away."""
        reach = times * (self.window // 2)
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
        row, column = _space(near, far)
        kernels.sum_centred_squares(inputs, row, column, mean, squares)
        divisor = self._smoothed(squares, near, output)
        if not kernels.deviation(divisor, self.floor) and inputs.dtype == np.float32:
            return self._statistics(output, inputs.astype(np.float64))
        return inputs, total, mean, divisor

    def _smoothed(self, field: np.ndarray, given: Box, wanted: Box, transposed: bool = False) -> np.ndarray:
        """Return the weighted sums, over the maps' number, at the places of a box from `field` at those of another."""
        rows, columns = (
            _taps(
                self.input_shape[axis],
                self.window,
                (given.starts[axis], given.stops[axis]),
                (wanted.starts[axis], wanted.stops[axis]),
                transposed,
            )
            for axis in (1, 2)
        )
        result = np.empty((*wanted.shape[1:], field.shape[-1]), field.dtype)
        row_weights, column_weights = (
            (rows[1] / self.input_shape[0]).astype(field.dtype),
            columns[1].astype(field.dtype),
        )
        kernels.smooth(field, rows[0], row_weights, columns[0], column_weights, result)
        return result


def _place(inner: Box, outer: Box) -> tuple[int, int, int]:
    """Return at which map, row and column of another a box starts."""
    first_map, row, column = (a - b for a, b in zip(inner.starts, outer.starts, strict=True))
    return first_map, row, column


def _space(inner: Box, outer: Box) -> tuple[int, int]:
    """Return at which row and column of another a box starts."""
    return _place(inner, outer)[1:]


@lru_cache(maxsize=256)
def _taps(
    length: int, window: int, given: tuple[int, int], wanted: tuple[int, int], transposed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of an axis: for each wanted place, the index in `given` of its first tap, and its taps.

    `transposed` are those of the gradient: what a place gets from the places whose windows hold it.
    """
    radius = min(window // 2, length - 1)  # nothing lies farther away
    offsets = np.arange(-radius, radius + 1)
    gaussian = np.exp(-0.5 * (offsets / (WIDTH * window)) ** 2)
    places = np.arange(length)[:, np.newaxis] + offsets
    # sums[place]: of the weights of the window around it that lie on the axis
    sums = (gaussian * ((places >= 0) & (places < length))).sum(axis=1)
    taps = np.arange(*wanted)[:, np.newaxis] + offsets
    inside = (taps >= given[0]) & (taps < given[1])
    windows = np.clip(taps, 0, length - 1) if transposed else np.arange(*wanted)[:, np.newaxis]
    weights = np.where(inside, gaussian / sums[windows], 0.0)
    assert transposed or math.isclose(weights.sum(), len(weights)), "a window reaches beyond what is given"
    return np.ascontiguousarray(taps[:, 0] - given[0]), weights
