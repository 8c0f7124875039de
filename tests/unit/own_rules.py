"""Update rules as users write them, good ones and bad ones."""

import numba
import numpy as np


@numba.njit
def lion(parameters, gradient, rate, update, momentum, beta1=0.9, beta2=0.99):
    """Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, algorithm 2, without decay."""
    kind = parameters.dtype.type
    for i in range(parameters.size):
        g, m = gradient[i], momentum[i]
        parameters[i] -= kind(rate) * np.sign(kind(beta1) * m + kind(1 - beta1) * g)
        momentum[i] = kind(beta2) * m + kind(1 - beta2) * g


@numba.njit
def mean_of_all(parameters, gradient, rate, update, mean):
    """Step along the mean of all gradients so far: for the number of the update."""
    for i in range(parameters.size):
        mean[i] += (gradient[i] - mean[i]) / np.float32(update)
        parameters[i] -= np.float32(rate) * mean[i]


@numba.njit
def stateless(parameters, gradient, rate, update):
    for i in range(parameters.size):
        parameters[i] -= np.float32(rate) * gradient[i]


@numba.njit
def name_of_another(parameters, gradient, rate, update, s1):
    pass


def plain(parameters, gradient, rate, update):
    pass


@numba.njit
def other_arguments(weights, gradient, rate, update):
    pass


@numba.njit
def text_setting(parameters, gradient, rate, update, mode="fast"):
    pass


@numba.njit
def changes_the_gradient(parameters, gradient, rate, update):
    gradient[:] = 0


@numba.njit
def not_a_number(parameters, gradient, rate, update, mean):
    mean[:] = np.nan


@numba.njit
def raises(parameters, gradient, rate, update):
    raise ValueError("not today")


@numba.njit
def does_not_compile(parameters, gradient, rate, update):
    return parameters.no_such_attribute


NUMBER = 5
