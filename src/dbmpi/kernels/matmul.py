"""Matrix products, by the provider that is fastest on this processor.

========= ==================================================================================================
`tiles`   our own (:mod:`dbmpi.kernels.tiles`), compiled for this processor; large products only
`numpy`   NumPy's BLAS; always there, and what every product goes to that the others do not take
`onednn`  Intel's oneDNN, if a wheel of it (``pip install onednn-cpu-gomp``) is installed; float32 only
========= ==================================================================================================

The environment variable ``DBMPI_MATMUL`` names one of them, or ``auto``, the default: then the first large product
times all that there are on the three products of a layer.  `tiles` is taken unless another one is clearly faster, so
that all ranks of a machine, and a run that is repeated, choose alike.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np

from dbmpi.errors import UserError
from dbmpi.kernels.compile import THREADS
from dbmpi.kernels.memory import aligned_empty
from dbmpi.kernels.tiles import TiledProduct, tile_shape

Product = Callable[[np.ndarray, np.ndarray, np.ndarray, bool], object]

VARIABLE = "DBMPI_MATMUL"
PROVIDERS = ("tiles", "numpy", "onednn")
LARGE = 10_000_000
"""Multiplications from which a product is worth more than NumPy's short way into BLAS."""

_CLEARLY_FASTER = 0.95


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
    """Write ``a @ b`` into `out`, or add it to what is there.

    Parameters
    ----------
    a, b : (m, k) and (k, n) arrays
        float32 or float64; fastest where C- or F-contiguous (a transposed view is).
    out : (m, n) array
        C-contiguous, of the same dtype; must not overlap the others.
    add : bool
        Add to `out`, instead of replacing it.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    if a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"shapes {a.shape} @ {b.shape} do not give the shape {out.shape} of the output")
    compute = _numpy
    if out.size * b.shape[0] >= LARGE and _plain(a, b, out):
        name = provider()
        if name == "tiles" and tile_shape(out.shape[1], out.dtype) is not None:
            compute = _tiles()
        elif name == "onednn" and out.dtype == np.float32:
            compute = _onednn_product
    compute(a, b, out, add)


def available() -> tuple[str, ...]:
    """Return the names of the providers that can be used here."""
    return tuple(name for name in PROVIDERS if name != "onednn" or onednn_sgemm() is not None)


def provider() -> str:
    """Return the provider of large products; the first call chooses it, if ``DBMPI_MATMUL`` does not name it."""
    if _Choice.name is None:
        use(os.environ.get(VARIABLE, "").strip() or "auto")
    assert _Choice.name is not None
    return _Choice.name


def use(name: str) -> None:
    """Choose the provider by its name, or by measuring if it is ``auto``.

    Raises
    ------
    UserError
        If there is no such provider here.
    """
    if name == "auto":
        seconds = probe()
        default = seconds[PROVIDERS[0]]
        fastest = min(seconds, key=lambda one: seconds[one])
        name = fastest if seconds[fastest] < _CLEARLY_FASTER * default else PROVIDERS[0]
    elif name not in PROVIDERS:
        raise UserError(
            f"{VARIABLE}={name}: no such provider of matrix products; known are auto, {', '.join(PROVIDERS)}"
        )
    elif name not in available():
        raise UserError(
            f"{VARIABLE}={name}: oneDNN is not installed; pip install onednn-cpu-gomp, or use {PROVIDERS[0]}"
        )
    _Choice.name = name


def probe(repeats: int = 6) -> dict[str, float]:
    """Return the least seconds, of `repeats`, that each provider takes for a layer's three float32 products."""
    units, inputs, samples = 2048, 1024, 128
    weights, activations, gradient = (
        aligned_empty(shape) for shape in ((units, inputs), (inputs, samples), (units, samples))
    )
    for array in (weights, activations, gradient):
        array.fill(0.5)
    outputs, input_gradient, weight_gradient = (np.empty_like(x) for x in (gradient, activations, weights))

    def three(compute: Product) -> None:
        compute(weights, activations, outputs, False)
        compute(weights.T, gradient, input_gradient, False)
        compute(gradient, activations.T, weight_gradient, False)

    compute: dict[str, Product] = {"tiles": _tiles(), "numpy": _numpy, "onednn": _onednn_product}
    # Alone, by the processor's time: it does not run while others have the core.
    clock = time.thread_time if THREADS == 1 else time.perf_counter
    seconds: dict[str, float] = {}
    for repeat in range(repeats + 1):  # in turn, as other processes may disturb
        for name in available():
            start = clock()
            three(compute[name])
            taken = clock() - start
            # The first round warms up (and compiles).
            seconds[name] = taken if repeat <= 1 else min(seconds[name], taken)
    return seconds


@cache
def onednn_sgemm() -> Callable[..., int] | None:
    """Return oneDNN's C function ``dnnl_sgemm``, or None where it is not installed or cannot be loaded."""
    for library in _onednn_libraries():
        try:
            function = ctypes.CDLL(library).dnnl_sgemm
        except (OSError, AttributeError):
            continue
        size, address, scalar = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
        function.argtypes = [
            *(ctypes.c_char, ctypes.c_char),  # transpose a, b
            *(size, size, size, scalar),  # m, n, k, alpha
            *(address, size, address, size),  # a, b
            *(scalar, address, size),  # beta, out
        ]
        function.restype = ctypes.c_int
        return function
    return None


class _Choice:
    """The provider chosen for this process."""

    name: str | None = None


_of_this_thread = threading.local()


def _tiles() -> TiledProduct:
    if not hasattr(_of_this_thread, "product"):
        _of_this_thread.product = TiledProduct()
    found: TiledProduct = _of_this_thread.product
    return found


def _plain(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> bool:
    """Say whether all arrays are contiguous and of one type that every provider knows."""
    return bool(
        a.dtype == b.dtype == out.dtype
        and out.dtype in (np.float32, np.float64)
        and out.flags.c_contiguous
        and all(x.flags.c_contiguous or x.flags.f_contiguous for x in (a, b))
    )


def _numpy(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # as in the other providers: the loss reports it, once
        if add:
            out += np.matmul(a, b)
        else:
            np.matmul(a, b, out=out)


def _onednn_product(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool) -> None:
    """Multiply contiguous float32 matrices by ``dnnl_sgemm``, which is row-major."""
    sgemm = onednn_sgemm()
    assert sgemm is not None
    (m, k), n = a.shape, b.shape[1]

    def described(x: np.ndarray) -> tuple[bytes, int]:
        return (b"N", x.shape[1]) if x.flags.c_contiguous else (b"T", x.shape[0])

    (transpose_a, a_length), (transpose_b, b_length) = described(a), described(b)
    sources = (a.ctypes.data, a_length, b.ctypes.data, b_length)
    status = sgemm(transpose_a, transpose_b, m, n, k, 1.0, *sources, float(add), out.ctypes.data, n)
    if status != 0:
        raise RuntimeError(f"oneDNN's sgemm failed with status {status} on shapes {a.shape} @ {b.shape}")


def _onednn_libraries() -> Iterator[str]:
    """Yield where installed wheels of oneDNN have put the library."""
    for name in ("onednn-cpu-gomp", "onednn-cpu-iomp", "onednn-cpu-tbb"):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in sorted(files, key=lambda file: len(file.name)):
            if file.name.startswith("libdnnl.so"):
                yield str(file.locate())
