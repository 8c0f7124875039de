"""Programs of a user's own under `dbmpi launch`: one world, prepared as for dbmpi's own commands."""

from __future__ import annotations

import json
import os
import sys

import pytest
from failure.jobs import Jobs, messages
from harness.environment import THREADS
from harness.launching import Completed

MINIMIZE = """
import numpy as np            # before dbmpi, as most scripts do
from dbmpi import minimize
from mpi4py import MPI

def objective(x):
    rank = MPI.COMM_WORLD.rank
    return float((x[rank] - rank) ** 2), 2 * (x - rank) * (np.arange(x.size) == rank)

found = minimize(objective, np.full(3, 9.0))
if MPI.COMM_WORLD.rank == 0:
    print("found", (found.x.round(6) + 0.0).tolist(), found.converged)
"""

TRAIN = """
import dbmpi
result = dbmpi.train(dbmpi.load("config.toml"))
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 0:
    print("trained", result.steps, MPI.COMM_WORLD.size)
"""

SHOW = """
import json, os, sys
print(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMBA_CACHE_DIR", "OMP_WAIT_POLICY")}]))
"""


def launched(jobs: Jobs, ranks: int, *words: str) -> Completed:
    """Run words by ``dbmpi launch`` in an environment in which nothing about threads is set."""
    without = [word for name in (*THREADS, "NUMBA_CACHE_DIR", "OMP_WAIT_POLICY") for word in ("-u", name)]
    argv = ["env", *without, sys.executable, "-m", "dbmpi", "launch", "-n", str(ranks), "--", *words]
    done = jobs.launch(None, argv, cwd=jobs.directory)
    assert not done.left, done.transcript
    return done


def test_minimize(jobs: Jobs) -> None:
    (jobs.directory / "mine.py").write_text(MINIMIZE)
    done = launched(jobs, 3, "python", "mine.py")
    assert done.returncode == 0, done.transcript
    assert done.stdout.count("found [0.0, 1.0, 2.0] True") == 1, done.transcript


def test_train(jobs: Jobs) -> None:
    (jobs.directory / "mine.py").write_text(TRAIN)
    done = launched(jobs, 2, "mine.py")
    assert done.returncode == 0, done.transcript
    assert "trained 14 2" in done.stdout, done.transcript
    jobs.assert_whole()


def test_each_rank_is_prepared(jobs: Jobs) -> None:
    """The same variables are set as for a command of dbmpi, before the program begins."""
    (jobs.directory / "show.py").write_text(SHOW)
    done = launched(jobs, 2, "python", "show.py", "a b", "--", "-n")
    assert done.returncode == 0, done.transcript
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(said) == 2, done.transcript
    for arguments, variables in said:
        assert arguments == ["a b", "--", "-n"]
        assert None not in variables.values()
        threads = int(variables["OMP_NUM_THREADS"])
        assert 1 <= threads <= max(1, (os.cpu_count() or 1) // 2)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("sh", "-c", "exit 5"), 5, None),
        (("trian", "config.toml"), 2, "did you mean 'train'?"),
        (("./plain",), 2, "./plain cannot be executed: Exec format error"),
        (("python", "-c", "raise SystemExit(3)"), 3, None),
    ],
)
def test_ends(jobs: Jobs, words: tuple[str, ...], code: int, told: str | None) -> None:
    """The exit code is the program's, and what cannot be started is said once."""
    plain = jobs.directory / "plain"
    plain.write_bytes(b"\x00\x01 no program")
    plain.chmod(0o755)
    done = launched(jobs, 2, *words)
    assert done.returncode == code, done.transcript
    assert len(messages(done)) == (told is not None), done.transcript
    assert told is None or told in messages(done)[0], done.transcript
