"""Bias, activation and its derivative, each in one pass over an array ``(units, samples)``.

Every activation is a pair of kernels::

    forward(outputs, bias)                        outputs <- f(outputs + bias)
    backward(outputs, gradient, bias_gradient)    gradient <- gradient * f'(.);  bias_gradient <- its sum over samples

where f' is expressed by the outputs, so that nothing else need be kept.  Arrays may hold a part of a layer's units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import prange

from dbmpi.kernels.compile import parallel_kernel
from dbmpi.kernels.elementary import sigmoid, tanh


@parallel_kernel
def linear_forward(outputs: np.ndarray, bias: np.ndarray) -> None:
    """Add the bias (units,) to the outputs (units, samples)."""
    for unit in prange(outputs.shape[0]):
        row, addend = outputs[unit], bias[unit]
        for sample in range(row.size):
            row[sample] += addend


@parallel_kernel
def linear_backward(outputs: np.ndarray, gradient: np.ndarray, bias_gradient: np.ndarray) -> None:
    """Sum the gradient over the samples, in float64."""
    for unit in prange(gradient.shape[0]):
        row = gradient[unit]
        total = 0.0
        for sample in range(row.size):
            total += np.float64(row[sample])
        bias_gradient[unit] = total


@parallel_kernel
def sigmoid_forward(outputs: np.ndarray, bias: np.ndarray) -> None:
    """Apply ``1 / (1 + exp(-(x + bias)))``."""
    for unit in prange(outputs.shape[0]):
        row, addend = outputs[unit], bias[unit]
        for sample in range(row.size):
            row[sample] = sigmoid(row[sample] + addend)


@parallel_kernel
def sigmoid_backward(outputs: np.ndarray, gradient: np.ndarray, bias_gradient: np.ndarray) -> None:
    """Multiply by ``y (1 - y)``, and sum over the samples in float64."""
    for unit in prange(gradient.shape[0]):
        row, y = gradient[unit], outputs[unit]
        total = 0.0
        for sample in range(row.size):
            value = row[sample] * (y[sample] - y[sample] * y[sample])
            row[sample] = value
            total += np.float64(value)
        bias_gradient[unit] = total


@parallel_kernel
def tanh_forward(outputs: np.ndarray, bias: np.ndarray) -> None:
    """Apply ``tanh(x + bias)``."""
    for unit in prange(outputs.shape[0]):
        row, addend = outputs[unit], bias[unit]
        for sample in range(row.size):
            row[sample] = tanh(row[sample] + addend)


@parallel_kernel
def tanh_backward(outputs: np.ndarray, gradient: np.ndarray, bias_gradient: np.ndarray) -> None:
    """Multiply by ``1 - y^2``, and sum over the samples in float64."""
    for unit in prange(gradient.shape[0]):
        row, y = gradient[unit], outputs[unit]
        total = 0.0
        for sample in range(row.size):
            value = row[sample] - row[sample] * (y[sample] * y[sample])
            row[sample] = value
            total += np.float64(value)
        bias_gradient[unit] = total


@parallel_kernel
def relu_forward(outputs: np.ndarray, bias: np.ndarray) -> None:
    """Apply ``max(x + bias, 0)``; NaN stays NaN."""
    for unit in prange(outputs.shape[0]):
        row, addend = outputs[unit], bias[unit]
        for sample in range(row.size):
            value = row[sample] + addend
            row[sample] = row.dtype.type(0) if value < 0 else value


@parallel_kernel
def relu_backward(outputs: np.ndarray, gradient: np.ndarray, bias_gradient: np.ndarray) -> None:
    """Set to zero where the output is zero, and sum over the samples in float64."""
    for unit in prange(gradient.shape[0]):
        row, y = gradient[unit], outputs[unit]
        total = 0.0
        for sample in range(row.size):
            value = row.dtype.type(0) if y[sample] <= 0 else row[sample]
            row[sample] = value
            total += np.float64(value)
        bias_gradient[unit] = total


class Activation(NamedTuple):
    """The kernels of one activation."""

    forward: Callable[[np.ndarray, np.ndarray], None]
    backward: Callable[[np.ndarray, np.ndarray, np.ndarray], None]


ACTIVATIONS = {
    "linear": Activation(linear_forward, linear_backward),
    "sigmoid": Activation(sigmoid_forward, sigmoid_backward),
    "tanh": Activation(tanh_forward, tanh_backward),
    "relu": Activation(relu_forward, relu_backward),
}
"""The activations by their names in a configuration."""
