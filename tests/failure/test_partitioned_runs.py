"""``dbmpi train`` with a user's own layer and with explicit placements: the same whatever the cut, or refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from failure.jobs import Jobs
from failure.test_bad_input import assert_refused, snapshot
from harness.launching import Completed
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import load
from dbmpi.network.own import from_directory

pytestmark = pytest.mark.timeout(180)  # several programs one after the other; the first one may have to compile
EXAMPLES = Path(__file__).parents[2] / "examples"
MAXOUT = f"""
code = "{EXAMPLES}"

[[network.layers]]
type = "own_layer:Maxout"
units = 5
pieces = 3
"""


LAST = "\n[[network.layers]]\nunits = 3"


def own_layer(jobs: Jobs, network: str = MAXOUT, last: str = "") -> None:
    """Put a layer of one's own in the place of the first one, and of the last."""
    path = jobs.directory / "config.toml"
    text = path.read_text()
    first = text[text.index("\n[[network.layers]]") : text.index(LAST)]
    text = text.replace(first, network)
    path.write_text(text.replace(LAST, f'{LAST}\ntype = "{last}"') if last else text)


def learned(jobs: Jobs, place: str) -> np.ndarray:
    with Checkpoint.open(jobs.directory / place) as checkpoint:
        return checkpoint.parameters()


@pytest.mark.parametrize("partitions", [1, 2, 3, 4])
def test_an_own_layer_is_cut_trained_and_stored_like_any_other(jobs: Jobs, partitions: int) -> None:
    own_layer(jobs)
    topology = ("shards=1", "replicas=1", f"partitions={partitions}", "colocate=true")
    done = jobs(partitions, *(f"topology.{setting}" for setting in topology))
    assert done.returncode == 0, done.transcript
    told = done.output.count(f"{partitions} partitions: maxout1 {partitions}, dense2")
    assert told == (partitions > 1), done.transcript
    run = load(jobs.directory / "config.toml")
    expected = tiny.Twin(run, from_directory(run.network.code)).learn()
    np.testing.assert_allclose(learned(jobs, "run"), expected, rtol=1e-4, atol=1e-5)


def test_an_own_layer_may_be_the_last(jobs: Jobs) -> None:
    own_layer(jobs, last="own_layer:Maxout")
    done = jobs(2, "topology.shards=1", "topology.replicas=1", "topology.partitions=2", "topology.colocate=true")
    assert done.returncode == 0, done.transcript
    assert "maxout1 2, maxout2 2" in done.output, done.transcript
    run = load(jobs.directory / "config.toml")
    expected = tiny.Twin(run, from_directory(run.network.code)).learn()
    np.testing.assert_allclose(learned(jobs, "run"), expected, rtol=1e-4, atol=1e-5)


def test_own_layers_that_cannot_be_are_told_once(jobs: Jobs) -> None:
    (jobs.directory / "mine.py").write_text("import dbmpi\nclass Layer:\n    pass\n")
    own_layer(jobs, '\n[[network.layers]]\ntype = "mine:Layer"\n')
    before = snapshot(jobs.directory)
    assert_refused(jobs(3), "layer 'layer1': mine:Layer is no layer: it has no input_box")
    source = (EXAMPLES / "own_layer.py").read_text()
    wrong = source.replace("largest_piece(parameters", "return outputs.astype(float)[:1]; largest_piece(parameters")
    assert wrong != source
    (jobs.directory / "wrong_layer.py").write_text(wrong)
    done = jobs(2, "network.layers.0.type=wrong_layer:Maxout", "network.layers.0.units=4")
    assert_refused(done, "layer 'maxout1': forward returns float64 (1, 3)", "'outputs', float32 (2, 3)")
    (jobs.directory / "wrong_layer.py").unlink()
    after = snapshot(jobs.directory)
    assert {name: kept for name, kept in after.items() if "__pycache__" not in name} == before


def test_placements_by_the_configuration(jobs: Jobs) -> None:
    """Boxes of one's own, uneven weights, and workers that own nothing of a layer: all learn the same."""
    assert jobs(None, "run.directory=run-1").returncode == 0
    base = ("topology.shards=1", "topology.replicas=1", "topology.colocate=true")
    placements = {
        "boxes": (3, 'layers.dense1.boxes=["0:1", "", "1:7"]', "3 partitions: dense1 2 (1 idle), dense2 3 by inputs;"),
        "weights": (4, "weights=[1, 2, 4, 1]", "4 partitions: dense1 4, dense2 2 (2 idle)"),
    }
    for name, (partitions, setting, told) in placements.items():
        settings = (f"topology.partitions={partitions}", f"placement.{setting}", f"run.directory=run-{name}")
        done = jobs(partitions, *base, *settings)
        assert done.returncode == 0, done.transcript
        assert done.output.count(told) == 1, done.transcript
        np.testing.assert_allclose(learned(jobs, f"run-{name}"), learned(jobs, "run-1"), rtol=1e-4, atol=1e-5)


WRONG = {
    "gap": ('layers.dense1.boxes=["0:3", "4:7"]', ("layer 'dense1': 1 of 7 outputs belong to no partition", "[3:4]")),
    "overlap": ('layers.dense1.boxes=["0:4", "3:7"]', ("layer 'dense1'", "overlap in [3:4]")),
    "unknown layer": ('layers.dense7.split="outputs"', ("there is no layer 'dense7'", "dense1, dense2")),
    "no weight": ("weights=[1, 0]", ("placement.weights.1", "greater than 0")),
}


@pytest.mark.parametrize("case", WRONG)
def test_placements_that_cannot_be_are_told_once(jobs: Jobs, case: str) -> None:
    setting, words = WRONG[case]
    before = snapshot(jobs.directory)
    done = jobs(2, f"placement.{setting}", "topology.partitions=2", "topology.replicas=1", "topology.colocate=true")
    assert_refused(done, *words)
    assert snapshot(jobs.directory) == before


def test_a_field_larger_than_its_input_is_told_once(jobs: Jobs) -> None:
    for name in ("train", "test"):
        tiny.write_file(jobs.directory / f"{name}.h5", np.zeros((9, 2, 5, 6)), np.arange(9) % tiny.CLASSES)
    own_layer(jobs, '\n[[network.layers]]\ntype = "local"\nmaps = 2\nfield = [3, 7]\n')
    before = snapshot(jobs.directory)
    done = jobs(2, "topology.partitions=2", "topology.replicas=1", "topology.colocate=true")
    assert_refused(done, "layer 'local1'", "(3, 7)", "(2, 5, 6)")
    assert snapshot(jobs.directory) == before


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

    allowed = ("--allow-code", str(EXAMPLES / "own_layer.py"))
    outcomes = []
    for n, partitions in ((None, ()), (4, ("--partitions", "2"))):
        done = run(n, "evaluate", "--json", *allowed, *partitions)
        assert done.returncode == 0, done.transcript
        outcomes.append(json.loads(done.stdout))
    assert outcomes[1] == outcomes[0] | {"loss": pytest.approx(outcomes[0]["loss"], rel=1e-5)}
    files = []
    for n in (None, 3):
        done = run(n, "predict", "--out", f"out-{n}.h5", *allowed)
        assert done.returncode == 0, done.transcript
        assert done.stdout.count("outputs 17 x 3, classes") == 1, done.transcript
        with h5py.File(jobs.directory / f"out-{n}.h5") as file:
            files.append((file["outputs"][()], file["classes"][()].tolist(), dict(file.attrs)))
    np.testing.assert_allclose(files[1][0], files[0][0], rtol=1e-4, atol=1e-6)
    assert files[1][1:] == files[0][1:]
    assert_refused(run(3, "evaluate", *allowed, "--partitions", "2"), "--partitions 2: 3 ranks cannot be replicas of 2")
    assert_refused(run(2, "predict", "--out", "test.h5", "--force", *allowed), "test.h5: is the file to read from")
