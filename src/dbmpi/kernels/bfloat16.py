"""Products of bfloat16 matrices with sums in float32, and the rounding to bfloat16.

============= ================================================================================================
`amx`         tiles of Intel's processors since Sapphire Rapids, where the kernel grants a process their data
`avx512_bf16` vectors of pairs, of AMD's since Zen 4
`float32`     products of float32, of numbers that are rounded: the same results, but no speed
============= ================================================================================================

A bfloat16 number is the upper half of a float32: its sign, its 8 bits of exponent, and 7 of its bits of mantissa.
Arrays of them are arrays of uint16 here, as NumPy has no such type.
"""

from __future__ import annotations

import os
import threading
from functools import cache

import numpy as np
from numba import prange

from dbmpi.errors import UserError
from dbmpi.kernels import matmul, pairs, peaks
from dbmpi.kernels.compile import exact_parallel_kernel, inlined
from dbmpi.kernels.llvm.pairs import SIDE, stream_rounded
from dbmpi.kernels.llvm.writer import FEATURES
from dbmpi.kernels.memory import CACHE_LINE
from dbmpi.machine import tile_data

BFLOAT16 = np.dtype(np.uint16)
"""The dtype of the arrays that hold bfloat16 numbers."""
ENGINES = ("float32", "avx512_bf16", "amx")
"""What can multiply, from the slowest to the fastest."""
VARIABLE = "DBMPI_BFLOAT16"
_LINE = SIDE
"""Numbers of a cache line."""
_PIECE = 1024
"""Lines that a thread rounds past the caches at a time."""
_NEEDED = {"float32": (), "avx512_bf16": ("avx512f", "avx512bf16"), "amx": ("avx512f", "amx-tile", "amx-bf16")}
"""Features of the processor that each needs, as the compiler calls them."""
_CLEARLY_FASTER = 1.2
"""How much faster than those of float32 vectors of bfloat16 must be: they are twice as fast, or half."""
_NAMES = {"avx512_bf16": "AVX512-BF16", "amx": "AMX"}


def rounded(values: np.ndarray, out: np.ndarray, far: bool = False) -> None:
    """Round float32 to bfloat16: to the nearest, to even between two; NaN stays NaN.

    Parameters
    ----------
    values : float32 array
        C-contiguous; another one is copied first.
    out : uint16 array
        C-contiguous, of the same shape.
    far : bool
        Whether it will not be read soon, and is better written past the caches.
    """
    (_round_far if far else _round)(_flat(np.ascontiguousarray(values)), _flat(out))


def widened(values: np.ndarray, out: np.ndarray) -> None:
    """Write bfloat16 numbers as float32, which holds each of them exactly.

    Parameters
    ----------
    values : uint16 array
        C-contiguous; another one is copied first.
    out : float32 array
        C-contiguous, of the same shape.
    """
    _widen(_flat(np.ascontiguousarray(values)), _flat(out).view(np.uint32))


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
    """Write ``a @ b`` into `out`, or add it to what is there.

    Parameters
    ----------
    a, b : (m, k) and (k, n) uint16 arrays
        bfloat16 numbers; fastest where C- or F-contiguous (a transposed view is).
    out : (m, n) float32 array
        Fastest where C-contiguous; must not overlap the others.  Sums are float32.
    add : bool
        Add to `out`, instead of replacing it.

    Raises
    ------
    ValueError
        If the shapes do not fit, or an array is of another type.
    """
    if a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"shapes {a.shape} @ {b.shape} do not give the shape {out.shape} of the output")
    if not (a.dtype == b.dtype == BFLOAT16 and out.dtype == np.float32):
        raise ValueError(f"given {a.dtype} @ {b.dtype} into {out.dtype}, expected uint16 @ uint16 into float32")
    contiguous = out.flags.c_contiguous and all(x.flags.c_contiguous or x.flags.f_contiguous for x in (a, b))
    if engine() == "float32" or not contiguous or 0 in (*a.shape, *out.shape):
        matmul.product(_wide(a), _wide(b), out, add)
    else:
        _paired()(a, b, out, add)


def engine() -> str:
    """Return which of `ENGINES` multiplies in this process; by ``float32`` bfloat16 brings no speed.

    The environment variable ``DBMPI_BFLOAT16`` names the fastest that may; otherwise, it is the fastest there is.

    Raises
    ------
    UserError
        If there is no engine of that name.
    """
    return _chosen()[0]


def reason() -> str:
    """Return why it is not a faster one; empty if it is the fastest."""
    return "; ".join(_chosen()[1])


def usable(name: str) -> bool:
    """Say whether the engine `name` can multiply in this process, fast or not."""
    return not _missing(name)


def _missing(name: str) -> str:
    """Return why an engine cannot multiply in this process; empty if it can."""
    if not all(f"+{one}" in FEATURES for one in _NEEDED[name]):
        return f"the processor has no {_NAMES[name]}"
    return tile_data.refusal() if name == "amx" else ""


def peak() -> float:
    """Measure the most operations a second that one core does on bfloat16 numbers, by this engine.

    Raises
    ------
    ValueError
        If the engine is that of float32, which has no such peak.
    """
    if engine() == "float32":
        raise ValueError(f"no engine of this processor multiplies bfloat16: {reason()}")
    return peaks.pairs_peak(tiles=engine() == "amx")


@cache
def _chosen() -> tuple[str, list[str]]:
    """Return the engine, and why each that is faster is none."""
    named, missing = os.environ.get(VARIABLE, "").strip(), list[str]()
    most = named or ENGINES[-1]
    if most not in ENGINES:
        raise UserError(f"{VARIABLE}={most}: there is no such engine; known are {', '.join(ENGINES)}")
    for name in reversed(ENGINES):
        if ENGINES.index(name) > ENGINES.index(most):
            why = f"{VARIABLE}={most} leaves {name} out"
        else:
            why = _missing(name) or (_slowness() if name == "avx512_bf16" != named else "")
        if not why:
            return name, missing
        missing.append(why)
    raise AssertionError("float32 needs nothing")


def _slowness() -> str:
    """Return why vectors of pairs are no use; empty if they are: of some processors they are slower than float32."""
    half, single = peaks.pairs_peak(tiles=False), peaks.multiply_add_peak()
    if half > _CLEARLY_FASTER * single:
        return ""
    return f"AVX512-BF16 is no faster than float32 here ({half / 1e9:.0f} of {single / 1e9:.0f} GFLOP/s)"


_of_this_thread = threading.local()


def _paired() -> pairs.PairedProduct:
    if not hasattr(_of_this_thread, "product"):
        _of_this_thread.product = pairs.PairedProduct(tiles=engine() == "amx")
    found: pairs.PairedProduct = _of_this_thread.product
    return found


def _wide(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix as float32, in the order in memory that it has; row after row if it has gaps."""
    if matrix.flags.f_contiguous and not matrix.flags.c_contiguous:
        return _wide(matrix.T).T
    wide = np.empty(matrix.shape, np.float32)
    widened(matrix, wide)
    return wide


def _flat(array: np.ndarray) -> np.ndarray:
    """Return an array as one axis; the same memory."""
    if not array.flags.c_contiguous:
        raise ValueError(f"given an array {array.shape} with strides {array.strides}, expected a C-contiguous one")
    return array.reshape(-1)


@exact_parallel_kernel
def _round(values: np.ndarray, out: np.ndarray) -> None:
    bits = values.view(np.uint32)
    for i in prange(values.size):
        out[i] = _nearest(values[i], bits[i])


@exact_parallel_kernel
def _round_far(values: np.ndarray, out: np.ndarray) -> None:
    bits = values.view(np.uint32)
    unaligned = min(values.size, -out.ctypes.data % CACHE_LINE // out.itemsize)
    lines = (values.size - unaligned) // _LINE
    for i in range(unaligned):
        out[i] = _nearest(values[i], bits[i])
    for piece in prange((lines + _PIECE - 1) // _PIECE):
        first, last = piece * _PIECE, min(lines, (piece + 1) * _PIECE)
        stream_rounded(values, unaligned + first * _LINE, (last - first) * _LINE, out)
    for i in range(unaligned + lines * _LINE, values.size):
        out[i] = _nearest(values[i], bits[i])


@inlined
def _nearest(value: np.float32, bits: np.uint32) -> np.uint16:
    """Return the bits of the bfloat16 number that is nearest to a value, which is given with its bits."""
    half, one, width = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    # Numba computes with 64 bits, at half the speed, unless it is told at every step that 32 are enough.
    rounded_up = np.uint32(bits + half + np.uint32(np.uint32(bits >> width) & one))
    if np.isnan(value):
        rounded_up = np.uint32(bits | np.uint32(0x400000))
    return np.uint16(np.uint32(rounded_up >> width))


@exact_parallel_kernel
def _widen(values: np.ndarray, bits: np.ndarray) -> None:
    for i in prange(values.size):
        bits[i] = np.uint32(np.uint32(values[i]) << np.uint32(16))
