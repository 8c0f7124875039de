"""Matrix products, by the provider that is fastest on this processor.

========= ==================================================================================================
`tiles`   our own (:mod:`dbmpi.kernels.tiles`), compiled for this processor; large products only
`numpy`   NumPy's BLAS; always there, and what every product goes to that the other does not take
========= ==================================================================================================

A layer has three kinds of product, which differ in how their operands lie in memory: `KINDS`.  The environment
variable ``DBMPI_MATMUL`` names the provider of all of them, or is ``auto``, the default: then both are timed on each
kind, in the shapes of the network where they are known.  `tiles` is taken unless the other is clearly faster, so that
all ranks of a machine, and a run that is repeated, choose alike.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from dbmpi.errors import UserError
from dbmpi.kernels.compile import THREADS
from dbmpi.kernels.memory import aligned_empty
from dbmpi.kernels.tiles import TiledProduct, tile_shape

Product = Callable[[np.ndarray, np.ndarray, np.ndarray, bool], object]

VARIABLE = "DBMPI_MATMUL"
PROVIDERS = ("tiles", "numpy")
KINDS = ("forward", "by the transposed weights", "gradient of the weights")
"""``weights @ inputs``, ``weights.T @ gradient`` and ``gradient @ inputs.T``."""
LARGE = 10_000_000
"""Multiplications from which a product is worth more than NumPy's short way into BLAS."""

_CLEARLY_FASTER = 0.95
_PROBED = 400_000_000
"""Most multiplications of a product that is timed: of a larger layer a part is."""
_LAYER = 2048, 1024, 128
"""Units, inputs and samples that are timed where no layer is known."""


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
        kind = 1 if not a.flags.c_contiguous else 2 if not b.flags.c_contiguous else 0
        if providers()[kind] == "tiles" and tile_shape(out.shape[1], out.dtype) is not None:
            compute = _tiles()
    compute(a, b, out, add)


def providers(layer: tuple[int, int, int] = _LAYER) -> tuple[str, ...]:
    """Return the provider of each kind of large product; the first call chooses them.

    Parameters
    ----------
    layer : (int, int, int)
        Units, inputs and samples of the layer that is timed if ``DBMPI_MATMUL`` leaves the choice to measurements.

    Raises
    ------
    UserError
        If ``DBMPI_MATMUL`` names no provider.
    """
    if not _Choice.names:
        given = os.environ.get(VARIABLE, "").strip() or "auto"
        if given == "auto":
            use([_fastest(seconds) for seconds in probe(layer)])
        elif given in PROVIDERS:
            use([given] * len(KINDS))
        else:
            raise UserError(
                f"{VARIABLE}={given}: no such provider of matrix products; known are auto, {', '.join(PROVIDERS)}"
            )
    return _Choice.names


def use(names: Sequence[str]) -> None:
    """Let large products of each kind be computed by the providers `names`, each one of `PROVIDERS`."""
    _Choice.names = tuple(names)


def probe(layer: tuple[int, int, int] = _LAYER, repeats: int = 6) -> list[dict[str, float]]:
    """Return for each kind of product the least seconds, of `repeats`, that each provider takes in float32.

    Parameters
    ----------
    layer : (int, int, int)
        Units, inputs and samples of the layer; of too large a one, fewer are timed.
    repeats : int
        At least 1.
    """
    units, inputs, samples = layer
    sizes = [units, inputs, samples]
    while math.prod(sizes) > _PROBED:
        largest = sizes.index(max(sizes))
        sizes[largest] = -(-sizes[largest] // 2)
    units, inputs, samples = sizes
    weights, activations, gradient = (
        aligned_empty(shape) for shape in ((units, inputs), (inputs, samples), (units, samples))
    )
    for array in (weights, activations, gradient):
        array.fill(0.5)
    operands = (weights, activations), (weights.T, gradient), (gradient, activations.T)
    compute: dict[str, Product] = {"tiles": _tiles(), "numpy": _numpy}
    # Alone, by the processor's time: it does not run while others have the core.
    clock = time.thread_time if THREADS == 1 else time.perf_counter
    found: list[dict[str, float]] = []
    for a, b in operands:
        out = aligned_empty((a.shape[0], b.shape[1]))
        fitting = PROVIDERS if tile_shape(out.shape[1], out.dtype) is not None else PROVIDERS[1:]
        seconds = dict.fromkeys(fitting, float("inf"))
        for repeat in range(repeats + 1):  # in turn, as other processes may disturb
            for name in fitting:
                start = clock()
                compute[name](a, b, out, False)
                taken = clock() - start
                if repeat > 0:  # the first round warms up (and compiles)
                    seconds[name] = min(seconds[name], taken)
        found.append(seconds)
    return found


def _fastest(seconds: dict[str, float]) -> str:
    """Return the provider to take for products that take so long."""
    default = seconds.get(PROVIDERS[0], float("inf"))
    fastest = min(seconds, key=lambda one: seconds[one])
    return fastest if seconds[fastest] < _CLEARLY_FASTER * default else PROVIDERS[0]


class _Choice:
    """The providers chosen for this process, one a kind; none before they are."""

    names: tuple[str, ...] = ()


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
    with np.errstate(over="ignore", invalid="ignore"):  # as in our own: the loss reports it, once
        if add:
            out += np.matmul(a, b)
        else:
            np.matmul(a, b, out=out)
