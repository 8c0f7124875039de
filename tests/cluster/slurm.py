"""What tests ask of a Slurm: its state, and jobs that end, one way or the other."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.environment import mpi_environment, timeout_scale

_CONFIGURATION = Path("/etc/slurm/slurm.conf")
_MARK = "# dbmpi slurm test cluster"
_STARTS_WITHIN = 20.0
_ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED")


def answer(argv: list[str], timeout: float = 10.0) -> str:
    """Return what a command says on standard output and error; nothing if it fails or does not answer."""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
        return done.stdout + done.stderr if done.returncode == 0 else ""
    return ""


@dataclass(frozen=True)
class Ended:
    """How a job has ended."""

    state: str
    """COMPLETED, FAILED, TIMEOUT, ..."""
    code: int
    """Exit code of the batch script."""


class Slurm:
    """The Slurm of this machine; `plugin` is the way in which its srun can start this Python's MPI."""

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin

    def is_up(self) -> bool:
        return bool(answer(["sinfo", "-h"]))

    def is_a_test_cluster(self) -> bool:
        with suppress(OSError):
            return _CONFIGURATION.read_text(encoding="utf-8").startswith(_MARK)
        return False

    def nodes(self) -> int:
        """Return how many nodes can work."""
        states = answer(["sinfo", "-h", "-N", "-o", "%T"]).split()
        return sum(state in ("idle", "mixed", "allocated", "completing") for state in states)

    def has_plugin(self) -> bool:
        return self.plugin in answer(["srun", "--mpi=list"]).split()

    def submit(self, script: Path, *arguments: str) -> Job:
        """Submit a script from its directory; skip the test if the nodes are busy with the jobs of others."""
        done = subprocess.run(
            ["sbatch", "--parsable", script.name, *arguments],
            cwd=script.parent,
            env=mpi_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        skip_if_stopped()
        assert done.returncode == 0, done.stderr
        return self.started(done.stdout.strip())

    def started(self, number: str) -> Job:
        """Return a job that was submitted when it has begun; skip the test if other jobs use the nodes for too long."""
        job = Job(number)
        if not wait_until(lambda: job.state() != "PENDING", _STARTS_WITHIN):
            others, why = (
                answer(["squeue", "-h", "-t", "RUNNING", "-o", "%i"]).split(),
                answer(["squeue", "-h", "-o", "%i %r"]),
            )
            job.cancel()
            assert others, f"the job was not started within {_STARTS_WITHIN:g} s, though no other runs: {why}"
            pytest.skip(f"the job was not started within {_STARTS_WITHIN:g} s: jobs {', '.join(others)} use the nodes")
        return job


class Job:
    """A submitted job."""

    def __init__(self, number: str) -> None:
        self.number = number

    def state(self) -> str:
        """Return the state; of an array or a heterogeneous job, that of a task or component that has not ended."""
        states = self._show("JobState")
        return next((state for state in states if state not in _ENDED), states[0])

    def restarts(self) -> int:
        """Return how often the job was requeued."""
        restarts = self._show("Restarts")[0]
        return int(restarts) if restarts.isdecimal() else 0

    def signal(self, name: str, *, batch: bool) -> None:
        """Signal the script alone, as ``--signal=B:USR2@...`` does before the limit, or the ranks that srun started."""
        where = ["--batch"] if batch else []
        subprocess.run(["scancel", *where, f"--signal={name}", self.number], timeout=10, check=True)

    def cancel(self) -> None:
        answer(["scancel", self.number])

    def wait(self, seconds: float) -> Ended:
        """Wait for the job's end; cancel it and fail the test where it does not come."""
        __tracebackhide__ = True
        ended = wait_until(lambda: self.state() in _ENDED, seconds)
        skip_if_stopped()
        if not ended:
            self.cancel()
            pytest.fail(f"job {self.number} is still {self.state()} after {seconds:g} s")
        return Ended(self.state(), int(self._show("ExitCode")[0].partition(":")[0]))

    def _show(self, key: str) -> list[str]:
        """Return a value of the job, or of each task or component."""
        return re.findall(rf"\b{key}=(\S+)", answer(["scontrol", "show", "job", self.number])) or ["UNKNOWN"]


def skip_if_stopped() -> None:
    """Skip the test if somebody has stopped the Slurm that was up when the session began: it is everybody's."""
    if not _CONFIGURATION.exists():
        pytest.skip("the Slurm was stopped by somebody else")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, for `seconds` at most; return whether it holds."""
    deadline = time.monotonic() + seconds * timeout_scale()
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
