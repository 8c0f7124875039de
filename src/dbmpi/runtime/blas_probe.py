"""A program of its own: say which OpenBLAS kernel NumPy runs here, and how fast it multiplies.

Run by :mod:`dbmpi.runtime.blas` in a process of its own, since a kernel is chosen when the library is loaded, and one
that the processor cannot run ends the process.  It imports nothing of dbmpi, and prints one line of JSON.  Its
arguments are names of kernels that have been measured already.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import numpy as np

UNITS, SAMPLES = 2560, 128
"""A hidden layer of the paper's speech network on a mini-batch: the product that training consists of."""

BUDGET_SECONDS = 0.12


def main() -> None:
    """Print what was found: ``numpy``, ``openblas``, ``core``, ``configuration``, ``gflops``."""
    found: dict[str, object] = {"numpy": np.__version__, "openblas": False}
    library = _openblas()
    if library is not None:
        core = _text(library, "get_corename")
        found |= {"openblas": True, "core": core, "configuration": _text(library, "get_config"), "gflops": None}
        if core not in sys.argv[1:]:
            found["gflops"] = _gflops()
    print(json.dumps(found))


def _openblas() -> ctypes.CDLL | None:
    """Return the OpenBLAS that importing NumPy has loaded, whatever its file is called."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line and "blas" in line}
    for path in sorted(paths):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if _function(library, "get_corename") is not None:
            return library
    return None


def _function(library: ctypes.CDLL, name: str) -> ctypes._NamedFuncPointer | None:
    """Return one of OpenBLAS's own functions; builds for 64-bit integers and SciPy's wheels decorate the names."""
    for decorated in (f"scipy_openblas_{name}64_", f"scipy_openblas_{name}", f"openblas_{name}64_", f"openblas_{name}"):
        function: ctypes._NamedFuncPointer | None = getattr(library, decorated, None)
        if function is not None:
            function.restype = ctypes.c_char_p
            return function
    return None


def _text(library: ctypes.CDLL, name: str) -> str:
    function = _function(library, name)
    answer = function() if function is not None else None
    return answer.decode("utf-8", "replace").strip() if isinstance(answer, bytes) else ""


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
