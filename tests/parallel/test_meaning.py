"""Runs compare what their samples stand for: the test data, and the data that a checkpoint has learned from."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.data.source import Source
from dbmpi.errors import KnownToAll, UserError
from dbmpi.mpi import waiting
from dbmpi.runs.training import train

LABELS = (-1, 4, 9)


def describe(place: Path, method: str, **sections: dict[str, object]) -> Run:
    optimizer = {"learning_rate": 0.1, "batch_size": 6, "epochs": 2, "method": method}
    return tiny.describe(place, optimizer=optimizer, topology={"colocate": True}, **sections)


def refused(comm, run: Run) -> str:
    """Train in vain; return what the rank says that has found it."""
    with pytest.raises(UserError) as caught:
        train(run, comm)
    said = [text for text in comm.allgather(str(caught.value) if caught.type is KnownToAll else "") if text]
    assert len(said) == 1
    return said[0]


def alter(comm, path: Path, change) -> None:
    """Change a data file, on one rank."""
    if comm.rank == 0:
        with h5py.File(path, "r+") as file:
            change(file)
    waiting.barrier(comm, "the change")


def write_bytes(file: h5py.File, scale: float) -> None:
    rows = len(file["inputs"])
    del file["inputs"]
    file["inputs"] = np.random.default_rng(3).integers(0, 256, (rows, tiny.FEATURES), np.uint8)
    file["inputs"].attrs["scale"] = scale


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_test_data_with_fewer_labels_are_translated(comm, place, method) -> None:
    def label(file: h5py.File) -> None:
        file["targets"].attrs["labels"] = LABELS

    def leave_one_out(file: h5py.File) -> None:
        kept = file["targets"][()] > 0
        inputs, labels = file["inputs"][kept], file["targets"][kept] - 1
        del file["inputs"], file["targets"]
        file["inputs"], file["targets"] = inputs, labels
        file["targets"].attrs["labels"] = LABELS[1:]

    alter(comm, place / "train.h5", label)
    expected = {}
    for name in ("all", "fewer"):
        waiting.barrier(comm, "the other ranks to have read the file")
        alter(comm, place / "test.h5", label if name == "all" else leave_one_out)
        result = train(describe(place, method, run={"directory": place / name}), comm)
        with Checkpoint.open(result.checkpoint) as checkpoint, Source.open(place / "test.h5", 10) as source:
            assert checkpoint.info.meaning.labels == LABELS
            network = tiny.Twin(describe(place, method)).network
            batch = source.batch(np.arange(source.samples))
            if name == "fewer":
                batch = batch._replace(targets=batch.targets + 1)
            expected[name] = network.evaluate(checkpoint.parameters(), batch)
        assert (result.test.samples, result.test.correct) == (len(batch.targets), expected[name].correct)
        assert result.test.loss == pytest.approx(expected[name].loss, rel=1e-5)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_test_data_of_another_kind_are_refused(comm, place, method) -> None:
    alter(comm, place / "train.h5", lambda file: write_bytes(file, 1 / 255))
    alter(comm, place / "test.h5", lambda file: write_bytes(file, 1 / 128))
    assert "learned from bytes times 0.00392" in refused(comm, describe(place, method))
    alter(comm, place / "test.h5", lambda file: file["inputs"].attrs.modify("scale", 1 / 255))
    assert train(describe(place, method), comm).test is not None


@pytest.mark.parallel([1, 2], timeout=300)
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_a_run_goes_on_from_the_same_data_only(comm, place, method) -> None:
    def change(file: h5py.File) -> None:
        file["inputs"][0, 0] += 1

    def go_on(epochs: float) -> Run:
        optimizer = {"learning_rate": 0.1, "batch_size": 6, "epochs": epochs, "method": method}
        return tiny.describe(place, optimizer=optimizer, data={"train": moved}, topology={"colocate": True})

    moved = place / "train.h5"
    train(go_on(2), comm)
    moved = place / "elsewhere.h5"
    if comm.rank == 0:
        shutil.copyfile(place / "train.h5", moved)
    waiting.barrier(comm, "the copy")
    result = train(go_on(3), comm)
    assert result.steps == 7
    alter(comm, moved, change)
    before = tiny.snapshot(place / "run")
    message = refused(comm, go_on(4))
    assert "has learned from other data with as many samples as" in message
    assert "set data.train back" in message
    assert str(result.checkpoint) in message
    assert tiny.snapshot(place / "run") == before
