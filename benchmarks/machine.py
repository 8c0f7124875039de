"""What a benchmark was run on: processor, caches, features, versions, and the peaks that its cores reach now.

Run as a program, it prints the peaks of one core as JSON.  Only the standard library is imported before that, as in
:mod:`common`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

FEATURES = ("fma", "avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
"""Flags in ``/proc/cpuinfo`` of which targets, and what dbmpi compiles, depend."""
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
PEAK_SECONDS = 120.0
"""In which the peaks must be measured; the first time on a machine, that compiles."""


def describe() -> dict[str, Any]:
    """Describe the machine and the versions in use."""
    names = (line.partition(":")[2].strip() for line in lines("/proc/cpuinfo") if line.startswith("model name"))
    memory = next((line.split()[1] for line in lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    versions = {}
    for name in ("numpy", "numba", "llvmlite", "scipy", "mpi4py"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": next(names, platform.machine()),
        "caches": caches(),
        "features": [flag for flag in FEATURES if has_feature(flag)],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / 2**20, 1),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def has_feature(flag: str) -> bool:
    """Say whether the processor has a feature, by its flag in ``/proc/cpuinfo``."""
    return any(flag in line.split() for line in lines("/proc/cpuinfo") if line.startswith("flags"))


def caches() -> dict[str, str]:
    """Return the size of each cache that the first core uses for data, as the system says: ``{"L1": "48K"}``."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        kind, level, size = ("".join(lines(str(index / name))) for name in ("type", "level", "size"))
        if kind != "Instruction" and size:
            found[f"L{level}"] = size
    return found


def peaks() -> dict[str, float]:
    """Return what one core reaches now, in GFLOP/s: float32, and what it has for bfloat16.

    They are measured in a process of their own, with one thread and by its processor time.  Empty where that does not
    work, as without the package.
    """
    command = [sys.executable, str(Path(__file__).resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PEAK_SECONDS, check=True)
        return dict(json.loads(done.stdout))
    except (subprocess.SubprocessError, ValueError):
        return {}


def summary(machine: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a table that show what `describe` has found, and the peaks where it has them."""
    rows = [
        ["processor", f"{machine['processor']}, {machine['cores']} cores"],
        ["caches", ", ".join(f"{name} {size}" for name, size in machine["caches"].items()) or "unknown"],
        ["features", " ".join(machine["features"]) or "none of those that matter"],
    ]
    peaks_of = machine.get("peaks", {})
    return [*rows, *([f"peak of {name}, one core", f"{gigaflops:.0f} GFLOP/s"] for name, gigaflops in peaks_of.items())]


def lines(path: str) -> list[str]:
    """Return the lines of a file; none if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _measured() -> dict[str, float]:
    """Return the best of some measurements of each peak: what disturbs a core only makes it slower."""
    from dbmpi.kernels import bfloat16
    from dbmpi.kernels.peaks import multiply_add_peak, pairs_peak

    kinds = {"float32 multiply-add": multiply_add_peak}
    if bfloat16.usable("avx512_bf16"):
        kinds["bfloat16 dot"] = lambda: pairs_peak(tiles=False)
    if bfloat16.usable("amx"):
        kinds["AMX tiles of bfloat16"] = lambda: pairs_peak(tiles=True)
    return {name: max(measure() for _ in range(5)) / 1e9 for name, measure in kinds.items()}


if __name__ == "__main__":
    print(json.dumps(_measured()))
