"""The copies of OpenBLAS that this process has loaded, asked and set by their own functions.

The standard library alone, and nothing of dbmpi: :mod:`dbmpi.machine.blas_probe` takes it as a file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

_MAPS = "/proc/self/maps"


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
        """Let products use so many threads from now on."""
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
    return list(_find())


def _find() -> Iterator[Library]:
    try:
        with open(_MAPS, encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line and "blas" in line}
    except OSError:
        return
    for path in sorted(paths):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if function(library, "get_corename") is not None:
            yield Library(path, library)


def function(library: ctypes.CDLL, name: str) -> ctypes._NamedFuncPointer | None:
    """Return one of OpenBLAS's own functions; builds for 64-bit integers and SciPy's wheels decorate the names."""
    for decorated in (f"scipy_openblas_{name}64_", f"scipy_openblas_{name}", f"openblas_{name}64_", f"openblas_{name}"):
        found: ctypes._NamedFuncPointer | None = getattr(library, decorated, None)
        if found is not None:
            return found
    return None
