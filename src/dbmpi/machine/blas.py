"""How fast NumPy multiplies here, and by which of OpenBLAS's kernels: each question in a process of its own.

OpenBLAS chooses its kernels when it is loaded, and one that the processor cannot run ends the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbmpi.machine import processes

VARIABLE = "OPENBLAS_CORETYPE"
"""Environment variable that selects OpenBLAS's kernels instead of its own choice."""
_SECONDS = 30.0


def probe(kernel: str, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Run :mod:`dbmpi.machine.openblas`, in one thread; return None if that fails.

    Parameters
    ----------
    kernel
        Value of ``OPENBLAS_CORETYPE``; empty for OpenBLAS's own choice.
    environment
        Environment variables otherwise.

    Returns
    -------
    dict or None
        ``numpy``: its version; ``core``: the kernels, empty if it is not OpenBLAS; ``gflops``: 1e9 operations a second.
    """
    changed = dict(environment) | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    changed.pop(VARIABLE, None)
    if kernel:
        changed[VARIABLE] = kernel
    program = Path(__file__).with_name("openblas.py")
    done = processes.ask([sys.executable, "-P", str(program)], changed, seconds=_SECONDS)
    try:
        answer = json.loads(done.stdout) if done and done.returncode == 0 else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and {"numpy", "core", "gflops"} <= answer.keys() else None
