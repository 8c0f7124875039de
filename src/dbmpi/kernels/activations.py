"""The activations: each is one function of an element and its derivative, and the kernels made of these.

The derivative takes the gradient for an output and the output itself, so that nothing else need be kept, and returns
the gradient for the sum before the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from dbmpi.kernels.compile import Kernel, inlined, parallel_kernel
from dbmpi.kernels.elementary import sigmoid, tanh


class Activation(NamedTuple):
    """The kernels of one activation, on all units of a layer or a part of them; each is one pass over memory."""

    forward: Callable[[np.ndarray, np.ndarray], None]
    """``forward(outputs, bias)``: sums (units, samples) become ``f(sums + bias)``; the bias is (units,)."""
    backward: Callable[[np.ndarray, np.ndarray, np.ndarray], None]
    """``backward(outputs, gradient, bias_gradient)``: the gradient for outputs (units, samples) becomes that for the
    sums; its sum over the samples, added up in float64, becomes that for the bias (units,)."""


@inlined
def _same(x: Any) -> Any:
    return x


@inlined
def _relu(x: Any) -> Any:
    """Return max(x, 0); NaN stays NaN."""
    return type(x)(0) if x < 0 else x


@inlined
def _linear_gradient(gradient: Any, y: Any) -> Any:
    return gradient


@inlined
def _sigmoid_gradient(gradient: Any, y: Any) -> Any:
    return gradient * (y - y * y)


@inlined
def _tanh_gradient(gradient: Any, y: Any) -> Any:
    return gradient - gradient * (y * y)


@inlined
def _relu_gradient(gradient: Any, y: Any) -> Any:
    return type(gradient)(0) if y <= 0 else gradient


def _activation(function: Callable[..., Any], derivative: Kernel[..., Any]) -> Activation:
    """Return the kernels of an activation."""

    def forward(outputs: np.ndarray, bias: np.ndarray) -> None:
        for unit in prange(outputs.shape[0]):
            row, addend = outputs[unit], bias[unit]
            for sample in range(row.size):
                row[sample] = function(row[sample] + addend)

    def backward(outputs: np.ndarray, gradient: np.ndarray, bias_gradient: np.ndarray) -> None:
        for unit in prange(gradient.shape[0]):
            row, y = gradient[unit], outputs[unit]
            total = 0.0
            for sample in range(row.size):
                value = derivative(row[sample], y[sample])
                row[sample] = value
                total += np.float64(value)
            bias_gradient[unit] = total

    return Activation(parallel_kernel(forward), parallel_kernel(backward))


ACTIVATIONS = {
    "linear": _activation(_same, _linear_gradient),
    "sigmoid": _activation(sigmoid, _sigmoid_gradient),
    "tanh": _activation(tanh, _tanh_gradient),
    "relu": _activation(_relu, _relu_gradient),
}
"""The activations by their names in a configuration."""

# A layer of filters activates the outputs of one position at a time, in kernels that serve all activations.

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
"""How such kernels know the activations."""
LINEAR, SIGMOID, TANH, RELU = range(4)


@inlined
def activate(values: np.ndarray, code: int) -> None:
    """Apply the activation `code` to values (n,), in place."""
    if code == SIGMOID:
        for i in range(values.size):
            values[i] = sigmoid(values[i])
    elif code == TANH:
        for i in range(values.size):
            values[i] = tanh(values[i])
    elif code == RELU:
        for i in range(values.size):
            values[i] = _relu(values[i])


@inlined
def derive(gradient: np.ndarray, outputs: np.ndarray, code: int) -> None:
    """Turn the gradient for outputs (n,) of the activation `code` into that for the sums before it, in place."""
    if code == SIGMOID:
        for i in range(outputs.size):
            gradient[i] = _sigmoid_gradient(gradient[i], outputs[i])
    elif code == TANH:
        for i in range(outputs.size):
            gradient[i] = _tanh_gradient(gradient[i], outputs[i])
    elif code == RELU:
        for i in range(outputs.size):
            gradient[i] = _relu_gradient(gradient[i], outputs[i])
