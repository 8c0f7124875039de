"""Ranks that never call, or halt on the way to an operation that blocks: the others say what they wait for, and end."""

from __future__ import annotations

import sys

import pytest
from failure.jobs import LIMIT, SECONDS, STALL, Jobs, messages
from failure.test_broken_runs import sabotaged
from harness.environment import is_open_mpi, timeout_scale
from harness.launching import Completed

ALL = "all ranks that were started to call dbmpi"

MINIMIZE = """
import sys
import numpy as np
from mpi4py import MPI
from dbmpi import minimize
if MPI.COMM_WORLD.rank != 1:
    minimize(lambda x: (float(x @ x), 2 * x), np.ones(3), *({comm}))
"""
TRAIN = """
from mpi4py import MPI
import dbmpi
from dbmpi import config
if MPI.COMM_WORLD.rank != 1:
    from pathlib import Path
    dbmpi.train(config.load(Path("config.toml")), *({comm}))
"""
NO_MPI = """
import os, time
if "1" in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK")):
    time.sleep(3600)
from dbmpi.mpi import world
world.start()
"""
BETWEEN = """
import time
from dbmpi.mpi import blocking as guarded, waiting, world
comm = world.start()
if comm.rank == 1:
    waiting.barrier(comm, "the others")
    time.sleep(3600)
guarded.split(comm, 0, comm.rank, "all ranks to take sides")
"""


def assert_stalled(done: Completed, awaited: str) -> None:
    assert done.returncode == 75, done.transcript
    assert any("stalled: " in line and awaited in line for line in messages(done)), done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert done.seconds < LIMIT + 2 * SECONDS * timeout_scale(), done.transcript


@pytest.mark.parametrize(
    ("program", "comm", "awaited"),
    [
        (MINIMIZE, "", ALL),
        (MINIMIZE, "MPI.COMM_WORLD,", "all ranks of the communicator to call minimize"),
        (TRAIN, "", ALL),
        (TRAIN, "MPI.COMM_WORLD,", "the other ranks after checking what is learned"),
        (BETWEEN, "", "all ranks to take sides"),
    ],
    ids=[
        "minimize",
        "minimize with a communicator",
        "train",
        "train with a communicator",
        "after it has met the others",
    ],
)
def test_a_rank_that_never_calls_ends_the_job(jobs: Jobs, program: str, comm: str, awaited: str) -> None:
    (jobs.directory / "program.py").write_text(program.replace("{comm}", comm))
    done = jobs.finish(jobs.launch.start(3, [sys.executable, "program.py"], STALL, jobs.directory))
    assert_stalled(done, awaited)


def test_a_rank_that_never_starts_mpi_ends_the_job(jobs: Jobs) -> None:
    """The others are inside MPI, where nothing of Python runs; Python's fault handler says where they are."""
    (jobs.directory / "program.py").write_text(NO_MPI)
    done = jobs.finish(jobs.launch.start(3, [sys.executable, "program.py"], STALL, jobs.directory))
    # MPICH's launcher counts that it has killed the one that never came.
    assert done.returncode == 1 if is_open_mpi() else done.returncode in (1, 9), done.transcript
    assert "in _wait_for_all_ranks_to_start_mpi" in done.stderr, done.transcript


@pytest.mark.parametrize(
    ("target", "awaited"),
    [
        ("dbmpi.mpi.topology Communicators __init__ 0", "all ranks to begin the run"),
        ("dbmpi.mpi.topology blocking split 1", "all ranks to set apart the workers"),
        ("dbmpi.paramserver.store Window allocate 0", "the other ranks to plan windows"),
        ("dbmpi.mpi.window Window __init__ 0", "the other ranks to open their windows"),
        ("dbmpi.mpi.window Window free 0", "the other ranks to close their windows"),
    ],
    ids=["a duplicate", "a split", "before a window", "a window", "the end of a window"],
)
def test_a_rank_that_halts_before_what_blocks_ends_the_job(jobs: Jobs, target: str, awaited: str) -> None:
    assert_stalled(sabotaged(jobs, "halt", 2, target, env=STALL), awaited)
