"""What a user sees of a failure under `dbmpi launch`: dbmpi's message alone; where there is none, the launcher's."""

from __future__ import annotations

import sys

import pytest
from failure.jobs import Jobs, messages
from harness.launching import Completed

FAILS = """
import time
from dbmpi.errors import RunFailed
from dbmpi.mpi.world import ranks
with ranks() as comm:
    if comm.rank == 1:
        raise RunFailed("the loss is no longer finite")
    time.sleep(1000)
"""
DIES = """
import os, signal, sys
from dbmpi.mpi.world import ranks
with ranks() as comm:
    print("dbmpi: a notice", file=sys.stderr, flush=True)
    comm.Barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
"""
LAUNCHERS = ("prterun", "mpirun", "MPI_ABORT", "MPI_Abort", "BAD TERMINATION", "PMIX")


def launched(jobs: Jobs, *words: str) -> Completed:
    return jobs.launch(None, [sys.executable, "-m", "dbmpi", "launch", "-n", "2", "--", *words], cwd=jobs.directory)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("train", "config.toml", "--set", "data.train=missing.h5"), 2, "missing.h5: no such data file"),
        (("train", "--unknown"), 2, "dbmpi train: "),
        (("python", "fails.py"), 1, "dbmpi: rank 1: the loss is no longer finite"),
    ],
)
def test_a_message_is_alone(jobs: Jobs, words: tuple[str, ...], code: int, told: str) -> None:
    (jobs.directory / "fails.py").write_text(FAILS)
    done = launched(jobs, *words)
    assert done.returncode == code, done.transcript
    assert [told in message for message in messages(done)] == [True], done.transcript
    assert not [word for word in LAUNCHERS if word in done.output], done.transcript


def test_without_a_message_the_launcher_has_its_say(jobs: Jobs) -> None:
    """A notice is no reason."""
    (jobs.directory / "dies.py").write_text(DIES)
    done = launched(jobs, "python", "dies.py")
    assert done.returncode != 0, done.transcript
    assert "signal 9" in done.output, done.transcript
    assert "prterun noticed that" in done.output or "BAD TERMINATION" in done.output, done.transcript
