"""Updates of parameters by running averages of gradients and of their squares, each in one pass over memory.

They are compiled, and called, as those in :mod:`dbmpi.kernels.updates`: IEEE arithmetic in the order that is written,
in the dtype of the vectors, to which the settings are rounded first.

`decay` is the factor of a coupled weight decay: every kernel takes ``gradient + decay * parameters`` for the gradient.

Averages below the smallest normal number become zero.  Where a gradient stays zero they would end among the subnormal
ones and stay there, with which a processor needs several times as long.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dbmpi.kernels.compile import exact_parallel_kernel


@exact_parallel_kernel
def momentum(
    parameters: np.ndarray,
    gradient: np.ndarray,
    velocity: np.ndarray,
    rate: float,
    friction: float,
    nesterov: bool,
    decay: float,
) -> None:
    """Take a step of gradient descent with momentum.

    ``velocity = friction * velocity + gradient;  parameters -= rate * velocity``, or with `nesterov`
    ``parameters -= rate * (gradient + friction * velocity)``

    Parameters
    ----------
    parameters, gradient, velocity : (n,) arrays
        The velocity is updated, and then the parameters.
    rate, friction : float
        Learning rate, and the fraction of the velocity that stays.
    nesterov : bool
        Whether to step by Nesterov's momentum.
    decay : float
        See above.
    """
    kind = parameters.dtype.type
    step, stays, shrink = kind(rate), kind(friction), kind(decay)
    nothing, tiny = kind(0), kind(np.finfo(parameters.dtype).tiny)
    for i in prange(parameters.size):
        w = parameters[i]
        g = gradient[i] + shrink * w
        v = stays * velocity[i] + g
        v = nothing if abs(v) < tiny else v
        velocity[i] = v
        parameters[i] = w - step * (g + stays * v if nesterov else v)


@exact_parallel_kernel
def delayed_nesterov(
    parameters: np.ndarray,
    gradient: np.ndarray,
    velocity: np.ndarray,
    delayed: np.ndarray,
    rate: float,
    friction: float,
    part: float,
    renews: bool,
) -> None:
    """Take a step of Nesterov's momentum whose velocity takes in several gradients at once.

    ``delayed += gradient;  parameters -= rate * (part * gradient)``, or if it `renews`
    ``velocity = friction * velocity + part * delayed;  delayed = 0``
    ``parameters -= rate * (part * gradient + friction * velocity)``

    Parameters
    ----------
    parameters, gradient, velocity, delayed : (n,) arrays
        The velocity, and the sum of gradients that it has not taken in, are updated, and then the parameters.
    rate, friction : float
        Learning rate, and the fraction of the velocity that stays.
    part : float
        One over the number of gradients that the velocity takes in together.
    renews : bool
        Whether it does so now.
    """
    kind = parameters.dtype.type
    step, stays, share = kind(rate), kind(friction), kind(part)
    nothing, tiny = kind(0), kind(np.finfo(parameters.dtype).tiny)
    for i in prange(parameters.size):
        along, total = share * gradient[i], delayed[i] + gradient[i]
        if renews:
            v = stays * velocity[i] + share * total
            v = nothing if abs(v) < tiny else v
            velocity[i] = v
            along, total = along + stays * v, nothing
        delayed[i] = total
        parameters[i] -= step * along


@exact_parallel_kernel
def rmsprop(
    parameters: np.ndarray,
    gradient: np.ndarray,
    square: np.ndarray,
    rate: float,
    beta: float,
    epsilon: float,
    decay: float,
) -> None:
    """Take a step of RMSProp.

    ``square = beta * square + (1 - beta) * gradient^2;  parameters -= rate * gradient / (sqrt(square) + epsilon)``

    Parameters
    ----------
    parameters, gradient, square : (n,) arrays
        The mean square is updated, and then the parameters.
    rate, beta, epsilon : float
        Learning rate, the fraction of the mean that stays, and the term that bounds the step where it is small.
    decay : float
        See above.
    """
    kind = parameters.dtype.type
    step, stays, comes, floor, shrink = kind(rate), kind(beta), kind(1 - beta), kind(epsilon), kind(decay)
    nothing, tiny = kind(0), kind(np.finfo(parameters.dtype).tiny)
    for i in prange(parameters.size):
        w = parameters[i]
        g = gradient[i] + shrink * w
        s = stays * square[i] + comes * (g * g)
        s = nothing if s < tiny else s
        square[i] = s
        parameters[i] = w - step * g / (np.sqrt(s) + floor)


@exact_parallel_kernel
def adam(
    parameters: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    rate: float,
    betas: tuple[float, float],
    corrections: tuple[float, float],
    epsilon: float,
    decay: float,
    kept: float,
) -> None:
    """Take a step of Adam, or of AdamW.

    ``mean = beta1 * mean + (1 - beta1) * gradient;  square = beta2 * square + (1 - beta2) * gradient^2;
    parameters = kept * parameters - rate * correction1 * mean / (sqrt(square) * correction2 + epsilon)``

    Parameters
    ----------
    parameters, gradient, mean, square : (n,) arrays
        The averages are updated, and then the parameters.
    rate, epsilon : float
        Learning rate, and the term that bounds the step where the mean square is small.
    betas : (float, float)
        The fractions of the averages that stay.
    corrections : (float, float)
        What makes up for averages that began at zero: of the mean, and of the root of the mean square.
    decay : float
        See above.
    kept : float
        What the decoupled weight decay of AdamW leaves of the parameters; 1 for Adam.
    """
    kind = parameters.dtype.type
    step, floor, shrink, left = kind(rate * corrections[0]), kind(epsilon), kind(decay), kind(kept)
    stays_mean, comes_mean = kind(betas[0]), kind(1 - betas[0])
    stays_square, comes_square, unbias = kind(betas[1]), kind(1 - betas[1]), kind(corrections[1])
    nothing, tiny = kind(0), kind(np.finfo(parameters.dtype).tiny)
    for i in prange(parameters.size):
        w = parameters[i]
        g = gradient[i] + shrink * w
        m = stays_mean * mean[i] + comes_mean * g
        s = stays_square * square[i] + comes_square * (g * g)
        m = nothing if abs(m) < tiny else m
        s = nothing if s < tiny else s
        mean[i], square[i] = m, s
        parameters[i] = left * w - step * m / (np.sqrt(s) * unbias + floor)
