"""Losses with their gradients, and the outputs that go with them, over arrays ``(outputs, samples)``.

Each loss kernel replaces what the last layer computed by the gradient of the **mean** loss of the batch, and
returns the **sum** of the samples' losses, in float64, each times the weight of its sample.  Kernels for classes also
return how many samples' largest output is their class (the first, where several are as large); a sample with an output
that is NaN, or whose largest one is infinite, never is.  Classes are not checked here: one that is not an output would
write outside the array.

Samples are taken in blocks, so that the running values of a block stay in the first cache while the outputs pass by,
and so that threads share nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import prange

from dbmpi.kernels.compile import Kernel, inlined, kernel, parallel_kernel
from dbmpi.kernels.elementary import copy, exp, log1p_exp, sigmoid

BLOCK = 128
"""Samples that a thread takes at a time."""


@kernel
def add_up(numbers: np.ndarray) -> Any:
    """Return the sum of `numbers`, added in their order whatever the number of threads; for use in kernels.

    NumPy's own ``sum`` in a kernel is shared by the threads, and loads SciPy's linear algebra into every rank.
    """
    total = numbers.dtype.type(0)
    for number in numbers:
        total += number
    return total


@inlined
def _find_largest(values: np.ndarray, start: int, stop: int, largest: np.ndarray, winner: np.ndarray) -> None:
    """Find the largest value of each sample and the unit that has it; NaN and -1 where a value is NaN."""
    copy(largest, values[0][start:stop])
    winner[:] = 0
    for unit in range(1, values.shape[0]):
        row = values[unit][start:stop]
        for sample in range(row.size):
            value = row[sample]
            if (value > largest[sample]) | (value != value):  # noqa: PLR0124 - NaN
                largest[sample] = value
                winner[sample] = unit
    for sample in range(winner.size):
        if not math.isfinite(largest[sample]):
            winner[sample] = -1


@inlined
def _exponentials(values: np.ndarray, start: int, stop: int, largest: np.ndarray, total: np.ndarray) -> None:
    """Replace the values of each sample by exp(value - largest), and sum them in float64."""
    total[:] = 0.0
    for unit in range(values.shape[0]):
        row = values[unit][start:stop]
        for sample in range(row.size):
            value = exp(row[sample] - largest[sample])
            row[sample] = value
            total[sample] += np.float64(value)


@inlined
def _multiply_samples(values: np.ndarray, start: int, stop: int, factor: np.ndarray) -> None:
    for unit in range(values.shape[0]):
        row = values[unit][start:stop]
        for sample in range(row.size):
            row[sample] *= factor[sample]


@parallel_kernel
def softmax_cross_entropy(values: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> tuple[float, int]:
    """Cross-entropy of softmax: ``log(sum_u exp(z_u)) - z_class``; gradient ``softmax(z)_u - [u = class]``.

    Parameters
    ----------
    values : (outputs, samples) array
        The logits z; becomes the gradient of the mean loss.
    classes : (samples,) int32
    weights : (samples,) array
        Of the dtype of `values`; 1 for each sample where all count alike.

    Returns
    -------
    tuple[float, int]
        Sum of the losses, number of samples classified correctly.
    """
    samples = values.shape[1]
    losses = np.empty(samples, np.float64)
    hits = np.zeros(samples, np.int64)
    for block in prange(-(-samples // BLOCK)):
        start, stop = block * BLOCK, min(samples, block * BLOCK + BLOCK)
        target = classes[start:stop]
        size = stop - start
        largest = np.empty(size, values.dtype)
        winner = np.empty(size, np.int32)
        total = np.empty(size, np.float64)
        factor = np.empty(size, values.dtype)
        _find_largest(values, start, stop, largest, winner)
        for sample in range(size):
            losses[start + sample] = np.float64(largest[sample]) - np.float64(values[target[sample], start + sample])
            hits[start + sample] = winner[sample] == target[sample]
        _exponentials(values, start, stop, largest, total)
        for sample in range(size):
            weight = np.float64(weights[start + sample])
            losses[start + sample] = weight * (losses[start + sample] + math.log(total[sample]))
            factor[sample] = weight / (total[sample] * samples)
        _multiply_samples(values, start, stop, factor)
        for sample in range(size):
            values[target[sample], start + sample] -= values.dtype.type(np.float64(weights[start + sample]) / samples)
    return add_up(losses), add_up(hits)


@parallel_kernel
def softmax(values: np.ndarray) -> None:
    """Replace the logits of each sample, `values` (outputs, samples), by their softmax."""
    samples = values.shape[1]
    for block in prange(-(-samples // BLOCK)):
        start, stop = block * BLOCK, min(samples, block * BLOCK + BLOCK)
        size = stop - start
        largest = np.empty(size, values.dtype)
        winner = np.empty(size, np.int32)
        total = np.empty(size, np.float64)
        factor = np.empty(size, values.dtype)
        _find_largest(values, start, stop, largest, winner)
        _exponentials(values, start, stop, largest, total)
        for sample in range(size):
            factor[sample] = 1.0 / total[sample]
        _multiply_samples(values, start, stop, factor)


def _of_classes(
    at_class: Kernel[..., Any], loss_of: Kernel[..., Any], gradient_of: Callable[..., Any]
) -> Kernel[..., Any]:
    """Return the loss of independent outputs whose targets are 1 for the class and 0 for all others.

    The targets of all outputs are never written out.  `loss_of` and `gradient_of` are an output's for the target 0, and
    `at_class` is how the loss of the class's output differs from that, as its target is 1.
    """

    def loss_of_classes(values: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> tuple[float, int]:
        units, samples = values.shape
        losses = np.empty(samples, np.float64)
        hits = np.zeros(samples, np.int64)
        for block in prange(-(-samples // BLOCK)):
            start, stop = block * BLOCK, min(samples, block * BLOCK + BLOCK)
            target, loss = classes[start:stop], losses[start:stop]
            size = stop - start
            largest = np.empty(size, values.dtype)
            winner = np.empty(size, np.int32)
            mean = values.dtype.type(1.0 / samples)
            weight = weights[start:stop]
            _find_largest(values, start, stop, largest, winner)
            for sample in range(size):
                loss[sample] = at_class(values[target[sample], start + sample])
                hits[start + sample] = winner[sample] == target[sample]
            for unit in range(units):
                row = values[unit][start:stop]
                for sample in range(size):
                    value = row[sample]
                    loss[sample] += loss_of(value)
                    row[sample] = gradient_of(value) * (mean * weight[sample])
            for sample in range(size):
                values[target[sample], start + sample] -= mean * weight[sample]
                loss[sample] *= np.float64(weight[sample])
        return add_up(losses), add_up(hits)

    return parallel_kernel(loss_of_classes)


@inlined
def _logistic_at_class(z: Any) -> Any:
    # log(1 + exp(z)) - z = log(1 + exp(-z)), where the left side would lose its digits
    return np.float64(log1p_exp(-z)) - np.float64(log1p_exp(z))


@inlined
def _logistic_loss(z: Any) -> Any:
    return np.float64(log1p_exp(z))


@inlined
def _squared_at_class(y: Any) -> Any:
    return 0.5 - np.float64(y)  # (y - 1)^2 = y^2 - 2 y + 1


@inlined
def _squared_loss(y: Any) -> Any:
    return 0.5 * np.float64(y) * np.float64(y)


@inlined
def _same(y: Any) -> Any:
    return y


logistic_classes = _of_classes(_logistic_at_class, _logistic_loss, sigmoid)
"""One-vs-all logistic loss: ``sum_u log(1 + exp(z_u)) - z_class``; gradient ``sigmoid(z_u) - [u = class]``.

Parameters and result as in `softmax_cross_entropy`.
"""
squared_classes = _of_classes(_squared_at_class, _squared_loss, _same)
"""Half the squared distance to 1 at the class and 0 elsewhere; parameters and result as in `softmax_cross_entropy`."""


@parallel_kernel
def logistic_values(values: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """Logistic loss of targets between 0 and 1: ``sum_u log(1 + exp(z_u)) - t_u z_u``; gradient ``sigmoid(z_u) - t_u``.

    Parameters
    ----------
    values : (outputs, samples) array
        The logits z; becomes the gradient of the mean loss.
    targets : (outputs, samples) array
        The targets t, of the same dtype.
    weights : (samples,) array
        As in `softmax_cross_entropy`.

    Returns
    -------
    float
        Sum of the losses.
    """
    units, samples = values.shape
    mean = values.dtype.type(1.0 / samples)
    one, zero = values.dtype.type(1), values.dtype.type(0)
    losses = np.empty(units, np.float64)
    for unit in prange(units):
        row, target = values[unit], targets[unit]
        total = 0.0
        for sample in range(samples):
            value = row[sample]
            # log(1 + exp(z)) = log(1 + exp(-|z|)) + max(z, 0), so that nothing large cancels
            weight = np.float64(weights[sample])
            total += weight * np.float64(log1p_exp(-abs(value)))
            total += weight * np.float64(value * ((one if value > 0 else zero) - target[sample]))
            row[sample] = (sigmoid(value) - target[sample]) * (mean * weights[sample])
        losses[unit] = total
    return float(add_up(losses))


@parallel_kernel
def squared_values(values: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """Half the squared distance: ``1/2 sum_u (y_u - t_u)^2``; gradient ``y_u - t_u``.

    Parameters
    ----------
    values, targets, weights
        As in `logistic_values`; here `values` are the outputs y.

    Returns
    -------
    float
        Sum of the losses.
    """
    units, samples = values.shape
    mean = values.dtype.type(1.0 / samples)
    losses = np.empty(units, np.float64)
    for unit in prange(units):
        row, target = values[unit], targets[unit]
        total = 0.0
        for sample in range(samples):
            difference = row[sample] - target[sample]
            total += np.float64(weights[sample]) * (np.float64(difference) * np.float64(difference))
            row[sample] = difference * (mean * weights[sample])
        losses[unit] = 0.5 * total
    return float(add_up(losses))


@parallel_kernel
def logistic(values: np.ndarray) -> None:
    """Replace the values by their logistic function."""
    for unit in prange(values.shape[0]):
        row = values[unit]
        for sample in range(row.size):
            row[sample] = sigmoid(row[sample])
