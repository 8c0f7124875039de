"""Runs over several files, and over inputs that are normalised when they are used, equal those from one plain file."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.mpi import waiting
from dbmpi.runs.training import train

MEAN, DEVIATION = np.arange(tiny.FEATURES, dtype=np.float32), np.float32(2)


@pytest.fixture
def files(comm, shared_path):
    """The samples of ``train.h5`` as they are used, raw in three files, and raw in two arrays of NumPy and HDF5."""
    if comm.rank == 0:
        tiny.write_data(shared_path)
        for name in ("train", "test"):
            with h5py.File(shared_path / f"{name}.h5", "r+") as file:
                used, targets = file["inputs"][()], file["targets"][()]
                raw = np.round(used * DEVIATION + MEAN, 3).astype(np.float32)
                file["inputs"][...] = (raw - MEAN) * np.float32(1 / DEVIATION)
            np.save(shared_path / f"{name}-x.npy", raw)
            for number, rows in enumerate(np.array_split(np.arange(len(raw)), 3)):
                path = shared_path / f"{name}-{number}.h5"
                tiny.write_file(path, raw[rows], targets[rows])
                with h5py.File(path, "r+") as file:
                    file["inputs"].attrs.update(subtract=MEAN, divide=np.full(tiny.FEATURES, DEVIATION))
    waiting.barrier(comm, "the data")
    return shared_path


def learned(comm, place: Path, name: str, method: str, **data: object):
    run = tiny.describe(
        place,
        run={"directory": place / name},
        data=data,
        optimizer={"method": method, "epochs": 2, "batch_size": 6, "learning_rate": 0.1},
        topology={"shards": 1, "replicas": 1, "partitions": max(comm.size - 1, 1), "colocate": comm.size == 1},
    )
    result = train(run, comm)
    return tiny.vectors(result.checkpoint)["parameters"], result


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_runs_over_several_files_learn_what_those_over_one_learn(comm, files, method) -> None:
    expected, of_one = learned(comm, files, "one", method)
    pattern = {
        "train": files / "train-[0-9].h5",
        "test": (files / "test-0.h5", files / "test-1.h5", files / "test-2.h5"),
    }
    # The test data are raw, too: inputs alone are in their file, which says nothing of what is done to them.
    apart = {"inputs": files / "test-x.npy", "targets": Path(f"{files}/test.h5:/targets")}
    for name, data in (("many", pattern), ("apart", {**pattern, "test": apart})):
        found, result = learned(comm, files, name, method, **data)
        np.testing.assert_array_equal(found, expected)
        assert (result.test.samples, result.test.correct) == (of_one.test.samples, of_one.test.correct)
        assert result.test.mean_loss == pytest.approx(of_one.test.mean_loss, rel=1e-6)
        with Checkpoint.open(result.checkpoint) as checkpoint:
            assert checkpoint.info.meaning.subtract == tuple(MEAN.tolist())
