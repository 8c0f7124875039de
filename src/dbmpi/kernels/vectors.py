"""Arithmetic of whole vectors, each in one pass over memory: what a batch method does on a shard.

Vectors are 1-D, contiguous, float32 or float64, and of one length.  Every element follows from the elements at the
same position alone, in IEEE double precision, rounded once to the target's dtype: the result is the same however the
vectors are cut, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import prange

from dbmpi.kernels.compile import exact_parallel_kernel, kernel
from dbmpi.kernels.llvm.streams import add_multiples

BLOCK = 1 << 14
"""Elements that a thread takes at a time, of every vector: their total stays in a cache."""
GROUP = 7
"""Vectors that are read at a time; the 2m + 1 vectors of L-BFGS fill three groups with m = 10, and two with m = 5."""


def addresses(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Return where the vectors lie in memory, as int64, for :mod:`dbmpi.kernels.llvm.streams`.

    A kernel that takes its vectors as arguments is compiled anew for every number of them; and a list of arrays costs
    more to pass than many a kernel takes to run.  The caller keeps the arrays alive, and is responsible for their types
    and lengths.
    """
    # (Several times as fast as `ctypes.data`, and an iteration with few parameters needs 50 addresses.)
    return np.array([vector.__array_interface__["data"][0] for vector in vectors], np.int64)


def combine(target: np.ndarray, coefficients: Sequence[float], sources: Sequence[np.ndarray]) -> float:
    """Set `target` to the sum of `coefficients` times `sources`, added in their order; `target` may be one of them.

    Returns
    -------
    float
        Largest magnitude of the result; not finite where an element is not.
    """
    if len(sources) == 1:
        largest = _scale(target, coefficients[0], sources[0])
    elif len(sources) == 2:
        largest = _combine_two(target, coefficients[0], sources[0], coefficients[1], sources[1])
    else:
        largest = _combine(target, *_groups(coefficients, sources))
    return float(largest.max(initial=0.0))


def largest_magnitude(vector: np.ndarray) -> float:
    """Return the largest magnitude of the elements of `vector`; NaN if one is NaN."""
    return float(_largest_magnitude(vector).max(initial=0.0))


@exact_parallel_kernel
def accrue(target: np.ndarray, factor: float, source: np.ndarray) -> None:
    """Set ``target = target + factor * source`` in the precision of the target, several times faster than `combine`."""
    share = target.dtype.type(factor)
    for i in prange(target.size):
        target[i] += share * source[i]


@exact_parallel_kernel
def multiply(left: np.ndarray, right: np.ndarray, target: np.ndarray) -> None:
    """Set ``target = left * right``, element by element."""
    for i in prange(target.size):
        target[i] = np.float64(left[i]) * np.float64(right[i])


@exact_parallel_kernel
def advance(point: np.ndarray, origin: np.ndarray, step: float, direction: np.ndarray) -> None:
    """Take a step and keep the old point: ``origin = point;  point = point + step * direction``.

    Parameters
    ----------
    point, origin, direction : (n,) arrays
        `origin` is overwritten.
    step : float
    """
    for i in prange(point.size):
        origin[i] = point[i]
        point[i] = np.float64(point[i]) + step * np.float64(direction[i])


# The kernels of OWL-QN, for a loss f(x) + strength * |x|_1: Andrew and Gao, "Scalable training of L1-regularized
# log-linear models", ICML 2007.


@exact_parallel_kernel
def pseudo_gradient(point: np.ndarray, gradient: np.ndarray, strength: float, target: np.ndarray) -> None:
    """Write the pseudo-gradient of the loss with its L1 term: equation (4) of Andrew and Gao.

    It is the one-sided derivative that descends most, and zero where the loss grows on both sides.

    Parameters
    ----------
    point, gradient : (n,) arrays
        x, and the gradient of f there.
    strength : float
        Factor of the L1 term.
    target : (n,) array
        Overwritten.
    """
    zero = 0.0
    for i in prange(point.size):
        x, g = point[i], np.float64(gradient[i])
        right, left = g + strength, g - strength
        at_zero = left if left > zero else (right if right < zero else zero)
        target[i] = left if x < 0 else (right if x > 0 else at_zero)


@exact_parallel_kernel
def align(direction: np.ndarray, gradient: np.ndarray) -> None:
    """Set elements of the direction to zero where they do not descend: equation (6), with ``-gradient`` as v."""
    for i in prange(direction.size):
        if not ((direction[i] > 0 and gradient[i] < 0) or (direction[i] < 0 and gradient[i] > 0)):
            direction[i] = 0


@exact_parallel_kernel
def project(point: np.ndarray, origin: np.ndarray, gradient: np.ndarray) -> None:
    """Set elements of the point to zero that have left the orthant of the search: the projection pi of section 3.2.

    The orthant is that of `origin`, and where `origin` is zero that into which ``-gradient``, minus the
    pseudo-gradient, points.
    """
    for i in prange(point.size):
        sign = origin[i] if origin[i] != 0 else -gradient[i]
        if not ((point[i] > 0 and sign > 0) or (point[i] < 0 and sign < 0)):
            point[i] = 0


@exact_parallel_kernel
def _scale(target: np.ndarray, factor: float, source: np.ndarray) -> np.ndarray:
    """Set ``target = factor * source``; return the largest magnitudes of the blocks, as all of these do."""
    largest = np.zeros(-(-target.size // BLOCK))
    for number in prange(len(largest)):
        start, stop = number * BLOCK, min(number * BLOCK + BLOCK, target.size)
        out, x = target[start:stop], source[start:stop]
        highest = np.int64(0)
        for i in range(out.size):
            out[i] = factor * np.float64(x[i])
            highest = max(highest, _magnitude_bits(out[i]))
        largest[number] = _from_bits(highest)
    return largest


@exact_parallel_kernel
def _combine_two(target: np.ndarray, a: float, left: np.ndarray, b: float, right: np.ndarray) -> np.ndarray:
    """Set ``target = a * left + b * right``."""
    largest = np.zeros(-(-target.size // BLOCK))
    for number in prange(len(largest)):
        start, stop = number * BLOCK, min(number * BLOCK + BLOCK, target.size)
        out, x, y = target[start:stop], left[start:stop], right[start:stop]
        highest = np.int64(0)
        for i in range(out.size):
            out[i] = a * np.float64(x[i]) + b * np.float64(y[i])
            highest = max(highest, _magnitude_bits(out[i]))
        largest[number] = _from_bits(highest)
    return largest


def _groups(coefficients: Sequence[float], sources: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the terms into groups of `GROUP` of one dtype, filled up with terms of coefficient 0.

    Returns
    -------
    (groups, GROUP) int64 array, (groups, GROUP) float64 array, (groups,) bool array
        Addresses, coefficients, and whether the vectors are float32.
    """
    groups: list[list[tuple[int, float]]] = []
    singles: list[bool] = []
    for address, coefficient, source in zip(addresses(sources).tolist(), coefficients, sources, strict=True):
        single = source.dtype == np.float32
        if not groups or singles[-1] != single or len(groups[-1]) == GROUP:
            groups.append([])
            singles.append(single)
        groups[-1].append((address, coefficient))
    filled = [group + [(group[-1][0], 0.0)] * (GROUP - len(group)) for group in groups]
    at = [[address for address, _ in group] for group in filled]
    factors = [[coefficient for _, coefficient in group] for group in filled]
    return np.array(at, np.int64), np.array(factors, np.float64), np.array(singles)


@exact_parallel_kernel
def _combine(target: np.ndarray, at: np.ndarray, factors: np.ndarray, singles: np.ndarray) -> np.ndarray:
    """Set the target to the sum of any number of vectors."""
    single, double = np.empty(0, np.float32), np.empty(0, np.float64)
    largest = np.zeros(-(-target.size // BLOCK))
    for number in prange(len(largest)):
        start = number * BLOCK
        out = target[start : min(start + BLOCK, target.size)]
        total = np.empty(out.size)
        highest = np.int64(0)
        for group in range(len(at)):
            if singles[group]:
                highest = _add_group(group, at, single, factors, start, total, out)
            else:
                highest = _add_group(group, at, double, factors, start, total, out)
        largest[number] = _from_bits(highest)
    return largest


@kernel
def _add_group(
    group: int, at: np.ndarray, like: np.ndarray, factors: np.ndarray, start: int, total: np.ndarray, out: np.ndarray
) -> np.int64:
    """Add a group to the total; the last one goes to `out`, and returns the bits of the largest magnitude there."""
    first, last = group * GROUP, group == len(at) - 1
    highest: np.int64
    if group == 0 and last:
        highest = add_multiples(GROUP, True, True, at, first, like, factors, start, total, out)
    elif group == 0:
        highest = add_multiples(GROUP, True, False, at, first, like, factors, start, total, out)
    elif last:
        highest = add_multiples(GROUP, False, True, at, first, like, factors, start, total, out)
    else:
        highest = add_multiples(GROUP, False, False, at, first, like, factors, start, total, out)
    return highest


@exact_parallel_kernel
def _largest_magnitude(vector: np.ndarray) -> np.ndarray:
    largest = np.zeros(-(-vector.size // BLOCK))
    for number in prange(len(largest)):
        part = vector[number * BLOCK : (number + 1) * BLOCK]
        highest = np.int64(0)
        for i in range(part.size):
            highest = max(highest, _magnitude_bits(part[i]))
        largest[number] = _from_bits(highest)
    return largest


@kernel
def _magnitude_bits(number: float) -> np.int64:
    """Return the bits of a magnitude in double precision: integers in the order of the numbers, NaN on top."""
    return np.float64(number).view(np.int64) & 0x7FFFFFFFFFFFFFFF


@kernel
def _from_bits(bits: np.int64) -> float:
    return np.int64(bits).view(np.float64)
