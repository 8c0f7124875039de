"""The copies of OpenBLAS that this process has loaded, asked and set by their own functions.

As a program it prints one line of JSON, for :mod:`dbmpi.machine.blas`: which OpenBLAS kernel NumPy runs here, and how
fast it multiplies.
"""

from __future__ import annotations

import ctypes
import json
import time
from contextlib import suppress
from dataclasses import dataclass

_MAPS = "/proc/self/maps"
_UNITS, _SAMPLES = 2560, 128
"""A hidden layer of the paper's speech network on a mini-batch: the product that training consists of."""
_BUDGET_SECONDS = 0.12


@dataclass(frozen=True)
class Library:
    """One copy: NumPy and SciPy bring one each."""

    path: str
    library: ctypes.CDLL

    @property
    def core(self) -> str:
        """The kernels that it uses."""
        return self._text("get_corename")

    @property
    def configuration(self) -> str:
        """Its description of itself."""
        return self._text("get_config")

    @property
    def threads(self) -> int:
        """How many threads a product may use."""
        found = function(self.library, "get_num_threads")
        return 1 if found is None else int(found())

    def set_threads(self, number: int) -> None:
        """Let products use so many threads from now on.

        Parameters
        ----------
        number
            At least 1.
        """
        found = function(self.library, "set_num_threads")
        if found is not None:
            found(ctypes.c_int(number))

    def _text(self, name: str) -> str:
        found = function(self.library, name)
        if found is None:
            return ""
        found.restype = ctypes.c_char_p
        answer = found()
        return answer.decode("utf-8", "replace").strip() if isinstance(answer, bytes) else ""


def loaded() -> list[Library]:
    """Return the copies of OpenBLAS in this process, whatever their files are called; none where it cannot be seen."""
    found = []
    with suppress(OSError), open(_MAPS, encoding="utf-8", errors="replace") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line and "blas" in line}
        for path in sorted(paths):
            with suppress(OSError):
                library = ctypes.CDLL(path)
                if function(library, "get_corename") is not None:
                    found.append(Library(path, library))
    return found


def function(library: ctypes.CDLL, name: str) -> ctypes._NamedFuncPointer | None:
    """Return one of OpenBLAS's own functions; None if the library does not have it.

    Parameters
    ----------
    library
        Any library.
    name
        As in OpenBLAS, without ``openblas_``; builds for 64-bit integers and SciPy's wheels decorate the names.
    """
    for decorated in (f"scipy_openblas_{name}64_", f"scipy_openblas_{name}", f"openblas_{name}64_", f"openblas_{name}"):
        found: ctypes._NamedFuncPointer | None = getattr(library, decorated, None)
        if found is not None:
            return found
    return None


def _main() -> None:
    """Print ``numpy``, ``core`` and ``gflops``."""
    import numpy as np

    core = next((library.core for library in loaded()), "")
    print(json.dumps({"numpy": np.__version__, "core": core, "gflops": _gflops()}))


def _gflops() -> float:
    """Return the speed of the fastest of a few products, by the processor's time: 1e9 operations a second."""
    import numpy as np

    weights = np.full((_UNITS, _UNITS), 0.5, np.float32)
    inputs = np.full((_UNITS, _SAMPLES), 0.25, np.float32)
    out = np.empty((_UNITS, _SAMPLES), np.float32)
    np.matmul(weights, inputs, out=out)
    best, begin, count = float("inf"), time.thread_time(), 0
    while count < 3 or time.thread_time() - begin < _BUDGET_SECONDS:
        start = time.thread_time()
        np.matmul(weights, inputs, out=out)
        best = min(best, time.thread_time() - start)
        count += 1
    return 2e-9 * _UNITS * _UNITS * _SAMPLES / best


if __name__ == "__main__":
    _main()
