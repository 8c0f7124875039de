"""A rank that ends itself in a user's code: Python says nothing of it, yet the job ends with a line that names it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from failure.jobs import Jobs, messages
from harness.environment import is_open_mpi
from harness.launching import Completed, Launch

EXAMPLES = Path(__file__).parents[2] / "examples"
MINIMIZE = """
import os, sys
import numpy as np
from mpi4py import MPI
from dbmpi import minimize
from dbmpi.methods.gradients import gradient_descent

def at(place):
    if MPI.COMM_WORLD.rank == 1 and place == sys.argv[1]:
        {end}

def objective(x):
    at("objective")
    return float(x @ x), 2 * x

def method(space, evaluate, *, limits, callback=None):
    at("method")
    return gradient_descent(space, evaluate, limits=limits, callback=callback)

minimize(objective, np.ones(3), method=method, callback=lambda progress, x: at("callback"))
"""

LAYER = """
import sys
sys.path.insert(0, {examples!r})
from mpi4py import MPI
from own_layer import Maxout

class Ends(Maxout):
    calls = 0

    def forward(self, *arguments, **named):
        Ends.calls += 1
        if Ends.calls == 4 and MPI.COMM_WORLD.rank == 1:
            sys.exit(0)
        return super().forward(*arguments, **named)
"""

TRAIN = """
import dbmpi
dbmpi.train(dbmpi.load("config.toml"))
"""


def assert_named(done: Completed, code: int, *words: str) -> None:
    """One line names the rank and how it ended, and the exit code is not 0."""
    # MPICH's launcher counts that it has killed the others, if it had to.
    assert done.returncode == code or (done.returncode == 9 and not is_open_mpi()), done.transcript
    told = [line for line in messages(done) if "rank 1" in line]
    assert len(told) == 1, done.transcript
    assert all(word in told[0] for word in words), done.transcript
    assert "stalled" not in done.output, done.transcript
    assert not done.left, done.transcript


@pytest.mark.parametrize(
    ("place", "end", "code", "word"),
    [
        ("objective", "sys.exit(0)", 1, "SystemExit: 0"),
        ("callback", "sys.exit()", 1, "SystemExit"),
        ("method", "raise SystemExit('enough')", 1, "SystemExit: enough"),
        ("objective", "os._exit(0)", 1, "os._exit(0)"),
        ("method", "raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_minimize(launch: Launch, tmp_path, place: str, end: str, code: int, word: str) -> None:
    (tmp_path / "mine.py").write_text(MINIMIZE.format(end=end))
    done = launch(3, [sys.executable, "mine.py", place], cwd=tmp_path)
    assert_named(done, code, word, *([] if code == 130 else ["mine.py, line"]))


def test_a_process_alone_ends_as_it_likes(launch: Launch, tmp_path) -> None:
    lone = MINIMIZE.format(end="sys.exit(7)").replace("rank == 1", "rank == 0")
    (tmp_path / "mine.py").write_text(lone)
    done = launch(None, [sys.executable, "mine.py", "objective"], cwd=tmp_path)
    assert (done.returncode, done.output) == (7, ""), done.transcript


@pytest.mark.parametrize("program", ["train", "mine.py"])
def test_training_with_a_layer_that_ends_python(jobs: Jobs, program: str) -> None:
    (jobs.directory / "ending.py").write_text(LAYER.format(examples=str(EXAMPLES)))
    (jobs.directory / "mine.py").write_text(TRAIN)
    config = jobs.directory / "config.toml"
    config.write_text(config.read_text().replace("units = 7\n", 'type = "ending:Ends"\nunits = 7\npieces = 2\n', 1))
    config.write_text(config.read_text().replace('activation = "tanh"\n', "", 1))
    words = ["-m", "dbmpi", "train", "config.toml"] if program == "train" else ["mine.py"]
    done = jobs.launch(2, [sys.executable, *words], cwd=jobs.directory)
    assert_named(done, 1, "SystemExit: 0", "ending.py, line")
