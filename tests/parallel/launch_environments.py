"""Starts under strange environments, one after the other, in copies of a process that has loaded what is slow to load.

``python THIS`` reads a line of JSON for each start, and answers with a line.  Each start is a true start of the command
line and of MPI, under the environment variables, processors and limits that the line says.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

Random = np.random.Generator
TASKS = ("", "0", "1", "2", "3", "64", "-1", "x", "4(x2),3", "2,1", "1(x", "99999999999999999999", "1.5", " 2 ")
PATHS = ("", "/", "/none", "/dev/null", "/tmp", "relative", "/proc/self", "x" * 300)
VALUES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_NODEID"),
            *("SLURM_LOCALID", "SLURM_TASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK"),
            *("SLURM_CPUS_ON_NODE", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_JOB_END_TIME"),
            *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
            *("PMI_SIZE", "PMI_RANK", "PMI_LOCAL_SIZE", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
            *("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
            *("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
            *("COLUMNS", "DBMPI_ALONE", "DBMPI_OVERSUBSCRIBE", "DBMPI_STALL_SECONDS", "OMPI_MCA_mpi_ft_enable"),
            *("OPENBLAS_THREAD_TIMEOUT", "OMP_WAIT_POLICY"),
        ),
        TASKS,
    ),
    **dict.fromkeys(("TMPDIR", "HOME", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "DBMPI_UNFINISHED"), PATHS),
    "DBMPI_PROGRESS": ("", "bar", "lines", "none", "x"),
    "DBMPI_PREPARED": ("", "{}", "[]", "{", '{"OMP_NUM_THREADS": "7"}', "[" * 5000),
    "DBMPI_BFLOAT16": ("", "amx", "avx512_bf16", "float32", "x"),
    "OPENBLAS_CORETYPE": ("", "HASWELL", "ZEN", "none"),
    "LANG": ("", "C", "de_DE.UTF-8", "x"),
    "LC_ALL": ("", "C", "x"),
    "LANGUAGE": ("", "de", "x"),
}
LIMITS = {
    "RLIMIT_AS": (1 << 32, 1 << 34),
    "RLIMIT_DATA": (1 << 31, 1 << 33),
    "RLIMIT_NOFILE": (64, 256),
    "RLIMIT_FSIZE": (1 << 20, 1 << 30),
    "RLIMIT_STACK": (1 << 20, 1 << 26),
    "RLIMIT_CORE": (0,),
}
SECONDS = 40.0


def mutated(random: Random) -> dict[str, Any]:
    """Return a start: variables, processors and limits."""
    names = list(VALUES)
    chosen = random.choice(names, size=random.integers(1, 7), replace=False)
    variables = {str(name): VALUES[name][random.integers(len(VALUES[name]))] for name in chosen}
    start: dict[str, Any] = {"variables": variables, "limits": {}, "processors": []}
    if random.random() < 0.3:
        start["processors"] = [int(random.choice(sorted(os.sched_getaffinity(0))))]
    if random.random() < 0.3:
        limit = list(LIMITS)[random.integers(len(LIMITS))]
        start["limits"] = {limit: LIMITS[limit][random.integers(len(LIMITS[limit]))]}
    return start


def attempt(start: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """Carry out a start in a copy of this process; return how it has ended."""
    with tempfile.TemporaryFile() as out:
        began = time.monotonic()
        child = os.fork()
        if not child:
            _become(start, arguments, out.fileno())
        while True:
            done, status, used = os.wait4(child, os.WNOHANG)
            if done or time.monotonic() - began > SECONDS * float(os.environ.get("DBMPI_TEST_TIMEOUT_SCALE", "1")):
                break
            time.sleep(0.005)
        if not done:
            os.kill(child, signal.SIGABRT)
            _, status, used = os.wait4(child, 0)
        out.seek(0)
        text = out.read().decode(errors="replace")
    return {
        "code": os.waitstatus_to_exitcode(status) if done else None,
        "text": text,
        "seconds": time.monotonic() - began,
        "mib": used.ru_maxrss / 1024,
    }


def _become(start: dict[str, Any], arguments: list[str], out: int) -> None:
    """Take on the environment, and be the command; never returns."""
    code = 99
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        faulthandler.enable()
        os.environ.update(start["variables"])
        if start["processors"]:
            os.sched_setaffinity(0, start["processors"])
        for name, value in start["limits"].items():
            number = getattr(resource, name)
            resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
        tempfile.tempdir = None
        from dbmpi.machine import environment, threads

        threads._prepared = environment._prepared = None
        from dbmpi.cli.main import main

        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    # Nothing of MPI: each start does that for itself.
    import dbmpi.config
    import dbmpi.kernels.activations
    import dbmpi.kernels.losses
    import dbmpi.kernels.matmul
    import dbmpi.kernels.updates

    assert dbmpi.config.Run
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(attempt(asked["start"], asked["arguments"])), flush=True)


if __name__ == "__main__":
    Path.cwd()
    main()
