"""An objective of a user's own that fails while it is trained: its traceback, soon, and what was learned is kept."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from failure.jobs import SECONDS, Jobs, messages
from harness.environment import timeout_scale

CONFIGURATION = """
[run]
directory = "run"
[data]
train = "train.h5"
test = "test.h5"
[objective]
use = "mine:Mine"
[optimizer]
batch_size = 6
epochs = 50
[monitor]
progress = "lines"
evaluate_epochs = 0
"""
MINE = """
import numpy as np
from mpi4py import MPI

class Mine:
    parameters = {"weights": np.zeros((6, 3))}

    def __init__(self):
        self.calls, self.state = 0, {"mean": np.ones(2)}

    def loss_and_gradient(self, parameters, batch):
        self.calls += 1
        if self.calls == 20 and MPI.COMM_WORLD.rank == min(1, MPI.COMM_WORLD.size - 1):
            self.state["mean"] = np.ones(3)  # which no checkpoint can hold: then the last state that one could
            raise ZeroDivisionError("one sample too many")
        errors = batch.inputs @ parameters["weights"] - np.eye(3)[batch.targets]
        return (errors**2).sum(axis=1).mean() / 2, {"weights": batch.inputs.T @ errors / len(errors)}
"""


@pytest.mark.parametrize(("ranks", "method"), [(3, "downpour"), (3, "sandblaster"), (None, "downpour")])
def test_an_exception_in_it_ends_the_job_with_its_traceback(jobs: Jobs, ranks, method) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    done = jobs(ranks, f"optimizer.method={method}")
    assert done.returncode != 0, done.transcript
    assert done.output.count("ZeroDivisionError: one sample too many") >= 1, done.transcript
    assert 'raise ZeroDivisionError("one sample too many")' in done.output, done.transcript
    assert done.seconds < SECONDS * timeout_scale(), done.transcript
    with jobs.checkpoint() as checkpoint:
        assert np.isfinite(checkpoint.parameters()).all()
        assert checkpoint.objective_state()["mean"].tolist() == [1, 1]
    if method == "downpour":
        jobs.assert_whole()


CALLBACK = """
import dbmpi
from mpi4py import MPI

class Failing:
    calls = 0

    def METHOD(self, event):
        self.calls += 1
        if self.calls == 2 and MPI.COMM_WORLD.rank == RANK:
            raise ZeroDivisionError("one event too many")

dbmpi.train(dbmpi.load("config.toml"), callbacks=Failing())
"""


@pytest.mark.parametrize(
    ("method", "callback", "rank"),
    [("downpour", "on_step", 2), ("downpour", "on_evaluation", 0), ("sandblaster", "on_step", 0)],
)
def test_an_exception_in_a_callback_ends_the_job_with_its_traceback(jobs: Jobs, method, callback, rank) -> None:
    """And what was learned before is kept, also where it is the lead that fails."""
    configuration = (jobs.directory / "config.toml").read_text().replace("evaluate_epochs = 0", "evaluate_epochs = 1")
    configuration = configuration.replace("epochs = 2", f"epochs = 100000\nmethod = {method!r}")
    (jobs.directory / "config.toml").write_text(configuration)
    (jobs.directory / "mine.py").write_text(CALLBACK.replace("METHOD", callback).replace("RANK", str(rank)))
    done = jobs.launch(3, [sys.executable, "mine.py"], cwd=jobs.directory)
    assert done.returncode != 0, done.transcript
    assert 'raise ZeroDivisionError("one event too many")' in done.output, done.transcript
    assert done.seconds < SECONDS * timeout_scale(), done.transcript
    assert not done.left
    with jobs.checkpoint() as checkpoint:
        assert np.isfinite(checkpoint.parameters()).all()


def test_a_checkpoint_runs_no_code_that_is_not_allowed(jobs: Jobs) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE.replace("self.calls == 20", "False"))
    done = jobs(None, "optimizer.epochs=2")
    assert done.returncode == 0, done.transcript
    (jobs.directory / "mine.py").write_text("raise SystemExit('this was run')")
    words = [sys.executable, "-m", "dbmpi", "evaluate", "run", "--data", "test.h5"]
    refused = jobs.launch(None, words, cwd=jobs.directory)
    assert refused.returncode == 2, refused.transcript
    assert "this was run" not in refused.output
    assert "--allow-code mine.py" in messages(refused)[0], refused.transcript
    (jobs.directory / "mine.py").write_text(MINE)
    allowed = jobs.launch(None, [*words, "--allow-code", "mine.py"], cwd=jobs.directory)
    assert allowed.returncode == 0, allowed.transcript
    assert "loss" in allowed.stdout, allowed.transcript
