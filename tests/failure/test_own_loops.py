"""Loops of a user's own over the parameter server: whatever one rank does, the job ends, and with a reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from failure.jobs import LIMIT, SECONDS, STALL, Jobs, messages
from harness.environment import launcher, mpi_environment
from harness.launching import Completed
from harness.programs import Program

SERVER = """
import os, sys, time
import dbmpi
import numpy as np
from mpi4py import MPI

rank = MPI.COMM_WORLD.rank
weights = {"w": np.zeros(1000)}
resume = "loop.h5" if os.path.exists("loop.h5") else None
with dbmpi.ParameterServer(None, weights, "sgd", learning_rate=0.1, resume=resume, COLOCATE) as server:
    if not server.serve():
        step = 0
        print(f"version {server.version}", flush=True)
        while True:
            server.fetch()
            server.push({"w": np.ones(1000)})
            step += 1
            if step == 20:
                if server.worker == 0:
                    server.save("loop.h5")
                print(f"rank {rank} learns", flush=True)
            if step == 60 and rank == 1:
                FAIL
"""

SERVE = """
import os, sys, time
import dbmpi

if dbmpi.serve():
    print("served", flush=True)
    sys.exit()

import numpy as np
from mpi4py import MPI

rank = MPI.COMM_WORLD.rank
weights = {"w": np.zeros(1000)}
server = dbmpi.ParameterServer(None, weights, "sgd", learning_rate=1.0)
for step in range(STEPS):
    server.fetch()
    server.push({"w": np.full(1000, -1.0)})
    if step == 20:
        print(f"rank {rank} learns", flush=True)
    if step == 60 and rank == 1:
        FAIL
END
"""

ENDS = {
    "an exception": ('raise ZeroDivisionError("no samples here")', ["no samples here", "in <module>"], 1),
    "sys.exit": ("sys.exit(3)", ["SystemExit: 3", "cannot go on"], 1),
    "os._exit": ("os._exit(0)", ["os._exit(0) was called", "cannot go on"], 1),
    "a wrong gradient": (
        'server.push({"w": np.ones(3)})',
        ["dbmpi: ParameterServer: the gradient of 'w' has the shape (3,), and the parameter (1000,)"],
        2,
    ),
    "an infinite gradient": (
        'server.push({"w": np.full(1000, np.inf)})',
        ["dbmpi: ParameterServer: the gradient of 'w' is not finite: its element [0] is inf"],
        2,
    ),
}


def program(
    jobs: Jobs, text: str, ranks: int | None, *, options: str | None = None, env: dict[str, str] | None = None
) -> Program:
    (jobs.directory / "mine.py").write_text(text)
    words = [sys.executable, "mine.py"]
    if options is not None:
        argv = [sys.executable, "-m", "dbmpi", "launch", "-n", str(ranks), f"--mpi-args={options}", "--", *words]
        return jobs.launch.start(None, argv, cwd=jobs.directory)
    return jobs.launch.start(ranks, words, env=env, cwd=jobs.directory)


def finished(jobs: Jobs, started: Program) -> Completed:
    return jobs.finish(started, timeout=SECONDS)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("colocate", [False, True])
def test_what_one_worker_does_ends_all(jobs: Jobs, end: str, colocate: bool) -> None:
    action, said, code = ENDS[end]
    text = SERVER.replace("COLOCATE", f"colocate={colocate}").replace("FAIL", action)
    done = finished(jobs, program(jobs, text, 3))
    assert done.returncode not in (0, None), done.transcript
    if code == 2:
        assert messages(done), done.transcript
    for words in said:
        assert words in done.stderr, done.transcript


@pytest.mark.parametrize("end", ["an exception", "a wrong gradient"])
def test_an_exception_in_a_script_whose_shards_serve(jobs: Jobs, end: str) -> None:
    text = SERVE.replace("STEPS", "10**9").replace("FAIL", ENDS[end][0]).replace("END", "")
    done = finished(jobs, program(jobs, text, 3))
    assert done.returncode != 0, done.transcript
    assert ENDS[end][1][0] in done.stderr, done.transcript
    assert "served" not in done.stdout


@pytest.mark.parametrize("end", ["", "server.close(); sys.exit()", "server.close(); server.close()"])
def test_a_script_that_ends(jobs: Jobs, end: str) -> None:
    """Whether it closes or not: workers that have ended wait for the others, and shards for all."""
    text = SERVE.replace("STEPS", "40 * rank").replace("FAIL", "pass")
    done = finished(jobs, program(jobs, text.replace("END", f"import atexit\n{end}"), 3))
    assert done.returncode == 0, done.transcript
    assert done.stdout.count("served") == 1, done.transcript


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("options", ["", "--with-ft ulfm"])
def test_a_rank_is_killed(jobs: Jobs, rank: int, options: str) -> None:
    """A shard or a worker: the launcher ends the job, or where MPI lets the others live, they say so and end.

    The loop goes on from its checkpoint on fewer ranks.
    """
    version = [launcher(), "--version"]
    said = subprocess.run(version, env=mpi_environment(), capture_output=True, text=True, check=False).stdout
    if options and "Open MPI) 5" not in said:
        pytest.skip("this MPI ends all ranks when one dies: only Open MPI 5 has mpirun --with-ft ulfm")
    text = SERVER.replace("COLOCATE", "").replace("FAIL", "pass")
    started = program(jobs, text, 3, options=options)
    jobs.wait_for_output(started, "rank 1 learns", "rank 2 learns")
    os.kill(started.ranks()[rank], signal.SIGKILL)
    done = finished(jobs, started)
    assert done.returncode != 0, done.transcript
    if options:
        assert f"rank {rank} on " in done.stderr, done.transcript
        assert "Start the program again, from the last checkpoint that it has saved" in done.stderr
    done = finished(jobs, program(jobs, text.replace("pass", "break"), 2))
    assert done.returncode == 0, done.transcript
    assert int(done.stdout.partition("version ")[2].split()[0]) >= 20, done.transcript


def test_a_wait_for_a_colocated_shard_ends(jobs: Jobs) -> None:
    """Its rank computes, or halts, for longer than the stall limit."""
    text = SERVER.replace("COLOCATE", "colocate=True, shards=3").replace("FAIL", "time.sleep(1000)")
    started = program(jobs, text, 3, env=STALL)
    done = finished(jobs, started)
    assert done.returncode == 75, done.transcript
    assert f"stalled: nothing moved for {LIMIT:g} s while waiting for shard 1 on rank 1" in done.stderr, done.transcript


def test_one_process_needs_no_launcher(jobs: Jobs) -> None:
    for text in (SERVE.replace("STEPS", "40"), SERVER.replace("COLOCATE", "").replace("while True", "while step < 40")):
        done = finished(jobs, program(jobs, text.replace("FAIL", "pass").replace("END", ""), None))
        assert done.returncode == 0, done.transcript
        assert "served" not in done.stdout
    text = SERVER.replace("COLOCATE", "").replace("rank == 1", "rank == 0").replace("FAIL", ENDS["an exception"][0])
    done = finished(jobs, program(jobs, text, None))
    assert done.returncode == 1, done.transcript
    assert done.stderr.count("no samples here") == 2, done.transcript  # the line, and the message
