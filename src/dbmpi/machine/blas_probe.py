"""A program of its own: say which OpenBLAS kernel NumPy runs here, and how fast it multiplies.

Run by :mod:`dbmpi.machine.blas` in a process of its own, since a kernel is chosen when the library is loaded, and one
that the processor cannot run ends the process.  It imports nothing of dbmpi, which would choose a kernel, and prints
one line of JSON.  Its arguments are names of kernels that have been measured already.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path

import numpy as np

UNITS, SAMPLES = 2560, 128
"""A hidden layer of the paper's speech network on a mini-batch: the product that training consists of."""

BUDGET_SECONDS = 0.12


def main() -> None:
    """Print what was found: ``numpy``, ``openblas``, ``core``, ``configuration``, ``gflops``."""
    found: dict[str, object] = {"numpy": np.__version__, "openblas": False}
    library = next(iter(runpy.run_path(str(Path(__file__).with_name("openblas.py")))["loaded"]()), None)
    if library is not None:
        found |= {"openblas": True, "core": library.core, "configuration": library.configuration, "gflops": None}
    if found.get("core") not in sys.argv[1:]:
        found["gflops"] = _gflops()
    print(json.dumps(found))


def _gflops() -> float:
    """Return the speed of the fastest of a few products, in 1e9 floating-point operations a second."""
    weights = np.full((UNITS, UNITS), 0.5, np.float32)
    inputs = np.full((UNITS, SAMPLES), 0.25, np.float32)
    out = np.empty((UNITS, SAMPLES), np.float32)
    np.matmul(weights, inputs, out=out)
    best, begin, count = float("inf"), time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < BUDGET_SECONDS:
        start = time.perf_counter()
        np.matmul(weights, inputs, out=out)
        best = min(best, time.perf_counter() - start)
        count += 1
    return 2e-9 * UNITS * UNITS * SAMPLES / best


if __name__ == "__main__":
    main()
