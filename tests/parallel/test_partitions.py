"""Whole runs whose replicas are cut over several ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.monitor.records import read_records
from dbmpi.train import train


@pytest.fixture
def place(comm, tmp_path_factory) -> Path:
    """A directory that all ranks share, with the tiny data in it."""
    name = np.zeros(256, np.uint8)
    if comm.rank == 0:
        directory = tmp_path_factory.mktemp("run")
        tiny.write_data(directory)
        name[: len(str(directory))] = np.frombuffer(str(directory).encode(), np.uint8)
    comm.Bcast(name, 0)
    return Path(name.tobytes().rstrip(b"\0").decode())


def parameters_after(directory: Path) -> tuple[np.ndarray, tuple[int, int]]:
    with Checkpoint.open(directory) as checkpoint:
        return checkpoint.parameters(), (checkpoint.info.step, checkpoint.info.samples)


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_one_replica_of_several_partitions_learns_what_one_rank_learns(comm, place, rule) -> None:
    """Shards that hold nothing of the first partition still count its steps."""
    for shards in range(1, comm.size - 1):
        run = tiny.describe(
            place,
            run={"directory": place / f"cut-{shards}"},
            optimizer={"rule": rule},
            topology={"shards": shards, "replicas": 1, "partitions": comm.size - shards},
        )
        result = train(run, comm)
        if comm.rank == 0:
            learned, counts = parameters_after(run.run.directory)
            twin = tiny.Twin(run)
            expected = twin.learn()
            np.testing.assert_allclose(learned, expected, rtol=1e-4, atol=1e-5)
            assert counts == (21, 3 * tiny.SAMPLES)
            assert result.test is not None
            assert result.test.samples == tiny.TEST_SAMPLES


@pytest.mark.parallel([4, 6])
@pytest.mark.parametrize("colocate", [False, True])
def test_replicas_of_two_partitions_with_checkpoints_in_between(comm, place, colocate) -> None:
    workers = comm.size if colocate else comm.size - 2
    topology = {"shards": 2, "replicas": workers // 2, "partitions": 2, "colocate": colocate}
    run = tiny.describe(
        place,
        topology=topology,
        optimizer={"warmstart": 5, "epochs": 8},
        checkpoint={"every_seconds": 0.02},
        monitor={"evaluate_epochs": 2},
    )
    result = train(run, comm)
    if comm.rank == 0:
        _, counts = parameters_after(run.run.directory)
        assert counts == (8 * 7, 8 * tiny.SAMPLES)
        assert result.steps == 8 * 7
        assert result.test is not None
        assert result.test.accuracy is not None
        assert result.test.accuracy > 0.8
        reports = [record for record in read_records(run.run.directory) if record["kind"] == "worker"]
        for partition in (0, 1):
            mine = [record for record in reports if record["partition"] == partition]
            assert sum(record["seconds"]["exchange"] for record in mine) > 0
            assert all(record["layers"][name] > 0 for record in mine for name in ("forward 1", "backward 2"))
