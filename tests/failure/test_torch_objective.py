"""A module of PyTorch in jobs that are killed, or whose code fails: what was learned is kept, the statistics too."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from failure.jobs import FOR_EVER, SECONDS, Jobs
from harness.environment import timeout_scale

pytest.importorskip("torch", reason="needs PyTorch: the extra dbmpi[torch]")

CONFIGURATION = """
[run]
directory = "run"
[data]
train = "train.h5"
test = "test.h5"
[objective]
use = "mine:Mine"
[optimizer]
learning_rate = 0.01
batch_size = 6
epochs = 2
[checkpoint]
every_seconds = 0
resume = "auto"
[monitor]
report_seconds = 0.1
evaluate_epochs = 0
progress = "lines"
"""
MINE = """
import torch
from mpi4py import MPI
from torch import nn
import dbmpi.torch

class Broken(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == FAILS and MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
            raise ZeroDivisionError("one sample too many")
        return x

class Mine(dbmpi.torch.ModuleObjective):
    def __init__(self):
        torch.manual_seed(1)
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sigmoid(), Broken(), nn.Linear(8, 3)
        super().__init__(nn.Sequential(*layers), nn.functional.cross_entropy)
"""


def test_a_killed_run_goes_on_with_the_statistics_of_its_last_checkpoint(jobs: Jobs) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE.replace("FAILS", "-1"))
    program = jobs.start(3, f"optimizer.epochs={FOR_EVER}", "checkpoint.every_seconds=0.2")
    jobs.wait_until_all_learn(program, 2)
    jobs.wait_for_checkpoint(program)
    program.signal(signal.SIGKILL, 1)
    done = jobs.finish(program)
    assert done.returncode != 0, done.transcript
    with jobs.checkpoint() as checkpoint:
        before = checkpoint.objective_state()
    assert before["1.num_batches_tracked"] > 0
    jobs.assert_resumes()
    with jobs.checkpoint() as checkpoint:
        after = checkpoint.objective_state()
    assert after["1.num_batches_tracked"] > before["1.num_batches_tracked"]


def test_an_exception_in_the_module_ends_the_job_with_its_traceback(jobs: Jobs) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE.replace("FAILS", "20"))
    done = jobs(3, f"optimizer.epochs={FOR_EVER}")
    assert done.returncode != 0, done.transcript
    assert 'raise ZeroDivisionError("one sample too many")' in done.output, done.transcript
    assert done.seconds < SECONDS * timeout_scale(), done.transcript
    with jobs.checkpoint() as checkpoint:
        assert np.isfinite(checkpoint.parameters()).all()
        assert checkpoint.objective_state()["1.num_batches_tracked"] > 0
