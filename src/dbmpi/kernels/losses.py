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

import numpy as np
from numba import prange

from dbmpi.kernels.compile import inlined, parallel_kernel
from dbmpi.kernels.elementary import exp, log1p_exp, sigmoid

BLOCK = 128
"""Samples that a thread takes at a time."""


@inlined
def _find_largest(values: np.ndarray, start: int, stop: int, largest: np.ndarray, place: np.ndarray) -> None:
    """Find the largest value of each sample and the unit that has it; NaN and -1 where a value is NaN."""
    largest[:] = values[0][start:stop]
    place[:] = 0
    for unit in range(1, values.shape[0]):
        row = values[unit][start:stop]
        for sample in range(row.size):
            value = row[sample]
            if (value > largest[sample]) | (value != value):  # noqa: PLR0124 - NaN
                largest[sample] = value
                place[sample] = unit
    for sample in range(place.size):
        if not math.isfinite(largest[sample]):
            place[sample] = -1


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
    units, samples = values.shape
    losses = np.empty(samples, np.float64)
    hits = np.zeros(samples, np.int64)
    for block in prange(-(-samples // BLOCK)):
        start, stop = block * BLOCK, min(samples, block * BLOCK + BLOCK)
        target = classes[start:stop]
        size = stop - start
        largest = np.empty(size, values.dtype)
        place = np.empty(size, np.int32)
        total = np.empty(size, np.float64)
        factor = np.empty(size, values.dtype)
        _find_largest(values, start, stop, largest, place)
        for sample in range(size):
            losses[start + sample] = np.float64(largest[sample]) - np.float64(values[target[sample], start + sample])
            hits[start + sample] = place[sample] == target[sample]
        _exponentials(values, start, stop, largest, total)
        for sample in range(size):
            weight = np.float64(weights[start + sample])
            losses[start + sample] = weight * (losses[start + sample] + math.log(total[sample]))
            factor[sample] = weight / (total[sample] * samples)
        for unit in range(units):
            row = values[unit][start:stop]
            for sample in range(size):
                row[sample] *= factor[sample]
        for sample in range(size):
            values[target[sample], start + sample] -= values.dtype.type(np.float64(weights[start + sample]) / samples)
    return losses.sum(), hits.sum()


@parallel_kernel
def softmax(values: np.ndarray) -> None:
    """Replace the logits of each sample by their softmax."""
    units, samples = values.shape
    for block in prange(-(-samples // BLOCK)):
        start, stop = block * BLOCK, min(samples, block * BLOCK + BLOCK)
        size = stop - start
        largest = np.empty(size, values.dtype)
        place = np.empty(size, np.int32)
        total = np.empty(size, np.float64)
        factor = np.empty(size, values.dtype)
        _find_largest(values, start, stop, largest, place)
        _exponentials(values, start, stop, largest, total)
        for sample in range(size):
            factor[sample] = 1.0 / total[sample]
        for unit in range(units):
            row = values[unit][start:stop]
            for sample in range(size):
                row[sample] *= factor[sample]


@parallel_kernel
def logistic_classes(values: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> tuple[float, int]:
    """One-vs-all logistic loss: ``sum_u log(1 + exp(z_u)) - z_class``; gradient ``sigmoid(z_u) - [u = class]``.

    Parameters and result as in `softmax_cross_entropy`.  The targets of all outputs are never written out.
    """
    units, samples = values.shape
    losses = np.empty(samples, np.float64)
    hits = np.zeros(samples, np.int64)
    for block in prange(-(-samples // BLOCK)):
        start, stop = block * BLOCK, min(samples, block * BLOCK + BLOCK)
        target, loss = classes[start:stop], losses[start:stop]
        size = stop - start
        largest = np.empty(size, values.dtype)
        place = np.empty(size, np.int32)
        mean = values.dtype.type(1.0 / samples)
        weight = weights[start:stop]
        _find_largest(values, start, stop, largest, place)
        for sample in range(size):
            # log(1 + exp(z)) - z = log(1 + exp(-z)), where the left side would lose its digits
            value = values[target[sample], start + sample]
            loss[sample] = np.float64(log1p_exp(-value)) - np.float64(log1p_exp(value))
            hits[start + sample] = place[sample] == target[sample]
        for unit in range(units):
            row = values[unit][start:stop]
            for sample in range(size):
                value = row[sample]
                loss[sample] += np.float64(log1p_exp(value))
                row[sample] = sigmoid(value) * (mean * weight[sample])
        for sample in range(size):
            values[target[sample], start + sample] -= mean * weight[sample]
            loss[sample] *= np.float64(weight[sample])
    return losses.sum(), hits.sum()


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
    return float(losses.sum())


@parallel_kernel
def squared_values(values: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """Half the squared distance: ``1/2 sum_u (y_u - t_u)^2``; gradient ``y_u - t_u``.

    Parameters and result as in `logistic_values`.
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
    return float(losses.sum())


@parallel_kernel
def squared_classes(values: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> tuple[float, int]:
    """Half the squared distance to 1 at the class and 0 elsewhere.

    Parameters and result as in `softmax_cross_entropy`.  The targets of all outputs are never written out.
    """
    units, samples = values.shape
    losses = np.empty(samples, np.float64)
    hits = np.zeros(samples, np.int64)
    for block in prange(-(-samples // BLOCK)):
        start, stop = block * BLOCK, min(samples, block * BLOCK + BLOCK)
        target, loss = classes[start:stop], losses[start:stop]
        size = stop - start
        largest = np.empty(size, values.dtype)
        place = np.empty(size, np.int32)
        mean = values.dtype.type(1.0 / samples)
        weight = weights[start:stop]
        _find_largest(values, start, stop, largest, place)
        for sample in range(size):
            # (y - 1)^2 = y^2 - 2 y + 1 at the class
            loss[sample] = 0.5 - np.float64(values[target[sample], start + sample])
            hits[start + sample] = place[sample] == target[sample]
        for unit in range(units):
            row = values[unit][start:stop]
            for sample in range(size):
                value = row[sample]
                loss[sample] += 0.5 * np.float64(value) * np.float64(value)
                row[sample] = value * (mean * weight[sample])
        for sample in range(size):
            values[target[sample], start + sample] -= mean * weight[sample]
            loss[sample] *= np.float64(weight[sample])
    return losses.sum(), hits.sum()


@parallel_kernel
def logistic(values: np.ndarray) -> None:
    """Replace the values by their logistic function."""
    for unit in prange(values.shape[0]):
        row = values[unit]
        for sample in range(row.size):
            row[sample] = sigmoid(row[sample])
