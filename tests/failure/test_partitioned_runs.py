"""Commands with partitions and a user's own layer, under a launcher; what they learn is tested in ``parallel``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from failure.jobs import Jobs
from failure.test_bad_input import assert_refused
from harness.launching import Completed
from parallel import tiny

from dbmpi.data.source import Source
from dbmpi.runs.inference import Inference

pytestmark = pytest.mark.timeout(180)  # several programs one after the other; the first one may have to compile
EXAMPLES = Path(__file__).parents[2] / "examples"
MAXOUT = f"""
code = "{EXAMPLES}"

[[network.layers]]
type = "own_layer:Maxout"
units = 5
pieces = 3
"""


def own_layer(jobs: Jobs) -> None:
    """Put a layer of one's own in the place of the first one."""
    path = jobs.directory / "config.toml"
    text = path.read_text()
    start = text.index("\n[[network.layers]]")
    path.write_text(text[:start] + MAXOUT + text[text.index("\n[[network.layers]]", start + 1) :])


def test_a_network_is_measured_over_partitions(jobs: Jobs) -> None:
    argv = [sys.executable, "-m", "dbmpi", "bench", "network", "config.toml", "--input-shape", "6", "--set"]
    done = jobs.launch(2, [*argv, "topology.partitions=2", "--steps", "2"], cwd=jobs.directory)
    assert done.returncode == 0, done.transcript
    assert done.stdout.count("slowest rank: forward, backward, exchange") == 1, done.transcript
    assert done.stdout.count("every worker reads the inputs that it needs") == 1, done.transcript
    assert_refused(jobs.launch(2, [*argv, "topology.partitions=3"], cwd=jobs.directory), "2 ranks started")


def test_evaluate_and_predict_under_a_launcher(jobs: Jobs) -> None:
    own_layer(jobs)
    assert jobs(2, "topology.partitions=2", "topology.replicas=1", "topology.colocate=true").returncode == 0

    def run(n: int | None, command: str, *words: str) -> Completed:
        argv = [sys.executable, "-m", "dbmpi", command, "run", "--data", "test.h5", "--batch-size", "5", *words]
        return jobs.launch(n, argv, cwd=jobs.directory)

    code = EXAMPLES / "own_layer.py"
    allowed = ("--allow-code", str(code))
    test = jobs.directory / "test.h5"
    with Inference(jobs.run_directory, code=[code]) as alone, Source.open(test, 100) as source:
        expected = alone.evaluate(source)
        outputs = np.concatenate([rows for _, rows in alone.predict(source)])
        step = alone.trained.info.step
    done = run(4, "evaluate", "--json", *allowed, "--partitions", "2")
    assert done.returncode == 0, done.transcript
    # Not json.loads: mpirun may write a byte more than it was given.
    found, _ = json.JSONDecoder().raw_decode(done.stdout, done.stdout.index("{"))
    assert (found["step"], found["samples"], found["correct"]) == (step, tiny.TEST_SAMPLES, expected.correct)
    assert found["loss"] == pytest.approx(expected.mean_loss, rel=1e-5)
    done = run(3, "predict", "--out", "out.h5", *allowed)
    assert done.returncode == 0, done.transcript
    assert done.stdout.count("probabilities 17 x 3, classes") == 1, done.transcript
    with h5py.File(jobs.directory / "out.h5") as file:
        np.testing.assert_allclose(file["outputs"], outputs, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(file["classes"], outputs.argmax(axis=1))
        assert file.attrs["step"] == step
    assert_refused(run(2, "predict", "--out", "test.h5", "--force", *allowed), "test.h5: is the file to read from")
