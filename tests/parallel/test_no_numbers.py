"""Outputs that are NaN or infinite are never right, whoever evaluates them and however the network is cut."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from parallel import tiny
from unit.checkpoint_files import as_version_1

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.data.source import Source
from dbmpi.mpi import waiting
from dbmpi.objective import Outcome
from dbmpi.runs.inference import Inference
from dbmpi.runs.training import train

HUGE = 3e38
"""Times the weights of the first layer, an input of this size overflows."""


@pytest.fixture
def place(comm, shared_path) -> Path:
    if comm.rank == 0:
        tiny.write_data(shared_path)
        with h5py.File(shared_path / "test.h5", "r+") as file:
            file["inputs"][::4] = HUGE
    waiting.barrier(comm, "the data")
    return shared_path


def describe(place: Path, loss: str, partitions: int, **optimizer: object) -> Run:
    layers = ({"units": 8, "activation": "linear", "initial_scale": 100.0}, {"units": tiny.CLASSES})
    return tiny.describe(
        place,
        network={"layers": layers, "loss": loss},
        topology={"partitions": partitions, "colocate": True},
        optimizer={"learning_rate": 1e-6, "rule": "sgd", "batch_size": 6, "epochs": 2} | optimizer,
    )


def naive(place: Path, checkpoint: Path) -> tuple[int, int]:
    """Return how many samples are right, and how many have outputs that are no numbers."""
    with h5py.File(place / "test.h5") as file:
        values, classes = file["inputs"][()].astype(np.float64), file["targets"][()]
    with Checkpoint.open(checkpoint) as opened:
        tensors = opened.layout.views(opened.parameters())
    limit = float(np.finfo(np.float32).max)
    with np.errstate(all="ignore"):
        for layer in ("dense1", "dense2"):
            values = values @ tensors[f"{layer}/weights"].T.astype(np.float64) + tensors[f"{layer}/bias"]
            values[np.abs(values) > limit] = np.nan  # infinities of both signs meet in the second layer
    broken = np.isnan(values).any(axis=1)
    return int((np.where(broken, -1, values.argmax(axis=1)) == classes).sum()), int(broken.sum())


@pytest.mark.parallel([1, 2, 4], timeout=300)
@pytest.mark.parametrize("loss", ["softmax", "logistic", "squared"])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_the_test_data_of_a_run(comm, place, capfd, loss, method) -> None:
    run = describe(place, loss, min(comm.size, 2), method=method)
    run = run.model_copy(update={"monitor": run.monitor.model_copy(update={"progress": "lines"})})
    result = train(run, comm)
    assert result.test is not None
    right, broken = naive(place, result.checkpoint)
    assert 0 < broken < tiny.TEST_SAMPLES
    assert (result.test.samples, result.test.correct) == (tiny.TEST_SAMPLES, right)
    assert not result.test.are_numbers
    if comm.rank == 0:
        assert "some outputs for the test data are NaN or infinite" in capfd.readouterr().out


@pytest.mark.parallel([1, 2, 4], timeout=300)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_checkpoint_with_a_parameter_that_is_none(comm, place, value) -> None:
    run = describe(place, "softmax", min(comm.size, 2))
    result = train(run, comm)
    if comm.rank == 0:
        with h5py.File(result.checkpoint, "r+") as file:
            as_version_1(file)
            file["parameters/dense2/weights"][1, 2] = value
    waiting.barrier(comm, "the damage")
    for partitions in [number for number in range(1, comm.size + 1) if comm.size % number == 0]:
        with Inference(place / "run", comm, partitions, batch_size=5) as inference:
            assert inference.broken_parameters() == ("dense2/weights",)
            with Source.open(place / "test.h5", 100) as source:
                outcome: Outcome = inference.evaluate(source)
                rows = [rows for _, rows in inference.predict(source)]
            assert (outcome.correct, outcome.are_numbers) == (0, False) if np.isnan(value) else not outcome.are_numbers
            if comm.rank == 0:
                outputs = np.concatenate(rows)
                assert np.isnan(outputs).all(axis=1).sum() >= (len(outputs) if np.isnan(value) else 1)
            else:
                assert rows == []


@pytest.mark.parallel([1, 2])
def test_reconstructions(comm, shared_path) -> None:
    if comm.rank == 0:
        images = np.random.default_rng(4).normal(size=(24, 1, 6, 6))
        tiny.write_file(shared_path / "train.h5", images, np.zeros(24, np.int64), 1)
        tiny.write_file(shared_path / "test.h5", np.full_like(images, HUGE), np.zeros(24, np.int64), 1)
    waiting.barrier(comm, "the data")
    layers = ({"type": "local", "maps": 2, "field": 3, "reconstruction": 1.0}, {"type": "pooling", "size": 2})
    run = tiny.describe(
        shared_path,
        network={"layers": layers, "loss": "reconstruction"},
        topology={"partitions": comm.size, "colocate": True},
        optimizer={"learning_rate": 1e-6, "rule": "sgd", "batch_size": 6, "epochs": 1},
    )
    result = train(run, comm)
    assert result.test is not None
    assert not result.test.are_numbers
    assert result.test.accuracy is None
