"""Whole runs whose replicas are cut over several ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.monitor.records import read_records
from dbmpi.network.description import Network
from dbmpi.network.own import from_directory
from dbmpi.replica import placement
from dbmpi.replica.tensors import tensor_boxes
from dbmpi.runs.training import train

EXAMPLES = Path(__file__).parents[2] / "examples"
ONCE = {"align": "partition", "fetch": "shared", "gradients": "layers"}
"""What a model needs that fits in memory but once."""


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
@pytest.mark.parametrize("server", [{}, ONCE | {"overlap": "none"}, ONCE | {"overlap": "threads"}])
def test_replicas_of_two_partitions_with_checkpoints_in_between(comm, place, colocate, server) -> None:
    workers = comm.size if colocate else comm.size - 2
    topology = {"shards": 2, "replicas": workers // 2, "partitions": 2, "colocate": colocate}
    run = tiny.describe(
        place,
        topology=topology,
        server=server,
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


LAYERS = (
    {"type": "dense", "units": 24, "activation": "tanh"},
    {"type": "dense", "units": 10, "activation": "tanh"},
    {"type": "dense", "units": tiny.CLASSES},
)
SPLIT = {"layers": {"dense2": {"split": "inputs"}}}


TOPOLOGIES = {
    1: [(1, 1, True)],
    2: [(1, 1, False), (1, 2, True), (2, 2, True)],
    3: [(2, 1, False), (1, 2, False), (2, 3, True)],
    4: [(3, 1, False), (2, 2, False), (3, 4, True)],
    6: [(4, 2, False), (2, 4, False), (4, 6, True)],
}
"""By ranks: shards, partitions of the one replica, colocated; numbers that divide each other, and that do not."""


def moved(directory: Path) -> dict[int, dict[str, int]]:
    """Return for each partition what its worker has moved."""
    total: dict[int, dict[str, int]] = {}
    for record in read_records(directory):
        if record["kind"] == "worker":
            mine = total.setdefault(record["partition"], {"step": 0})
            for name in ("pushed_bytes", "fetched_bytes", "pushed_chunks", "fetched_pieces"):
                mine[name] = mine.get(name, 0) + record[name]
            mine["step"] = max(mine["step"], record["step"])
    return total


@pytest.mark.parallel([1, 2, 3, 4, 6])
def test_shards_that_follow_partitions_learn_the_same_and_move_the_least(comm, place) -> None:
    """Bit for bit and one piece a shard, also by layers on the shards' memory; and each goes on from the other."""
    for number, (shards, partitions, colocate) in enumerate(TOPOLOGIES[comm.size]):
        topology = {"shards": shards, "replicas": 1, "partitions": partitions, "colocate": colocate}
        learned, pieces = [], []
        for align, other in (("equal", "partition"), ("partition", "equal")):
            run = tiny.describe(
                place,
                run={"directory": place / f"{number}-{align}"},
                network={"layers": LAYERS},
                placement=SPLIT if partitions > 1 else {},
                server={"align": align},
                topology=topology,
                optimizer={"epochs": 2},
            )
            train(run, comm)
            found = moved(run.run.directory)
            pieces.append({partition: mine["fetched_pieces"] for partition, mine in found.items()})
            # The rest is learned under the other alignment.
            more = run.model_copy(
                update={
                    "server": run.server.model_copy(update={"align": other}),
                    "optimizer": run.optimizer.model_copy(update={"epochs": 3.0}),
                }
            )
            train(more, comm)
            learned.append(tiny.vectors(run.run.directory))
            if partitions > 1 and align == "partition":
                common = tiny.describe(
                    place,
                    run={"directory": place / f"{number}-shared"},
                    network={"layers": LAYERS},
                    placement=SPLIT,
                    server=ONCE,
                    topology=topology,
                )
                result = train(common, comm)
                assert result.test is not None
                assert result.test.samples == tiny.TEST_SAMPLES
                assert {mine["fetched_bytes"] for mine in moved(common.run.directory).values()} == {0}
                learned.append(tiny.vectors(common.run.directory))
            network = Network(run.network, (tiny.FEATURES,), run.run.seed)
            placed = placement.from_config(run.placement, network.layers, partitions)
            for partition, mine in found.items() if align == "partition" else ():
                own = sum(box.size for box in tensor_boxes(network.layers, placed, partition).values())
                assert mine["pushed_bytes"] == mine["fetched_bytes"] == 4 * own * mine["step"]
                # One piece for each shard that holds something of this partition.
                most = -(-shards // partitions) if shards % partitions == 0 or partitions % shards == 0 else shards
                assert mine["fetched_pieces"] <= most * mine["step"]
                assert mine["pushed_chunks"] <= most * mine["step"]
        for others in learned[1:]:
            for name, values in learned[0].items():
                np.testing.assert_array_equal(values, others[name])
        if partitions > 1 and comm.rank == 0:
            assert all(pieces[1][partition] < pieces[0][partition] for partition in pieces[1])


MAXOUT = {"type": "own_layer:Maxout", "units": 5, "pieces": 3}


@pytest.mark.parallel([1, 2, 3, 4])
def test_an_own_layer_is_cut_trained_and_stored_like_any_other(comm, place, capfd) -> None:
    lasts = [({"units": tiny.CLASSES}, "dense2"), ({"type": "own_layer:Maxout", "units": tiny.CLASSES}, "maxout2")]
    for last, name in lasts if comm.size == 2 else lasts[:1]:
        run = tiny.describe(
            place,
            run={"directory": place / name},
            network={"code": EXAMPLES, "layers": [MAXOUT, last]},
            topology={"shards": 1, "replicas": 1, "partitions": comm.size, "colocate": True},
            monitor={"progress": "lines"},
        )
        train(run, comm)
        if comm.rank == 0:
            told = capfd.readouterr().out.count(f"{comm.size} partitions: maxout1 {comm.size}, {name}")
            assert told == (comm.size > 1)
            expected = tiny.Twin(run, from_directory(run.network.code)).learn()
            np.testing.assert_allclose(parameters_after(run.run.directory)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parallel([3, 4])
def test_placements_by_the_configuration(comm, place, capfd) -> None:
    """Boxes of one's own, uneven weights, and workers that own nothing of a layer: all learn the same."""
    placed, told = {
        3: ({"layers": {"dense1": {"boxes": ("0:1", "", "1:7")}}}, "dense1 2 (1 idle), dense2 3 by inputs;"),
        4: ({"weights": (1, 2, 4, 1)}, "dense1 4, dense2 2 (2 idle)"),
    }[comm.size]
    topology = {"shards": 1, "replicas": 1, "partitions": comm.size, "colocate": True}
    run = tiny.describe(place, topology=topology, placement=placed, monitor={"progress": "lines"})
    train(run, comm)
    if comm.rank == 0:
        assert capfd.readouterr().out.count(f"{comm.size} partitions: {told}") == 1
        np.testing.assert_allclose(parameters_after(run.run.directory)[0], tiny.Twin(run).learn(), rtol=1e-4, atol=1e-5)
