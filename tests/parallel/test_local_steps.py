"""Local steps: replicas walk by a rule of their own, and shards apply how far they have come."""

from __future__ import annotations

import numpy as np
import pytest
from parallel import tiny
from parallel.test_rounds import TOPOLOGIES, WAYS, Late, Ones
from parallel.test_staleness import Stopping
from unit.rule_twins import RuleTwin

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.runs.training import train

REPLICAS = {1: 1, 2: 2, 3: 2, 4: 4, 6: 4}
BATCHES = 3 * -(-tiny.SAMPLES // 6)
MOVES = {name: way for name, way in WAYS.items() if name in ("in place", "messages", "one-sided", "consistent")}


def describe(place, size: int, name: str = "run", **sections) -> Run:
    optimizer = {"exchange": "local", "batch_size": 6, "epochs": 3} | sections.pop("optimizer", {})
    optimizer = {"learning_rate": {"local": 0.7, "easgd": 1.0}[optimizer["exchange"]]} | optimizer
    local = {"steps": 4, "learning_rate": 0.01} | sections.pop("local", {})
    topology = TOPOLOGIES[size] | sections.pop("topology", {})
    run = {"directory": place / name, "seed": 3}
    return tiny.describe(place, run=run, optimizer=optimizer, local=local, topology=topology, **sections)


def naive(run: Run, replicas: int) -> np.ndarray:
    """Return what replicas learn that walk one after the other from the same parameters, in rounds."""
    twin, steps = tiny.Twin(run), run.local.steps
    inner = [RuleTwin(run.local.inner(run.optimizer), twin.server) for _ in range(replicas)]
    left, gradient = list(range(twin.order.batches)), np.empty_like(twin.server)
    while left:
        span, total, samples = min(steps, -(-len(left) // replicas)), np.zeros(twin.server.size), 0
        for rule in inner:
            walk, left = left[:span], left[span:]
            parameters, seen = twin.server.copy(), 0
            for batch in walk:
                twin.network.loss_and_gradient(parameters, twin.batch(batch), gradient)
                size = len(twin.order.indices(batch))
                parameters = rule.step(parameters, gradient, twin.factor(twin.order.before(batch), size))
                seen += size
            total += seen * (twin.server - parameters).astype(np.float64)
            samples += seen
        twin.server[:] = twin.rule.step(twin.server, (total / samples).astype(np.float32))
    return twin.server


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)
@pytest.mark.parametrize("way", MOVES)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_replicas_that_walk_in_rounds_equal_their_naive_twin(comm, place, way, rule) -> None:
    local = {"rule": rule, "weight_decay": 0.01 if rule == "adamw" else 0.0}
    optimizer = {"schedule": "cosine", "warmup_epochs": 0.5}
    run = describe(place, comm.size, local=local, optimizer=optimizer, server=MOVES[way])
    result = train(run, comm)
    found, expected = tiny.vectors(result.checkpoint)["parameters"], naive(run, REPLICAS[comm.size])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (result.steps, result.samples, result.staleness) == (BATCHES, 3 * tiny.SAMPLES, 0)


@pytest.mark.parallel([1, 2], timeout=300)
@pytest.mark.parametrize("pushes", ["synchronous", "asynchronous"])
def test_one_replica_walks_alike_with_both(comm, place, pushes) -> None:
    topology = {"shards": 1, "replicas": 1, "colocate": comm.size == 1}
    run = describe(place, comm.size, local={"pushes": pushes}, topology=topology, optimizer={"n_fetch": 1})
    found = tiny.vectors(train(run, comm).checkpoint)["parameters"]
    np.testing.assert_allclose(found, naive(run, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parallel([1, 2], timeout=300)
@pytest.mark.parametrize("elasticity", [None, 0.3])
def test_one_elastic_replica_equals_its_naive_twin(comm, place, elasticity) -> None:
    """It and the shard walk towards each other after each four steps, and with what remains."""
    topology = {"shards": 1, "replicas": 1, "colocate": comm.size == 1}
    local = {"rule": "momentum", "learning_rate": 0.1, "elasticity": elasticity}
    run = describe(place, comm.size, local=local, topology=topology, optimizer={"exchange": "easgd"})
    found = tiny.vectors(train(run, comm).checkpoint)["parameters"]
    twin = tiny.Twin(run)
    rule, own, gradient = RuleTwin(run.local.inner(run.optimizer), twin.server), twin.server.copy(), twin.server.copy()
    for batch in range(BATCHES):
        twin.network.loss_and_gradient(own, twin.batch(batch), gradient)
        own = rule.step(own, gradient)
        if (batch + 1) % 4 == 0 or batch + 1 == BATCHES:
            moved = np.float32(elasticity or 0.9) * (twin.server - own)
            own += moved
            twin.server -= moved
    np.testing.assert_allclose(found, twin.server, rtol=1e-4, atol=1e-5)


def whole(checkpoint) -> bool:
    with Checkpoint.open(checkpoint) as opened:
        info = opened.info
    return (info.step, info.frontier, info.holes) == (info.total, info.total, ())


@pytest.mark.parallel([3, 4], timeout=300)
@pytest.mark.parametrize(
    "settings",
    [
        {"pushes": "synchronous"},
        {"pushes": "asynchronous"},
        {"pushes": "asynchronous", "server": {"max_staleness": 1}},
        {"pushes": "asynchronous", "server": {"max_staleness": 1, "on_stale": "discard"}},
        {"optimizer": {"exchange": "easgd"}},
        {"optimizer": {"exchange": "easgd", "warmstart": 5}, "server": {"max_staleness": 1}},
        {"pushes": "asynchronous", "optimizer": {"warmstart": 5, "momentum_every": 2, "staleness_rate": "inverse"}},
    ],
    ids=str,
)
def test_every_batch_is_learned_once_through_checkpoints_and_stops(comm, place, settings) -> None:
    run = describe(
        place,
        comm.size,
        local={"pushes": settings.get("pushes", "synchronous")},
        server=settings.get("server", {}),
        optimizer={"epochs": 8} | settings.get("optimizer", {}),
        checkpoint={"every_seconds": 0.02, "resume": "auto"},
        monitor={"progress": "none", "report_seconds": 0.05, "evaluate_epochs": 1.0},
    )
    steps = sessions = 0
    while steps < 8 * 7:
        result = train(run, comm, callbacks=[Stopping(9), Late(1, 0.002)])
        steps, sessions = steps + result.steps, sessions + 1
        assert result.steps
    assert (steps, sessions > 1, whole(result.checkpoint)) == (8 * 7, True, True)


@pytest.mark.parallel([1, 3, 4], timeout=300)
@pytest.mark.parametrize("pushes", ["synchronous", "asynchronous"])
def test_any_objective_walks(comm, place, pushes) -> None:
    """Along gradients of ones, by rates of 1: rounds move by their mean, and other pushes add up."""
    optimizer = {"rule": "sgd", "learning_rate": 1.0, "momentum_every": 1, "nesterov": False}
    local = {"rule": "sgd", "learning_rate": 1.0, "pushes": pushes, "steps": 3}
    run = describe(place, comm.size, optimizer=optimizer, local=local, network={"layers": ()})
    found = -tiny.vectors(train(run, comm, objective=Ones()).checkpoint)["parameters"]
    assert (found == found[0]).all()
    if pushes == "asynchronous":
        assert found[0] == BATCHES
    elif comm.size == 1:
        np.testing.assert_allclose(found[0], BATCHES)
    else:
        assert BATCHES / REPLICAS[comm.size] <= found[0] < BATCHES / REPLICAS[comm.size] + 2


@pytest.mark.parallel([1, 3], timeout=300)
@pytest.mark.parametrize("pushes", ["synchronous", "asynchronous"])
def test_a_walk_that_is_not_finite_is_withheld_and_the_next_one_begins_afresh(comm, place, pushes) -> None:
    local = {"pushes": pushes, "steps": 3}
    run = describe(place, comm.size, local=local, network={"layers": ()})
    result = train(run, comm, objective=Ones(broken=4))
    assert (result.withheld, result.steps) == (1, BATCHES)
    assert np.isfinite(tiny.vectors(result.checkpoint)["parameters"]).all()


@pytest.mark.parallel([4], timeout=300)
@pytest.mark.parametrize("pushes", ["synchronous", "asynchronous"])
def test_partitions_walk_together(comm, place, pushes) -> None:
    topology = {"shards": 2, "replicas": 2, "partitions": 2, "colocate": True}
    run = describe(place, comm.size, local={"pushes": pushes}, topology=topology, optimizer={"clip_norm": 0.5})
    result = train(run, comm)
    assert (result.steps, result.samples) == (BATCHES, 3 * tiny.SAMPLES)
    if pushes == "synchronous":
        alone = describe(place, comm.size, local={"pushes": pushes}, topology=topology)
        found = tiny.vectors(train(alone.model_copy(update={"run": again(alone)}), comm).checkpoint)["parameters"]
        np.testing.assert_allclose(found, naive(alone, 2), rtol=1e-3, atol=1e-4)


def again(run: Run):
    return run.run.model_copy(update={"directory": run.run.directory.parent / "again"})
