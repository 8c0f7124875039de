"""Synchronous training equals the serial loop, and with backups nobody waits for the slowest."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from parallel import tiny
from parallel.test_staleness import Stopping, shard_records

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.errors import UserError
from dbmpi.runs.training import train

WAYS = {
    "in place": {},
    "messages": {"push": "copied", "transport": "p2p", "chunk_kib": 4.0},
    "one-sided": {"push": "copied", "transport": "rma", "chunk_kib": 4.0},
    "consistent": {"consistent": True},
    "shared": {"fetch": "shared"},
    "layers": {"gradients": "layers"},
    "shared layers": {"fetch": "shared", "gradients": "layers"},
}
TOPOLOGIES = {
    1: {"shards": 1, "colocate": True},
    2: {"shards": 2, "colocate": True},
    3: {"shards": 1},
    4: {"shards": 2, "replicas": 4, "colocate": True},
    6: {"shards": 2},
}
GLOBAL = 12
"""Samples of a round; an epoch of 40 ends with a round of 4."""
BATCHES = {1: 12, 2: 6, 3: 6, 4: 3, 6: 3}
"""Samples of a replica's batch for so many ranks."""
WIDE = ({"units": 300, "activation": "tanh"}, {"units": tiny.CLASSES})
"""Layers whose gradients take more chunks than there are slots."""


def describe(place, size: int, name: str = "run", **sections) -> Run:
    optimizer = {"exchange": "synchronous", "rule": "momentum", "learning_rate": 0.1, "batch_size": BATCHES[size]}
    optimizer |= sections.pop("optimizer", {})
    topology = TOPOLOGIES[size] | sections.pop("topology", {})
    run = {"directory": place / name, "seed": 3}
    return tiny.describe(place, run=run, optimizer=optimizer, topology=topology, **sections)


def serial(run: Run) -> np.ndarray:
    """Return what the plain loop learns from batches of the size of a round."""
    optimizer = run.optimizer.model_dump() | {"exchange": "asynchronous", "batch_size": GLOBAL}
    return tiny.Twin(Run.model_validate(run.model_dump() | {"optimizer": optimizer})).learn()


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)
@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_replicas_equals_the_serial_loop(comm, place, way) -> None:
    run = describe(place, comm.size, server=WAYS[way], network={"layers": WIDE})
    result = train(run, comm)
    found = tiny.vectors(result.checkpoint)
    assert_near(found["parameters"], serial(run))
    assert (result.samples, result.discarded, result.staleness) == (3 * tiny.SAMPLES, 0, 0)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    rounds = 3 * -(-tiny.SAMPLES // GLOBAL)
    assert set(info.shard_versions) == {rounds}
    assert (info.holes, info.frontier, info.step) == ((), 3 * -(-tiny.SAMPLES // BATCHES[comm.size]), info.frontier)
    if comm.size == 1:
        assert found["parameters"].tobytes() == serial(run).tobytes()


@pytest.mark.parallel([3, 4, 6], timeout=300)
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adamw"])
def test_results_have_the_same_bits_whoever_is_slow_and_however_gradients_travel(comm, place, rule) -> None:
    found = []
    for number, way in enumerate(("in place", "messages", "one-sided", "consistent")):
        optimizer = {"rule": rule, "learning_rate": 0.01, "schedule": "cosine", "warmup_epochs": 0.5}
        if rule == "adamw":  # with a smaller one it would enlarge what rounding leaves of gradients near zero
            optimizer["epsilon"] = 1e-3
        server = WAYS[way]
        run = describe(place, comm.size, f"run{number}", server=server, optimizer=optimizer, network={"layers": WIDE})
        late = Late(replica=number % 2, seconds=0.004)
        found.append(tiny.vectors(train(run, comm, callbacks=[late]).checkpoint))
    assert_near(found[0]["parameters"], serial(run))
    for vectors in found[1:]:
        for name, values in found[0].items():
            assert values.tobytes() == vectors[name].tobytes()


class Late:
    """Puts a replica to sleep after each step."""

    def __init__(self, replica: int, seconds: float) -> None:
        self.replica, self.seconds = replica, seconds

    def on_step(self, event) -> bool:
        if event.replica == self.replica:
            time.sleep(self.seconds)
        return False


@pytest.mark.parallel([3, 4], timeout=300)
def test_checkpoints_spares_evaluations_and_resuming_change_nothing(comm, place) -> None:
    topology = {"shards": 1, "replicas": None, "spares": 1, "colocate": comm.size == 3}
    sections = {
        "checkpoint": {"every_seconds": 0.01, "resume": "auto"},
        "monitor": {"progress": "none", "report_seconds": 0.05, "evaluate_epochs": 0.5},
        "topology": topology,
    }
    for epochs in (1.5, 2, 4):
        run = describe(place, comm.size, optimizer={"epochs": epochs, "batch_size": 6}, **sections)
        result = train(run, comm)
    assert_near(tiny.vectors(result.checkpoint)["parameters"], serial(run))
    assert result.samples + tiny.SAMPLES * 2 == 4 * tiny.SAMPLES


@pytest.mark.parallel([2, 4], timeout=300)
def test_a_run_that_is_stopped_again_and_again_equals_the_serial_loop(comm, place) -> None:
    run = describe(place, comm.size, optimizer={"epochs": 6})
    batches, done, sessions = 6 * -(-tiny.SAMPLES // BATCHES[comm.size]), 0, 0
    while done < batches:
        result = train(run, comm, callbacks=[Stopping(4)])
        done, sessions = done + result.steps, sessions + 1
        assert result.steps
    assert (done, sessions > 2) == (batches, True)
    assert_near(tiny.vectors(result.checkpoint)["parameters"], serial(run))


@pytest.mark.parallel([4, 6], timeout=300)
@pytest.mark.parametrize("server", [{}, {"gradients": "layers"}, WAYS["messages"], WAYS["one-sided"]], ids=str)
def test_partitions_learn_in_rounds(comm, place, server) -> None:
    topology = {"shards": 2, "replicas": 2 if comm.size == 4 else 3, "partitions": 2, "colocate": True}
    optimizer = {"batch_size": GLOBAL // topology["replicas"]}
    run = describe(place, comm.size, server=server, topology=topology, optimizer=optimizer, network={"layers": WIDE})
    found = tiny.vectors(train(run, comm).checkpoint)["parameters"]
    expected = serial(run)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()  # partitions add up in another order


class Ones:
    """Gradients of ones; some replicas and batches have one that is not finite, or sleep."""

    def __init__(self, broken: int = -1) -> None:
        self.parameters = {"weights": np.zeros(5000, np.float32)}
        self._broken = broken

    def loss_and_gradient(self, parameters, batch):
        value = np.nan if batch.step == self._broken else 1.0
        return 1.0, {"weights": np.full(5000, value, np.float32)}

    def evaluate(self, parameters, batch):
        return 1.0


@pytest.mark.parallel([2, 3, 4], timeout=300)
def test_a_gradient_that_is_not_finite_is_left_out_of_its_round(comm, place) -> None:
    run = describe(place, comm.size, network={"layers": ()}, optimizer={"rule": "sgd", "learning_rate": 1.0})
    result = train(run, comm, objective=Ones(broken=1))
    assert (result.withheld, result.samples) == (1, 3 * tiny.SAMPLES)
    np.testing.assert_allclose(tiny.vectors(result.checkpoint)["parameters"], -3 * -(-tiny.SAMPLES // GLOBAL))


class Held:
    """Keeps one replica in its first step until something has happened."""

    def __init__(self, replica: int, until: Callable[[], bool]) -> None:
        self._replica, self._until, self._first = replica, until, True

    def on_step(self, event) -> bool:
        if event.replica == self._replica and self._first:
            while not self._until():  # the test's time limit ends it
                time.sleep(0.002)
        self._first = False
        return False


class Noting:
    """Leaves a file for each checkpoint, and for each replica that has taken so many steps."""

    def __init__(self, place: Path, steps: int) -> None:
        self._place, self._left = place, steps

    def on_step(self, event) -> bool:
        self._left -= 1
        if self._left == 0:
            (self._place / f"replica-{event.replica}").touch()
        return False

    def on_checkpoint(self, event) -> bool:
        (self._place / f"checkpoint-{event.step}").touch()
        return False


@pytest.mark.parallel([3, 4, 6], timeout=300)
@pytest.mark.parametrize("way", sorted({*WAYS} - {"shared", "shared layers"}))
def test_backups_are_not_awaited(comm, place, way) -> None:
    """One replica stays in its first step until each of the others has taken 20: more than any number in flight."""
    replicas = {3: 2, 4: 4, 6: 4}[comm.size]
    optimizer = {"exchange": "backup", "epochs": 12, "rule": "sgd"}
    run = describe(place, comm.size, server=WAYS[way], optimizer=optimizer, network={"layers": WIDE})
    held = Held(replicas - 1, lambda: len(list(place.glob("replica-*"))) == replicas - 1)
    result = train(run, comm, callbacks=[held, Noting(place, 20)])
    batches = 12 * -(-tiny.SAMPLES // BATCHES[comm.size])
    assert (result.steps, result.samples) == (batches, 12 * tiny.SAMPLES)
    records = shard_records(place)
    assert {int(key) for record in records for key in record["staleness_histogram"]} == {0}
    dropped = {record["number"]: record["discarded"] for record in records}
    applied = {record["number"]: record["pushes"] for record in records}
    assert result.discarded == sum(dropped.values()) > 0
    for shard, pushes in applied.items():
        assert pushes + dropped[shard] == batches
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.step, info.frontier, info.holes) == (batches, batches, ())
    needed = replicas - 1
    for shard, version in enumerate(info.shard_versions):
        assert applied[shard] / needed <= version <= applied[shard]


@pytest.mark.parallel([4], timeout=300)
def test_checkpoints_do_not_wait_for_a_backup(comm, place) -> None:
    """One replica stays in its first step until two checkpoints are written."""
    optimizer = {"exchange": "backup", "backups": 2, "epochs": 40}
    checkpoint = {"every_seconds": 0.05, "resume": "auto"}
    run = describe(place, comm.size, optimizer=optimizer, checkpoint=checkpoint)
    held = Held(3, lambda: len(list(place.glob("checkpoint-*"))) >= 2)
    result = train(run, comm, callbacks=[held, Noting(place, 0)])
    assert result.samples == 40 * tiny.SAMPLES


@pytest.mark.parallel([2], timeout=100)
def test_more_backups_than_replicas_are_refused_with_the_numbers_that_would_do(comm, place) -> None:
    run = describe(place, comm.size, optimizer={"exchange": "backup", "backups": 2}, topology={"replicas": None})
    with pytest.raises(UserError) as raised:
        train(run, comm)
    told = " ".join(comm.allgather(str(raised.value)))
    assert re.search(r"backups = 2 of 2 replicas .*to at most 1, or topology\.replicas to at least 3", told)
