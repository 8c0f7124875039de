"""Updates of parameter vectors, each in one pass over memory.

They are compiled with IEEE arithmetic in the order that is written, so that they give bit for bit what the same
expression gives in NumPy, on any number of threads and however a vector is cut.  Vectors are 1-D, contiguous, of
one dtype and one length; the settings are rounded to that dtype first.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dbmpi.kernels.compile import exact_parallel_kernel


@exact_parallel_kernel
def sgd(parameters: np.ndarray, gradient: np.ndarray, rate: float) -> None:
    """Take a step of gradient descent: ``parameters -= rate * gradient``."""
    step = parameters.dtype.type(rate)
    for i in prange(parameters.size):
        parameters[i] -= step * gradient[i]


@exact_parallel_kernel
def adagrad(parameters: np.ndarray, gradient: np.ndarray, accumulator: np.ndarray, rate: float, epsilon: float) -> None:
    """Take a step of Adagrad (paper, section 4.1): the sum of squares includes the gradient itself.

    ``accumulator += gradient^2;  parameters -= rate * gradient / (sqrt(accumulator) + epsilon)``
    """
    step, floor = parameters.dtype.type(rate), parameters.dtype.type(epsilon)
    for i in prange(parameters.size):
        total = accumulator[i] + gradient[i] * gradient[i]
        accumulator[i] = total
        parameters[i] -= step * gradient[i] / (np.sqrt(total) + floor)


@exact_parallel_kernel
def add(target: np.ndarray, source: np.ndarray) -> None:
    """Accrue: ``target += source``."""
    for i in prange(target.size):
        target[i] += source[i]
