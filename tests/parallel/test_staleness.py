"""Staleness, acted on: bounds hold for every push at every shard, whoever is slow, and all batches are accounted for.

Gradients are whole numbers that follow from the number of the batch, and the rate is 1, so that sums are exact.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.monitor.records import Record, read_records
from dbmpi.runs.training import train

EPOCHS = 6
BATCHES = -(-tiny.SAMPLES // 6) * EPOCHS
SHAPES = {"weights": (5, 4), "bias": (7,)}


def whole_numbers(batch: int) -> np.ndarray:
    """Return the gradient of a batch, flat."""
    return np.random.default_rng(batch).integers(-8, 8, sum(map(np.prod, SHAPES.values()))).astype(np.float32)


class Uneven:
    """Takes longer for some batches than for others, so that others push meanwhile."""

    def __init__(self) -> None:
        self.parameters = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}

    def loss_and_gradient(self, parameters, batch):
        time.sleep(0.02 if batch.step % 7 == 0 else 0.001 * (batch.step % 3))
        flat, gradient = whole_numbers(batch.step), {}
        for name, shape in SHAPES.items():
            gradient[name], flat = flat[: np.prod(shape)].reshape(shape), flat[np.prod(shape) :]
        return 1.0, gradient

    def evaluate(self, parameters, batch):
        return 1.0


def describe(place: Path, **sections) -> Run:
    optimizer = {"rule": "sgd", "learning_rate": 1.0, "epochs": EPOCHS} | sections.pop("optimizer", {})
    return tiny.describe(place, network={"layers": ()}, optimizer=optimizer, **sections)


def shard_records(place: Path) -> list[Record]:
    return [record for record in read_records(place / "run") if record["kind"] == "shard"]


def stalest(place: Path) -> int:
    """Return the largest staleness of all pushes that any shard has applied."""
    return max(int(key) for record in shard_records(place) for key in record["staleness_histogram"])


def dropped(place: Path) -> dict[int, int]:
    """Return the pushes that each shard has dropped."""
    return {record["number"]: record["discarded"] for record in shard_records(place)}


def applied(place: Path) -> dict[int, int]:
    return {record["number"]: record["pushes"] for record in shard_records(place)}


TOPOLOGIES = {
    1: {"shards": 1, "colocate": True},
    2: {"shards": 2, "colocate": True},
    3: {"shards": 1},
    4: {"shards": 2, "replicas": 4, "colocate": True},
    6: {"shards": 2},
}
WAYS = {
    "in place": {},
    "messages": {"push": "copied", "transport": "p2p"},
    "one-sided": {"push": "copied", "transport": "rma"},
    "consistent": {"consistent": True},
    "shared": {"fetch": "shared"},
}


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)
@pytest.mark.parametrize("way", WAYS)
def test_no_push_is_applied_that_is_too_stale_and_every_batch_counts(comm, place, way) -> None:
    server = WAYS[way] | {"max_staleness": 1, "on_stale": "discard"}
    result = train(describe(place, server=server, topology=TOPOLOGIES[comm.size]), comm, objective=Uneven())
    assert stalest(place) <= 1
    assert (result.steps, result.samples) == (BATCHES, EPOCHS * tiny.SAMPLES)
    assert result.discarded == sum(dropped(place).values())
    for shard, pushes in applied(place).items():
        assert pushes + dropped(place)[shard] == BATCHES
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.step, info.frontier, info.holes, info.samples) == (BATCHES, BATCHES, (), EPOCHS * tiny.SAMPLES)
    assert info.shard_versions == tuple(pushes for _, pushes in sorted(applied(place).items()))
    if comm.size in (4, 6):
        assert result.discarded > 0
    if comm.size == 1:
        expected = -sum(whole_numbers(batch) for batch in range(BATCHES))
        np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bound", [1, 4])
def test_replicas_wait_rather_than_become_too_stale(comm, place, way, bound) -> None:
    server = WAYS[way] | {"max_staleness": bound}
    result = train(describe(place, server=server, topology=TOPOLOGIES[comm.size]), comm, objective=Uneven())
    assert stalest(place) <= bound
    assert (result.steps, result.samples, result.discarded) == (BATCHES, EPOCHS * tiny.SAMPLES, 0)
    assert set(applied(place).values()) == {BATCHES}
    expected = -sum(whole_numbers(batch) for batch in range(BATCHES))
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)


STEPS = [
    {"n_push": 1, "n_fetch": 3},
    {"n_push": 3, "n_fetch": 1},
    {"n_push": 3, "n_fetch": 3},
    {"n_push": 2, "n_fetch": 3, "local_rate": 0.01},
    {"n_push": 5, "n_fetch": 4, "accumulate": "mean"},
]


@pytest.mark.parallel([1, 3, 4], timeout=300)
@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("on_stale", ["wait", "discard"])
def test_bounds_hold_where_several_steps_share_a_fetch_or_a_push(comm, place, steps, on_stale) -> None:
    server = {"max_staleness": 3, "on_stale": on_stale}
    run = describe(place, server=server, topology=TOPOLOGIES[comm.size], optimizer=steps)
    result = train(run, comm, objective=Uneven())
    assert stalest(place) <= 3
    assert (result.steps, result.samples) == (BATCHES, EPOCHS * tiny.SAMPLES)
    assert (result.discarded == 0) or on_stale == "discard"
    if on_stale == "wait" and "accumulate" not in steps:
        expected = -sum(whole_numbers(batch) for batch in range(BATCHES))
        np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)


@pytest.mark.parallel([3, 4], timeout=300)
@pytest.mark.parametrize("on_stale", ["wait", "discard"])
def test_bounds_hold_through_checkpoints_warmstart_spares_and_resuming(comm, place, on_stale) -> None:
    server = {"max_staleness": 1, "on_stale": on_stale}
    topology = {"shards": 1, "colocate": True, "spares": 1}
    for epochs in (2, EPOCHS):
        run = describe(
            place,
            server=server,
            topology=topology,
            optimizer={"epochs": epochs, "warmstart": 3, "n_push": 2, "n_fetch": 2},
            checkpoint={"every_seconds": 0.01, "resume": "auto"},
            monitor={"progress": "none", "report_seconds": 0.05, "evaluate_epochs": 1.0},
        )
        result = train(run, comm, objective=Uneven())
    assert stalest(place) <= 1
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.step, info.frontier, info.holes, info.samples) == (BATCHES, BATCHES, (), EPOCHS * tiny.SAMPLES)
    if on_stale == "wait":
        expected = -sum(whole_numbers(batch) for batch in range(BATCHES))
        np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)


class Stopping:
    """Asks for the end after so many steps of a replica."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def on_step(self, event) -> bool:
        self._left -= 1
        return self._left == 0


@pytest.mark.parallel([3, 4], timeout=300)
@pytest.mark.parametrize("steps", [{"n_push": 3, "n_fetch": 1}, {"n_push": 3, "n_fetch": 3}], ids=str)
def test_what_a_replica_has_accrued_when_it_is_stopped_is_learned_once(comm, place, steps) -> None:
    """Also where it waits for a turn then, so that it may not push it any more."""
    server, topology = {"max_staleness": 1}, TOPOLOGIES[3] | {"colocate": comm.size == 4}
    run = describe(place, server=server, topology=topology, optimizer=steps)
    sessions, done = 0, 0
    while done < BATCHES:
        result = train(run, comm, objective=Uneven(), callbacks=[Stopping(4)])
        sessions, done = sessions + 1, done + result.steps
        assert sessions < BATCHES, "each session learns something"
    assert stalest(place) <= 1
    assert (sessions > 2, done) == (True, BATCHES)
    expected = -sum(whole_numbers(batch) for batch in range(BATCHES))
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)


@pytest.mark.parallel([4], timeout=300)
@pytest.mark.parametrize("on_stale", ["wait", "discard"])
def test_bounds_hold_for_partitions(comm, place, on_stale) -> None:
    server = {"max_staleness": 1, "on_stale": on_stale}
    topology = {"shards": 2, "replicas": 2, "partitions": 2, "colocate": True}
    result = train(tiny.describe(place, server=server, topology=topology), comm)
    assert stalest(place) <= 1
    assert result.samples == 3 * tiny.SAMPLES


@pytest.mark.parallel([1, 2], timeout=300)
@pytest.mark.parametrize("n_push", [2, 3, 5])
def test_the_mean_of_accrued_gradients_is_pushed(comm, place, n_push) -> None:
    """One replica, so that the twin is exact."""
    for number, server in enumerate(({}, {"overlap": "threads"})):
        topology = {"shards": 1, "replicas": 1, "colocate": comm.size == 1}
        optimizer = {"n_push": n_push, "accumulate": "mean", "learning_rate": 0.1, "most_withheld": 0}
        run = describe(
            place, server=server, topology=topology, optimizer=optimizer, run={"directory": place / f"run{number}"}
        )
        result = train(run, comm, objective=Uneven())
        found = np.zeros_like(whole_numbers(0))
        for batches in np.split(np.arange(BATCHES), range(1, BATCHES, n_push)):
            gradient = sum(whole_numbers(batch) for batch in batches.tolist())
            found -= np.float32(0.1) * (gradient * np.float32(1 / len(batches)))
        np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], found)


@pytest.mark.parallel([3, 4], timeout=300)
def test_the_rate_is_divided_by_the_staleness(comm, place) -> None:
    """All gradients are ones: each push moves the parameters by its rate, and the records say how stale it was."""

    class Ones(Uneven):
        def loss_and_gradient(self, parameters, batch):
            time.sleep(0.02 if batch.step % 7 == 0 else 0.001 * (batch.step % 3))
            return 1.0, {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}

    run = describe(place, topology=TOPOLOGIES[comm.size], optimizer={"staleness_rate": "inverse"})
    result = train(run, comm, objective=Ones())
    moved = [0.0, 0.0]
    for record in shard_records(place):
        for staleness, count in record["staleness_histogram"].items():
            moved[record["number"]] += count / max(1, int(staleness))
    found = -tiny.vectors(result.checkpoint)["parameters"]
    assert stalest(place) > 1
    np.testing.assert_allclose([found[0], found[-1]], [moved[0], moved[-1] or moved[0]], rtol=1e-5)


@pytest.mark.parallel([1, 2, 3], timeout=300)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["constant", "adaptive"])
def test_gradients_of_one_replica_need_no_compensation(comm, place, way, kind) -> None:
    """They are not stale: neither compensation, nor rates by staleness, nor bounds change a bit."""
    topology = {"shards": max(comm.size - 1, 1), "replicas": 1, "colocate": comm.size == 1}
    usual = {"learning_rate": 0.1, "batch_size": 6, "epochs": 2}
    found = []
    for number, (server, optimizer) in enumerate(
        [
            ({}, {}),
            ({"max_staleness": 1}, {"delay_compensation": kind, "staleness_rate": "inverse"}),
            ({"max_staleness": 1, "on_stale": "discard"}, {"delay_compensation": kind, "clip_norm": 1e6}),
        ]
    ):
        run = tiny.describe(
            place,
            server=WAYS[way] | {"chunk_kib": 4.0} | server,
            topology=topology,
            optimizer=usual | optimizer,
            run={"directory": place / f"run{number}", "seed": 3},
        )
        found.append(tiny.vectors(train(run, comm).checkpoint))
    for vectors in found[1:]:
        for name, values in found[0].items():
            assert values.tobytes() == vectors[name].tobytes()
    assert ("delay_mean_square" in found[1]) == (kind == "adaptive")


@pytest.mark.parallel([3], timeout=300)
@pytest.mark.parametrize("server", [{}, {"gradients": "layers"}, {"push": "copied", "chunk_kib": 4.0}], ids=str)
def test_each_partition_brings_its_own_parameters(comm, place, server) -> None:
    """Layer by layer, too: otherwise gradients that are not stale would change."""
    topology = {"shards": 1, "replicas": 1, "partitions": 2}
    found = []
    for number, kind in enumerate(("none", "constant", "adaptive")):
        optimizer = {"learning_rate": 0.1, "batch_size": 6, "epochs": 2, "delay_compensation": kind}
        directory = {"directory": place / f"run{number}", "seed": 3}
        run = tiny.describe(place, server=server, topology=topology, optimizer=optimizer, run=directory)
        found.append(tiny.vectors(train(run, comm).checkpoint)["parameters"].tobytes())
    assert found[0] == found[1] == found[2]


class Still:
    """Gradients are ones, and it keeps the parameters that it has computed the last one at."""

    def __init__(self) -> None:
        self.parameters = {"weights": np.zeros(5000, np.float32)}
        self.last = np.full(5000, np.inf, np.float32)

    def loss_and_gradient(self, parameters, batch):
        self.last[:] = parameters["weights"]
        time.sleep(0.02 if batch.step % 7 == 0 else 0.001 * (batch.step % 3))
        return 1.0, {"weights": np.ones(5000, np.float32)}

    def evaluate(self, parameters, batch):
        return 1.0


@pytest.mark.parallel([2, 3, 4, 6], timeout=300)
@pytest.mark.parametrize("way", sorted({*WAYS} - {"shared"}))
def test_shards_get_the_parameters_that_each_gradient_was_computed_at(comm, place, way) -> None:
    """With gradients, a factor and a rate of 1, an update makes v - 1 of any w; v is that of the last push."""
    run = describe(
        place,
        server=WAYS[way] | {"chunk_kib": 4.0},
        topology=TOPOLOGIES[comm.size],
        optimizer={"delay_compensation": "constant", "compensation_factor": 1.0},
    )
    objective = Still()
    result = train(run, comm, objective=objective)
    found = tiny.vectors(result.checkpoint)["parameters"]
    every = np.empty((comm.size, 5000), np.float32)
    comm.Allgather(objective.last, every)
    assert ((every - 1) == found).any(axis=0).all()
    if comm.size > 2:
        assert found.min() > -BATCHES  # what others have done is undone where w and v differ
