"""Which of OpenBLAS's kernels multiplies matrices, settled before NumPy is loaded.

OpenBLAS contains kernels for many processors and chooses by the model that it knows.  A processor newer than the
library, or one that a virtual machine disguises, may get kernels that are half as fast as others that it can run.  Yet
a kernel for features that the processor lacks ends the process with the first product.  So the kernels that the
processor has the features for are timed, each in a process of its own, once on a node; the answer is kept in a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dbmpi.machine import kernel_cache, openblas, processes, threads

VARIABLE = "OPENBLAS_CORETYPE"
"""Environment variable that selects OpenBLAS's kernels; read when the library is loaded."""

_AVX512 = frozenset({"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"})
KERNELS: Mapping[str, frozenset[str]] = {
    "HASWELL": frozenset({"avx2", "fma"}),
    "ZEN": frozenset({"avx2", "fma"}),
    "SKYLAKEX": _AVX512 | {"avx2", "fma"},
    "COOPERLAKE": _AVX512 | {"avx2", "fma", "avx512_bf16"},
    "SAPPHIRERAPIDS": _AVX512 | {"avx2", "fma", "avx512_bf16", "amx_tile", "amx_bf16"},
}
"""OpenBLAS's x86 kernels of interest, each with the flags of ``/proc/cpuinfo`` that it requires."""

GAIN = 1.05
"""A kernel is taken only if it is faster than OpenBLAS's own choice by this factor; less may be noise."""

_SLOW = 4.0
"""1e9 operations per second and core: plain loops are slower, and any BLAS made for the processor is faster."""

_PROBE_SECONDS = 30.0
_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Measurement:
    """The result of probing on this node."""

    openblas: bool
    """Whether NumPy multiplies by OpenBLAS at all."""
    own_core: str
    """The kernels that OpenBLAS chooses by itself."""
    own_gflops: float
    """Their speed in one thread, in 1e9 operations a second."""
    kernel: str | None
    """The name to set in ``OPENBLAS_CORETYPE``, or None where nothing is faster than OpenBLAS's own choice."""
    gflops: float
    """Speed of the kernels to be used."""
    numpy: str
    """NumPy's version."""
    configuration: str
    """OpenBLAS's description of itself."""

    @property
    def line(self) -> str:
        """The result, for people."""
        if not self.openblas:
            return f"BLAS: NumPy does not use OpenBLAS; left alone, {self.own_gflops:.0f} GFLOP/s a core"
        if self.kernel is None:
            return f"BLAS: OpenBLAS's own choice {self.own_core}, {self.own_gflops:.0f} GFLOP/s a core; none is faster"
        faster = self.gflops / self.own_gflops
        return (
            f"BLAS: OpenBLAS kernel {self.kernel}, {self.gflops:.0f} GFLOP/s a core, "
            f"{faster:.1f} x as fast as its own choice {self.own_core}"
        )


@dataclass(frozen=True)
class BlasChoice:
    """What was decided about BLAS."""

    kernel: str | None
    """The value of ``OPENBLAS_CORETYPE``, or None where OpenBLAS chooses."""
    line: str
    """For people, on one line."""
    losses: tuple[str, ...] = ()
    """What is slower than it could be, each on one line."""

    def __str__(self) -> str:
        return self.line


_prepared: BlasChoice | None = None


def prepare() -> BlasChoice:
    """Choose the fastest kernel that this processor can run, by setting ``OPENBLAS_CORETYPE`` in this process.

    The user's own setting stays; nothing can be done where NumPy is loaded already, or does not use OpenBLAS, or on
    other processors than x86.  The first process on a node probes for about a second, the others wait for its answer.
    Starts processes; call it before MPI starts.
    """
    global _prepared  # noqa: PLW0603 - the environment, too, belongs to the whole process
    if _prepared is None:
        theirs = threads.without_prepared(os.environ)
        _prepared = decide(theirs)
        if _prepared.kernel is not None and not theirs.get(VARIABLE):
            threads.put({VARIABLE: _prepared.kernel})
    return _prepared


def runnable(flags: frozenset[str]) -> tuple[str, ...]:
    """Return the kernels that a processor with these flags (as in ``/proc/cpuinfo``) can run."""
    return tuple(name for name, needed in KERNELS.items() if needed <= flags)


def processor_flags() -> frozenset[str]:
    """Return the features of this machine's processor; none if it is not x86 or the system does not list them."""
    for line in kernel_cache.cpu_description().splitlines():
        if line.startswith("flags:"):
            return frozenset(line.removeprefix("flags:").split())
    return frozenset()


def measure(flags: frozenset[str], environment: Mapping[str, str]) -> Measurement | None:
    """Time OpenBLAS's own choice and every kernel that the processor can run; None if not even the first works.

    Takes about half a second a kernel.  A kernel whose process fails is not considered.

    Parameters
    ----------
    flags
        Features of the processor, as in ``/proc/cpuinfo``.
    environment
        Environment variables for the processes that measure.
    """
    own = probe(None, environment)
    if own is None:
        return None
    core, gflops = str(own.get("core", "")), float(own.get("gflops") or 0.0)
    common = {"numpy": str(own["numpy"]), "configuration": str(own.get("configuration", ""))}
    if not own["openblas"] or not gflops:
        return Measurement(False, core, gflops, None, gflops, **common)
    known = [core]
    best, best_gflops = None, gflops
    for kernel in runnable(flags):
        found = probe(kernel, environment, known) if kernel.lower() not in map(str.lower, known) else None
        if found is None or not found.get("gflops"):
            continue  # it failed, or it is one of those known by another name
        known.append(str(found["core"]))
        if float(found["gflops"]) > best_gflops:
            best, best_gflops = kernel, float(found["gflops"])
    if best is not None:
        # On a busy machine the first measurement of the own choice may have been disturbed: it gets a second chance.
        again = probe(None, environment)
        gflops = max(gflops, float((again or {}).get("gflops") or 0.0))
        if best_gflops <= GAIN * gflops:
            best, best_gflops = None, gflops
    return Measurement(True, core, gflops, best, best_gflops, **common)


def probe(kernel: str | None, environment: Mapping[str, str], known: Sequence[str] = ()) -> dict[str, Any] | None:
    """Run :mod:`dbmpi.machine.openblas` under a kernel (None: OpenBLAS's own choice); None if it fails.

    Parameters
    ----------
    kernel
        Value of ``OPENBLAS_CORETYPE``.
    environment
        Environment variables otherwise.
    known
        Names of kernels that have been measured: they are not timed again.

    Returns
    -------
    dict or None
        ``numpy``, ``openblas``, ``core``, ``configuration``, and ``gflops``, which is None if not timed.
    """
    changed = dict(environment) | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    changed.pop(VARIABLE, None)
    if kernel is not None:
        changed[VARIABLE] = kernel
    program = Path(__file__).with_name("openblas.py")
    done = processes.ask([sys.executable, "-P", str(program), *known], changed, seconds=_PROBE_SECONDS)
    try:
        answer = json.loads(done.stdout) if done and done.returncode == 0 else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and "openblas" in answer and "numpy" in answer else None


def remember(measurement: Measurement) -> None:
    """Keep a measurement for all processes on this node, whole or not at all."""
    file = answer_file()
    if file is None:
        return
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps(asdict(measurement)), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:  # a full disk: the next process probes again
        with contextlib.suppress(OSError):
            temporary.unlink()


def remembered() -> Measurement | None:
    """Return the measurement that was made on this node for this processor and this NumPy, or None."""
    file = answer_file()
    if file is None:
        return None
    try:
        found = Measurement(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    numbers = isinstance(found.gflops, float) and isinstance(found.own_gflops, float) and found.own_gflops > 0
    possible = found.kernel is None or found.kernel in runnable(processor_flags())
    return found if possible and (numbers or not found.openblas) else None


def decide(environment: Mapping[str, str]) -> BlasChoice:
    """Return the choice that the `environment`, or else a measurement of this processor, leads to."""
    given = environment.get(VARIABLE, "").strip()
    flags = processor_flags()
    if given:
        return BlasChoice(given, f"BLAS: {VARIABLE}={given} is set{_remark(given, flags)}")
    if not flags:
        return BlasChoice(None, "BLAS: left alone, as this is no x86 processor")
    found = _measured(flags, environment)
    if isinstance(found, BlasChoice):
        return found
    if "numpy" in sys.modules and found.openblas:
        return _as_loaded(found)
    return BlasChoice(found.kernel, found.line, _slow(found))


def _measured(flags: frozenset[str], environment: Mapping[str, str]) -> Measurement | BlasChoice:
    """Return what was measured on this node, by this process or before it; where that is not possible, what follows."""
    found, file = remembered(), answer_file()
    if found is not None:
        return found
    own = "BLAS: OpenBLAS's own choice"
    if "mpi4py.MPI" in sys.modules:  # its libraries may not support starting processes
        loss = "MPI was started before dbmpi, and BLAS kernels have not been compared on this node: import dbmpi first"
        return BlasChoice(None, own, (loss,))
    lock = None if file is None else file.with_suffix(".lock")
    with nullcontext(True) if lock is None else kernel_cache.locked(lock, _WAIT_SECONDS) as mine:
        found = remembered()
        if found is None and not mine:
            return BlasChoice(None, f"{own}; a probe took longer than {_WAIT_SECONDS:.0f} s")
        found = found or measure(flags, threads.without_prepared(environment))
        if found is None:
            return BlasChoice(None, f"{own}; it could not be probed ('dbmpi doctor' shows why)")
        remember(found)
        return found


def _as_loaded(found: Measurement) -> BlasChoice:
    """Return the choice where OpenBLAS was loaded before it could be set."""
    core = next((library.core for library in openblas.loaded()), found.own_core)
    if found.kernel is None or core.lower() != found.own_core.lower():
        return BlasChoice(None, f"BLAS: OpenBLAS's {core}, as NumPy was loaded before dbmpi", _slow(found))
    speed = f"{found.own_gflops:.0f} GFLOP/s a core, where {found.kernel} would do {found.gflops:.0f}"
    return BlasChoice(
        None,
        f"BLAS: OpenBLAS's own choice {core}, as NumPy was loaded before dbmpi",
        (f"NumPy was loaded before dbmpi, so OpenBLAS uses its own choice {core}, {speed}: import dbmpi before numpy",),
    )


def _slow(found: Measurement) -> tuple[str, ...]:
    if not found.gflops or found.gflops >= _SLOW:
        return ()
    return (
        f"NumPy multiplies at {found.gflops:.1f} GFLOP/s a core, as slow as without a BLAS made for the processor: "
        "install NumPy from its wheel (pip install --force-reinstall numpy), or with OpenBLAS or MKL",
    )


def _remark(given: str, flags: frozenset[str]) -> str:
    """Return what there is to say about a kernel that the user chose."""
    needed = KERNELS.get(given.upper())
    if needed is None or not flags:
        return ""
    if not needed <= flags:
        return f"; WARNING: this processor lacks {', '.join(sorted(needed - flags))}: unset {VARIABLE}"
    wider = [name for name in runnable(flags) if KERNELS[name] > needed]
    return f"; the processor can run {' and '.join(wider)}, too: 'dbmpi doctor' compares them" if wider else ""


def answer_file() -> Path | None:
    """Return the file of the node's measurement: one for each processor, NumPy and BLAS library; None without any."""
    spec = importlib.util.find_spec("numpy")
    parts = [kernel_cache.cpu_description(), sys.executable, os.environ.get("LD_LIBRARY_PATH", "")]
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        libraries = package.parent / "numpy.libs"
        with contextlib.suppress(OSError):
            parts.append((package / "version.py").read_text(encoding="utf-8"))
        with contextlib.suppress(OSError):
            parts += sorted(entry.name for entry in libraries.iterdir())
    parts.append(os.path.realpath(Path(sys.prefix) / "lib" / "libcblas.so.3"))  # where Conda says which BLAS it is
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
    directory = kernel_cache.private_directory("blas")
    return None if directory is None else directory / f"{digest}.json"
