"""Sweeps under the real launcher: runs that fail, are refused or lose a rank, beside others that come to their end."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys

import numpy as np
import pytest
from failure.jobs import FOR_EVER, Jobs
from failure.survival import FAULT_TOLERANCE
from harness.programs import Program
from parallel import tiny

from dbmpi.config.reading import read

pytestmark = pytest.mark.timeout(180)


def start(jobs: Jobs, ranks: int, *words: str, options: str = "", env: dict[str, str] | None = None) -> Program:
    """Start a sweep by ``dbmpi launch``; `words` are those behind the configuration."""
    command = ["launch", "-n", str(ranks), f"--mpi-args={options}", "--", "sweep", "config.toml", *words]
    return jobs.launch.start(None, [sys.executable, "-m", "dbmpi", *command], env=env, cwd=jobs.directory)


def test_runs_that_fail_leave_the_others_alone(jobs: Jobs) -> None:
    """Two blocks of two ranks; a diverging run and one of a rank that raises come before others of the same block."""
    (jobs.directory / "own.py").write_text(
        "def transform(batch, random):\n"
        "    if random.integers(4) == 0:\n        raise RuntimeError('no more batches')\n    return batch\n"
        "def nothing(batch, random):\n    return batch\n"
    )
    rates, transforms = ("1e38", "0.01", "0.05"), ("own:transform", "own:nothing")
    words = ["--ranks", "2", "--set", f"optimizer.learning_rate={','.join(rates)}"]
    words += ["--set", f"data.transform={','.join(transforms)}", "--set", "network.code=."]
    done = jobs.finish(start(jobs, 4, *words), 90)
    assert done.returncode == 1, done.transcript
    assert "6 runs, 2 at a time on 2 ranks each" in done.stdout
    assert "2 of 6 runs done" in done.stdout, done.transcript
    table = json.loads((jobs.run_directory / "sweep.json").read_text())["runs"]
    assert [each["status"] for each in table] == ["done"] * 2 + ["failed"] * 4
    assert table[0]["test_loss"] <= table[1]["test_loss"]
    errors = {each["optimizer.learning_rate"] + each["data.transform"]: each["error"] for each in table}
    assert "not finite" in errors["1e38own:nothing"]
    for rate in rates[1:]:
        assert "no more batches" in errors[f"{rate}own:transform"]
        assert errors[f"{rate}own:nothing"] == ""
    with (jobs.run_directory / "sweep.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == [each["run"] for each in table]
    # One replica and one shard learn what the serial loop does, to the last bit.
    for each in table[:2]:
        overrides = [f"optimizer.learning_rate={each['optimizer.learning_rate']}"]
        twin = tiny.Twin(read(jobs.directory / "config.toml", overrides))
        np.testing.assert_array_equal(tiny.vectors(jobs.directory / each["checkpoint"])["parameters"], twin.learn())


def test_a_mistake_in_one_run_is_refused_before_any_begins(jobs: Jobs) -> None:
    done = jobs.finish(start(jobs, 2, "--set", "optimizer.batch_size=5,0"), 60)
    assert done.returncode == 2, done.transcript
    assert done.stderr.count("dbmpi: ") == 1
    assert "--set optimizer.batch_size=0" in done.stderr
    assert not jobs.run_directory.exists()


def test_a_signal_ends_all_runs_with_checkpoints(jobs: Jobs) -> None:
    program = start(
        jobs, 2, "--ranks", "1", "--set", "optimizer.batch_size=5,6,7", "--set", f"optimizer.epochs={FOR_EVER}"
    )
    for size in (5, 6):
        jobs.wait_for(program, (jobs.run_directory / f"batch_size={size}" / "records" / "worker-0.jsonl").exists)
    os.kill(program.process.pid, signal.SIGINT)
    done = jobs.finish(program, 60)
    assert done.returncode == 128 + signal.SIGINT, done.transcript
    table = json.loads((jobs.run_directory / "sweep.json").read_text())["runs"]
    assert {each["run"]: each["status"] for each in table} == {
        "batch_size=5": "stopped",
        "batch_size=6": "stopped",
        "batch_size=7": "not run",
    }
    for each in table[:2]:
        assert (jobs.directory / each["checkpoint"]).exists()


@pytest.mark.usefixtures("needs_fault_tolerance")
def test_a_block_that_loses_a_rank_leaves_the_rest_to_the_others(jobs: Jobs) -> None:
    words = ["--ranks", "2", "--set", f"optimizer.epochs=2,{FOR_EVER},3,4"]
    program = start(jobs, 4, *words, options=FAULT_TOLERANCE)
    endless = jobs.run_directory / f"epochs={FOR_EVER}" / "records" / "worker-0.jsonl"
    jobs.wait_for(program, endless.exists)
    # The shard of the run that has no end: its block holds two of the ranks.
    lock = next((jobs.run_directory / f"epochs={FOR_EVER}").glob("in-use.*.json"))
    os.kill(json.loads(lock.read_text())["process"], signal.SIGKILL)
    done = jobs.finish(program, 90)
    table = json.loads((jobs.run_directory / "sweep.json").read_text())["runs"]
    states = {each["optimizer.epochs"]: each["status"] for each in table}
    assert states == {"2": "done", "3": "done", "4": "done", str(FOR_EVER): "failed"}, done.transcript
    assert done.returncode == 1, done.transcript
