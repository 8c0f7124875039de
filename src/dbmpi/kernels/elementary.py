"""Elementary functions that compile into the loops around them and vectorise.

A call of the C library's ``exp`` for every element would cost a tenth of a training step.  For float32 these functions
are a polynomial and some arithmetic on the exponent's bits, after Cephes (S. Moshier, "Methods and Programs for
Mathematical Functions", 1989): no branches, no table, errors of a few units in the last place.  For float64, which
only tests use, they call the C library.

NaN gives NaN; infinities give the limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from dbmpi.kernels.compile import Kernel, inlined

_LOG2_E = np.float32(math.log2(math.e))
_LN2_HIGH = np.float32(0.693145751953125)  # 16 bits, so that its product with a small integer is exact
_LN2_LOW = np.float32(math.log(2) - 0.693145751953125)
_ROUND = np.float32(3 << 22)  # adding it leaves the nearest integer in the lowest bits
_ROUND_BITS = np.int32(_ROUND.view(np.int32))
_BIAS = np.int32(127)
_MANTISSA = np.int32(23)
_ONE_BIT = np.int32(1)
_HIGHEST = np.float32(89)  # exp is infinite above it,
_LOWEST = np.float32(-104)  # and zero below it
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)
_TANH_BORDER = np.float32(0.625)


@inlined
def exp_single(x: Any) -> Any:
    """Return exp(x) of a float32, at most 1 unit in the last place off where the result is a normal number."""
    x = _HIGHEST if x > _HIGHEST else x
    x = _LOWEST if x < _LOWEST else x
    # x = n ln 2 + r, so that exp(x) = 2^n exp(r) with |r| <= ln 2 / 2
    rounded = np.float32(x * _LOG2_E + _ROUND)
    n = rounded.view(np.int32) - _ROUND_BITS
    whole = rounded - _ROUND
    r = x - whole * _LN2_HIGH - whole * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + _ONE
    # 2^n in two factors: one alone could not hold 2^128, nor the powers of subnormal results
    half = n >> _ONE_BIT
    low = np.int32((half + _BIAS) << _MANTISSA).view(np.float32)
    high = np.int32((n - half + _BIAS) << _MANTISSA).view(np.float32)
    return p * low * high


@inlined
def sigmoid_single(x: Any) -> Any:
    """Return 1 / (1 + exp(-x)) of a float32."""
    return _ONE / (_ONE + exp_single(-x))


@inlined
def tanh_single(x: Any) -> Any:
    """Return tanh(x) of a float32: an odd polynomial near zero, else by exp."""
    size = abs(x)
    s = x * x
    p = np.float32(-5.70498872745e-3)
    p = p * s + np.float32(2.06390887954e-2)
    p = p * s + np.float32(-5.37397155531e-2)
    p = p * s + np.float32(1.33314422036e-1)
    p = p * s + np.float32(-3.33332819422e-1)
    near = p * s * x + x
    far = _ONE - _TWO / (exp_single(size + size) + _ONE)
    far = -far if x < 0 else far
    return near if size < _TANH_BORDER else far


@inlined
def log1p_exp_single(x: Any) -> Any:
    """Return log(1 + exp(x)) of a float32 without overflow, also called softplus."""
    e = exp_single(-abs(x))
    # log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3
    s = e / (_TWO + e)
    q = s * s
    p = np.float32(2 / 13)
    p = p * q + np.float32(2 / 11)
    p = p * q + np.float32(2 / 9)
    p = p * q + np.float32(2 / 7)
    p = p * q + np.float32(2 / 5)
    p = p * q + np.float32(2 / 3)
    return p * q * s + _TWO * s + (x if x > 0 else np.float32(0))


@inlined
def _sigmoid_double(x: Any) -> Any:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    e = math.exp(x)
    return e / (1.0 + e)


@inlined
def _log1p_exp_double(x: Any) -> Any:
    return (x if x > 0 else 0.0) + math.log1p(math.exp(-abs(x)))


@inlined
def copy(target: np.ndarray, values: np.ndarray) -> None:
    """Set `target` (n,) to `values` (n,).

    Numba's ``target[:] = values`` does the same, but it takes as long as all else in a kernel to compile: it compares
    the shapes, and writes a message about those that differ.
    """
    for i in range(target.size):
        target[i] = values[i]


@inlined
def add(total: np.ndarray, values: np.ndarray) -> None:
    """Add values (n,) to `total` (n,)."""
    for i in range(total.size):
        total[i] += values[i]


def _elementary(single: Kernel[..., Any], double: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function of one number, in its type: `single` for float32, else `double`.

    Numba compiles one of the two in its place, by the type of the argument.
    """

    def function(x: Any) -> Any:
        chosen = single if isinstance(x, np.float32) else double
        return getattr(chosen, "py_func", chosen)(x)

    # Kernels that a factory makes of such functions are told apart by these names.
    function.__name__ = function.__qualname__ = single.py_func.__name__.removesuffix("_single")

    @overload(function, strict=False)
    def typed(x: Any) -> Any:
        chosen = single if x == types.float32 else double

        def call(x):  # type: ignore[no-untyped-def]
            return chosen(x)

        return call

    return function


exp = _elementary(exp_single, np.exp)
"""Return exp(x), in the type of `x`."""
sigmoid = _elementary(sigmoid_single, _sigmoid_double)
"""Return 1 / (1 + exp(-x)), in the type of `x`."""
tanh = _elementary(tanh_single, np.tanh)
"""Return tanh(x), in the type of `x`."""
log1p_exp = _elementary(log1p_exp_single, _log1p_exp_double)
"""Return log(1 + exp(x)), in the type of `x`."""
