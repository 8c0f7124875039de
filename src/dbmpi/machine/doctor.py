"""Checks of a machine, one finding after another: what it offers, and what would break a run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dbmpi
from dbmpi.errors import UserError
from dbmpi.machine import blas, kernel_cache, launcher, mpi_library, processes, threads

_GIB = 2**30
_SECONDS = 90.0
_SLOW = 4.0
"""1e9 operations a second of a core: plain loops are slower, and any BLAS made for the processor is faster."""
_GAIN = 1.05
"""Of OpenBLAS's own kernels over those that are set; less may be noise."""
"""Limit on each program that is tried; the first import from a network file system may take long."""

_NUMBA = """
import json, numba
from importlib import import_module
layers = []
for layer, module in (("tbb", "tbbpool"), ("omp", "omppool"), ("workqueue", "workqueue")):
    try:
        import_module("numba.np.ufunc." + module)
    except ImportError:
        continue
    layers.append(layer)
print(json.dumps({"version": numba.__version__, "threads": numba.config.NUMBA_NUM_THREADS, "layers": layers}))
"""
_H5PY = """
import json, h5py, os, tempfile
with tempfile.TemporaryDirectory() as directory:
    name = os.path.join(directory, "try.h5")
    with h5py.File(name, "w") as file:
        file["x"] = [1.0, 2.0]
    with h5py.File(name, "r") as file:
        assert file["x"][1] == 2.0
print(json.dumps({"version": h5py.__version__, "hdf5": h5py.version.hdf5_version}))
"""
_BFLOAT16 = """
import json
from dbmpi.kernels import bfloat16
print(json.dumps({"engine": bfloat16.engine(), "reason": bfloat16.reason()}))
"""
_MPI4PY = "import json, mpi4py; print(json.dumps({'version': mpi4py.__version__}))"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    status: Literal["ok", "note", "broken"]
    """``note``: works, but there is something to know; ``broken``: a run will fail."""
    found: str
    advice: str = ""


def diagnose() -> Iterator[Finding]:
    """Run one check after another; takes some ten to twenty seconds in all."""
    environment = threads.without_prepared(os.environ)
    yield _python()
    yield _cores(environment)
    yield _blas(environment)
    yield _numba(environment)
    yield _kernel_cache(environment)
    yield _bfloat16(environment)
    yield _h5py(environment)
    yield _shared_memory()
    yield from _mpi(environment)


def _python() -> Finding:
    where = Path(dbmpi.__file__).parent
    return Finding(
        "Python", "ok", f"{platform.python_version()} ({sys.executable}); dbmpi {dbmpi.__version__} ({where})"
    )


def _cores(environment: Mapping[str, str]) -> Finding:
    node = threads.this_node(environment)
    decision = threads.decide(environment, node)
    quota = threads.cpu_quota()
    details = [f"{os.cpu_count()} processors in the machine"]
    if hasattr(os, "sched_getaffinity"):
        details.append(f"{len(os.sched_getaffinity(0))} for this process")
    if quota is not None:
        details.append(f"a quota of {quota:g} cores")
    text = f"{node.cores} ({', '.join(details)}); {decision.line}"
    if decision.oversubscribed:
        return Finding("cores", "note", text, "unset the variables that the warning names: dbmpi fits threads to ranks")
    given = environment.get("OMP_NUM_THREADS")
    if given is not None and decision.threads < node.cores // node.ranks:
        return Finding("cores", "note", text, f"OMP_NUM_THREADS={given} leaves cores unused; unset it if not meant so")
    return Finding("cores", "ok", text)


def _blas(environment: Mapping[str, str]) -> Finding:
    given = environment.get(blas.VARIABLE, "").strip()
    own = blas.probe("", environment)
    if own is None:
        return Finding("NumPy", "broken", "cannot be imported or cannot multiply", "try: python -c 'import numpy'")
    by = f"OpenBLAS's kernels {own['core']}" if own["core"] else "a BLAS that is not OpenBLAS"
    text = f"{own['numpy']}; {own['gflops']:.0f} GFLOP/s a core by {by}"
    if own["gflops"] < _SLOW:
        fix = "install NumPy from its wheel (pip install --force-reinstall numpy), or with OpenBLAS or MKL"
        return Finding("NumPy", "note", f"{text}, as slow as without a BLAS made for the processor", fix)
    if not given or not own["core"]:
        return Finding("NumPy", "ok", text)
    forced = blas.probe(given, environment)
    if forced is None:
        fix = f"unset {blas.VARIABLE}: this processor lacks what its kernels need"
        return Finding("NumPy", "broken", f"{text}; fails with {blas.VARIABLE}={given}, which is set", fix)
    text += f"; {blas.VARIABLE}={given} is set: {forced['core']}, {forced['gflops']:.0f} GFLOP/s a core"
    gain = own["gflops"] / forced["gflops"]
    if gain > _GAIN:
        return Finding("NumPy", "note", text, f"unset {blas.VARIABLE}: products become {gain:.1f} x as fast")
    return Finding("NumPy", "ok", text)


def _numba(environment: Mapping[str, str]) -> Finding:
    answer = _ask(_NUMBA, environment)
    if isinstance(answer, str):
        return _not_loaded("numba", "Numba", answer)
    return Finding("Numba", "ok", f"{answer['version']}, threading layer {(*answer['layers'], 'none')[0]}")


def _kernel_cache(environment: Mapping[str, str]) -> Finding:
    given = environment.get(kernel_cache.VARIABLE, "").strip()
    if given and not os.access(_existing(Path(given)), os.W_OK | os.X_OK):
        return Finding("kernel cache", "note", f"NUMBA_CACHE_DIR={given} cannot be written", "unset NUMBA_CACHE_DIR")
    private = kernel_cache.private_directory("try")
    directory = Path(given) if given else private and private.parent
    if directory is None:
        advice = "set NUMBA_CACHE_DIR to a directory that can be written: kernels are compiled at each start"
        return Finding("kernel cache", "note", "no directory can be written", advice)
    free = shutil.disk_usage(_existing(directory)).free
    return Finding("kernel cache", "ok", f"{directory}, {free / _GIB:.1f} GiB free")


def _bfloat16(environment: Mapping[str, str]) -> Finding:
    answer = _ask(_BFLOAT16, environment)
    if isinstance(answer, str):
        named = "DBMPI_BFLOAT16" in environment
        advice = "correct DBMPI_BFLOAT16, or unset it" if named else 'leave network.precision = "float32"'
        return Finding("bfloat16", "broken", answer, advice)
    how = "rounded, and multiplied as float32" if answer["engine"] == "float32" else f"multiplied by {answer['engine']}"
    if not answer["reason"]:
        return Finding("bfloat16", "ok", how)
    text = f"{how} ({answer['reason']})"
    advice = 'network.precision = "bfloat16" brings no speed here' if answer["engine"] == "float32" else ""
    return Finding("bfloat16", "ok", text, advice)


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))


def _h5py(environment: Mapping[str, str]) -> Finding:
    answer = _ask(_H5PY, environment)
    if isinstance(answer, str):
        return _not_loaded("h5py", "h5py", answer)
    return Finding("h5py", "ok", f"{answer['version']}, HDF5 {answer['hdf5']}")


def _not_loaded(package: str, name: str, why: str) -> Finding:
    return Finding(name, "broken", why, f"pip install --force-reinstall {package}")


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding("shared memory", "note", "no /dev/shm", "ranks of a node exchange data by Put and Get instead")
    text = f"/dev/shm, {free / _GIB:.1f} GiB free"
    if free < _GIB:
        fix = "large models will use Put and Get instead; in a container: docker run --shm-size=8g"
        return Finding("shared memory", "note", text, fix)
    return Finding("shared memory", "ok", text)


def _mpi(environment: Mapping[str, str]) -> Iterator[Finding]:
    answer = _ask(_MPI4PY, environment)
    if isinstance(answer, str):
        yield _not_loaded("mpi4py", "mpi4py", answer)
        return
    try:
        mpi = mpi_library.find_mpi()
    except UserError as error:
        yield Finding("MPI", "broken", f"mpi4py {answer['version']}; {error}")
        return
    yield Finding("MPI", "ok", f"mpi4py {answer['version']}, {mpi.version} ({mpi.library}), launcher {mpi.mpirun}")
    yield _two_ranks(mpi, environment)
    yield _death(mpi, environment)
    yield from _srun(mpi)


def _two_ranks(mpi: mpi_library.Mpi, environment: Mapping[str, str]) -> Finding:
    """Let two ranks exchange data as a run does."""
    what = "two ranks"
    command = launcher.compose(mpi, 2, ("-m", "dbmpi.mpi.selftest"), environment=environment)
    advice = f"try by hand: {command}"
    done = processes.ask(command.argv, {**environment, **command.settings}, seconds=_SECONDS)
    if done is None:
        return Finding(what, "broken", f"not done after {_SECONDS:.0f} s", advice)
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        shared, rma, p2p = answer["shared"], answer["rma"], answer["p2p"]
        level = answer["thread_level"]
    except (ValueError, IndexError, KeyError, TypeError):
        return Finding(what, "broken", f"failed with exit code {done.returncode}: {_last_line(done.stderr)}", advice)
    if not (shared["correct"] and rma["correct"] and p2p["correct"]):
        return Finding(what, "broken", "the data that arrived was not what had been sent", advice)
    way = f"shared memory {shared['put_gb_per_s']:.1f} GB/s" if shared["shared"] else "no shared memory"
    text = f"start, {way}, Put, Get, flags and messages work; thread level {level}"
    if level != "multiple":
        return Finding(what, "note", text, "an MPI with thread level 'multiple' can transfer while it computes")
    return Finding(what, "ok", text)


def _death(mpi: mpi_library.Mpi, environment: Mapping[str, str]) -> Finding:
    """Let one of three ranks die."""
    what = "a death"
    command = launcher.compose(mpi, 3, ("-m", "dbmpi.mpi.survival"), environment=environment, outlive=True)
    done = processes.ask(command.argv, {**environment, **command.settings}, seconds=_SECONDS)
    if done is None:
        text = f"a job has not ended {_SECONDS:.0f} s after one of its ranks had died"
        return Finding(what, "broken", text, f"try by hand: {command}")
    if '"dead": [2]' in done.stdout:
        text = "a training goes on after a worker's death; that of a shard ends it, exit code 75"
        return Finding(what, "ok", text)
    if done.returncode in (0, 2):
        return Finding(what, "broken", f"three ranks: {_last_line(done.stderr)}", f"try by hand: {command}")
    return Finding(what, "ok", "any rank's death ends the job; dbmpi launch: exit code 75, or --restarts N")


def _srun(mpi: mpi_library.Mpi) -> Iterator[Finding]:
    """Report how srun must be called, if there is one."""
    srun = shutil.which("srun")
    done = processes.ask([srun, "--mpi=list"], seconds=_SECONDS) if srun else None
    if done is None or done.returncode != 0:
        return  # there is no Slurm here, or it is not set up
    offered = set((done.stdout + done.stderr).replace(",", " ").split())
    wanted = "pmix" if mpi.is_open_mpi else "pmi2"
    if any(word.startswith(wanted) for word in offered):
        yield Finding("srun", "ok", f"start ranks with srun --mpi={wanted}, or with dbmpi launch")
    else:
        text = f"has no {wanted}, which {mpi.version} needs"
        yield Finding("srun", "note", text, "use dbmpi launch in the allocation instead of srun")


def _ask(program: str, environment: Mapping[str, str]) -> dict[str, Any] | str:
    """Run a program that prints JSON in a Python of its own; return its answer, or what went wrong."""
    done = processes.ask([sys.executable, "-c", program], environment, seconds=_SECONDS)
    if done is None:
        return f"not loaded after {_SECONDS:.0f} s"
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return _last_line(done.stderr) or f"ended with code {done.returncode}"
    return answer if isinstance(answer, dict) else "no answer"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" -\t")]
    return lines[-1][:300] if lines else ""
