"""Updates of parameter vectors, each in one pass over memory.

They are compiled with IEEE arithmetic in the order that is written, so that they give bit for bit what the same
expression gives in NumPy, on any number of threads and however a vector is cut.  Vectors are 1-D, contiguous, of
one dtype and one length; the settings are rounded to that dtype first.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dbmpi.kernels.compile import Kernel, exact_parallel_kernel, fast_kernel, kernel

BLOCK = 2048
"""Elements that are updated at a time, and checked again where one was outside the range of float32."""
SMALLEST, LARGEST = 2.0**-100, 2.0**100
"""Sums of squares between these are kept as they are, in float32."""
FOLD = 2.0**32
"""Other sums are kept as minus their roots, times this where they are small and divided by it where they are large:
the former are above -1, the latter below."""
NEGLIGIBLE = 2.0**-12
"""A root that is smaller than this fraction of epsilon hardly changes a step: its sum needs few digits."""
_FLOOR = 1e-7
"""Added to a mean square before its root is divided by: that of Zheng et al. (2017)."""
_TINY = float(np.finfo(np.float32).tiny)
_SIGN = np.uint32(1 << 31)
_TO_SIGN = np.uint32((1 << 31) - int(np.float32(LARGEST).view(np.uint32)))
"""What lifts the bits of `LARGEST`, and of all that is larger or no number, to the sign."""


@exact_parallel_kernel
def sgd(parameters: np.ndarray, gradient: np.ndarray, rate: float) -> None:
    """Take a step of gradient descent: ``parameters -= rate * gradient``."""
    step = parameters.dtype.type(rate)
    for i in prange(parameters.size):
        parameters[i] -= step * gradient[i]


@exact_parallel_kernel
def sgd_with_decay(parameters: np.ndarray, gradient: np.ndarray, rate: float, decay: float) -> None:
    """Take a step of gradient descent with weight decay: ``parameters -= rate * (gradient + decay * parameters)``.

    Parameters
    ----------
    parameters, gradient : (n,) arrays
        The parameters are updated.
    rate, decay : float
        Learning rate, and factor of the weight decay.
    """
    step, shrink = parameters.dtype.type(rate), parameters.dtype.type(decay)
    for i in prange(parameters.size):
        parameters[i] -= step * (gradient[i] + shrink * parameters[i])


def _adagrad(decays: bool) -> Kernel[..., None]:
    """Return the kernel of Adagrad with weight decay, or without: gradients then keep their bits."""

    @kernel
    def below(w: np.ndarray, g: np.ndarray, sums: np.ndarray, shrink: float) -> bool:
        """Return whether a sum becomes too small, and not zero."""
        found = False
        for i in range(g.size):
            slope = g[i] + shrink * w[i] if decays else g[i]
            found |= sums[i] + slope * slope < SMALLEST and (slope != 0 or sums[i] != 0)
        return found

    @kernel
    def adagrad_any(
        w: np.ndarray, g: np.ndarray, sums: np.ndarray, step: float, floor: float, shrink: float, anew: bool
    ) -> None:
        """Take a step in double precision where sums of squares are beyond what float32 can hold.

        Of all elements, or else of those that have not taken it: their sums are kept as roots, or overflowed.  (What a
        gradient was added to was below `LARGEST` then, which is nothing beside its square.)
        """
        for i in range(w.size):
            gradient, kept = np.float64(g[i]), np.float64(sums[i])
            if decays:
                gradient += np.float64(shrink) * np.float64(w[i])
            stepped = not anew and 0 <= kept < np.inf
            if stepped:
                total = kept
            elif kept == np.inf:
                total = gradient * gradient
            else:
                total = (kept if kept >= 0 else _square(kept)) + gradient * gradient
            root = np.sqrt(total)
            if root > 0 and not stepped:
                w[i] = np.float64(w[i]) - np.float64(step) * (gradient / (root + np.float64(floor)))
            if total >= LARGEST:
                sums[i] = -root / FOLD
            elif anew and 0 < total < SMALLEST:
                sums[i] = -root * FOLD
            else:
                sums[i] = total

    @exact_parallel_kernel
    def adagrad(
        parameters: np.ndarray,
        gradient: np.ndarray,
        accumulator: np.ndarray,
        rate: float,
        epsilon: float,
        decay: float = 0.0,
    ) -> None:
        """Take a step of Adagrad (paper, section 4.1): the sum of squares includes the gradient itself.

        ``accumulator += gradient^2;  parameters -= rate * gradient / (sqrt(accumulator) + epsilon)``

        Parameters
        ----------
        parameters, gradient, accumulator : (n,) arrays
            The accumulator, the sum of squares, is updated, and then the parameters.
        rate, epsilon : float
            Learning rate, and the term that bounds the step where the sum is small.
        decay : float
            Factor of the weight decay: the gradient is ``gradient + decay * parameters``.

        Notes
        -----
        Where both are 0, the parameter stays.  A sum that float32 cannot hold, because gradients are large, or smaller
        than 1e-15 where so small ones matter, is kept as minus its root: see `FOLD`.
        """
        step, floor, shrink = parameters.dtype.type(rate), parameters.dtype.type(epsilon), parameters.dtype.type(decay)
        zero, least, infinite = parameters.dtype.type(0), parameters.dtype.type(_TINY), parameters.dtype.type(np.inf)
        single = parameters.itemsize == 4
        small_matter = single and floor * NEGLIGIBLE < np.sqrt(SMALLEST)
        for number in prange(-(-parameters.size // BLOCK)):
            start, stop = number * BLOCK, min(number * BLOCK + BLOCK, parameters.size)
            w, g, sums = parameters[start:stop], gradient[start:stop], accumulator[start:stop]
            if small_matter and below(w, g, sums, shrink):
                adagrad_any(w, g, sums, step, floor, shrink, True)
                continue
            high = np.uint32(0)
            # What is kept as a root stays as it is here, and its parameter, too.  All this hides behind root and
            # division.
            for i in range(w.size):
                slope = g[i] + shrink * w[i] if decays else g[i]
                before, total = sums[i], sums[i] + slope * slope
                divisor = max(np.sqrt(total) + floor, least)
                divisor = divisor if before >= zero else infinite
                total = total if before >= zero else before
                bits = np.float32(total).view(np.uint32)
                high = np.uint32(high | bits | np.uint32(bits + _TO_SIGN))
                sums[i] = total
                w[i] -= step * slope / divisor
            if single and high >= _SIGN:
                adagrad_any(w, g, sums, step, floor, shrink, False)

    return adagrad


@kernel
def _square(kept: float) -> float:
    root = -kept * FOLD if kept < -1 else -kept / FOLD
    return root * root


adagrad, adagrad_with_decay = _adagrad(False), _adagrad(True)


@exact_parallel_kernel
def add(target: np.ndarray, source: np.ndarray) -> None:
    """Accrue: ``target += source``."""
    for i in prange(target.size):
        target[i] += source[i]


@exact_parallel_kernel
def scale(vector: np.ndarray, factor: float) -> None:
    """Scale in place: ``vector *= factor``."""
    times = vector.dtype.type(factor)
    for i in prange(vector.size):
        vector[i] *= times


@exact_parallel_kernel
def compensate(
    out: np.ndarray, gradient: np.ndarray, parameters: np.ndarray, fetched: np.ndarray, factor: float
) -> None:
    """Compensate a gradient for its delay: ``out = g + factor * g * (g * (parameters - fetched))``.

    Parameters
    ----------
    out, gradient, parameters, fetched : (n,) arrays
        The result; the gradient g; the present parameters, and those that the gradient was computed at.
    factor : float
        That of the second term.

    Notes
    -----
    Where the parameters have not changed, or the result is larger than the dtype can hold, it is the gradient.
    """
    times, infinite = parameters.dtype.type(factor), parameters.dtype.type(np.inf)
    for i in prange(out.size):
        g, moved = gradient[i], parameters[i] - fetched[i]
        found = g + times * (g * (g * moved))
        out[i] = found if moved != 0 and abs(found) < infinite else g


@exact_parallel_kernel
def compensate_adaptively(
    out: np.ndarray,
    gradient: np.ndarray,
    parameters: np.ndarray,
    fetched: np.ndarray,
    mean_square: np.ndarray,
    factor: float,
    beta: float,
) -> None:
    """Compensate a gradient for its delay, by a factor that is divided by the gradients' root mean square.

    ``s = beta * s + (1 - beta) * g * g;  out = g + factor * g * (g / sqrt(s + 1e-7) * (parameters - fetched))``

    Parameters
    ----------
    out, gradient, parameters, fetched : (n,) arrays
        As for :func:`compensate`.
    mean_square : (n,) array
        The running mean s, which is updated first.
    factor, beta : float
        That of the second term, and what stays of s in each update.
    """
    kind = parameters.dtype.type
    times, infinite, floor = kind(factor), kind(np.inf), kind(_FLOOR)
    stays, comes = kind(beta), kind(1 - beta)
    for i in prange(out.size):
        g, moved = gradient[i], parameters[i] - fetched[i]
        square = stays * mean_square[i] + comes * (g * g)
        mean_square[i] = square
        found = g + times * (g * (g / np.sqrt(square + floor) * moved))
        out[i] = found if moved != 0 and abs(found) < infinite else g


def sum_of_squares(vector: np.ndarray) -> float:
    """Return the sum of the squares of a `vector`, in float64; blocks are added in their order."""
    return float(np.add.accumulate(_squares(vector))[-1]) if vector.size else 0.0


@exact_parallel_kernel
def _squares(vector: np.ndarray) -> np.ndarray:
    """Return the sum of the squares of each block."""
    sums = np.zeros(-(-vector.size // BLOCK))
    for number in prange(len(sums)):
        sums[number] = _square_sum(vector[number * BLOCK : min(number * BLOCK + BLOCK, vector.size)])
    return sums


@fast_kernel
def _square_sum(block: np.ndarray) -> float:
    total = 0.0
    for i in range(block.size):
        total += np.float64(block[i]) * np.float64(block[i])
    return total
