"""Gradients and parameters that travel between hosts as bfloat16: nothing of a gradient is lost for good."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parallel import tiny
from parallel.test_paramserver import WAYS, parameter_server

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run, ServerSection
from dbmpi.errors import UserError
from dbmpi.loops import connection
from dbmpi.loops.parameter_server import ParameterServer
from dbmpi.monitor.records import read_records
from dbmpi.mpi import waiting, window
from dbmpi.objective import Outcome
from dbmpi.paramserver.rules import Sgd
from dbmpi.paramserver.store import Store
from dbmpi.runs.training import train

TRANSPORTS = ("rma", "p2p")
NOTHING = Outcome(1, 0.0, 0)


def nearest(values: np.ndarray) -> np.ndarray:
    """Return the nearest bfloat16 of each number, by arithmetic that is exact in float64."""
    exact = values.astype(np.float64)
    unit = 2.0 ** (np.maximum(np.frexp(exact)[1] - 1, -126) - 7)
    return (np.round(exact / unit) * unit).astype(np.float32)


class RoundedTwin(tiny.Twin):
    """The serial loop, with rounded parameters, and rounded gradients to which the rest of earlier ones is added."""

    def learn(self, pauses: tuple[int, ...] = ()) -> np.ndarray:
        """Learn; before some steps, and at the end, what is kept is applied. Return the parameters."""
        settings = self.run.optimizer
        accrued, gradient, kept = (np.zeros_like(self.server) for _ in range(3))
        for step in range(self.order.batches):
            if step in pauses:
                self.apply(kept)
                kept[:] = 0
            if step % settings.n_fetch == 0:
                parameters = nearest(self.server)
            self.network.loss_and_gradient(parameters, self.batch(step), gradient)
            accrued += gradient
            if step % settings.n_push == 0 or step == self.order.batches - 1:
                pushed = nearest(accrued + kept)
                kept = (accrued - pushed) + kept
                self.apply(pushed)
                accrued[:] = 0
        self.apply(kept)
        return self.server


def described(place: Path, **sections: dict[str, object]) -> Run:
    server = {"wire": "bfloat16", **sections.pop("server", {})}
    return tiny.describe(place, server=server, **sections)


@pytest.mark.parallel([1, 2, 3, 4, 6])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("parts", [None, (range(0, 100), range(100, 357), range(357, 1000))])
def test_what_is_applied_and_what_is_kept_are_what_was_pushed(comm, monkeypatch, transport, parts) -> None:
    monkeypatch.setitem(WAYS, "rounded", {"transport": transport, "wire": "bfloat16"})
    elements, rounds = 1000, 30
    with parameter_server(comm, elements, shards=max(comm.size // 2, 1), chunk=77, way="rounded", parts=parts) as bench:
        mine, rough = np.zeros(elements), np.zeros(elements)
        random = np.random.default_rng(comm.rank)
        client = bench.client
        if client is not None:
            kept = np.zeros(elements, np.float32)
            for _ in range(rounds):
                gradient = (random.normal(size=elements) * 10.0 ** random.integers(-3, 3, elements)).astype(np.float32)
                for number in reversed(range(len(client.parts))):
                    client.push(gradient[client.parts[number].start : client.parts[number].stop].copy(), number)
                client.report(NOTHING, 1)
                client.drain(client.serve)
                client.wait()
                mine += gradient
                pushed = nearest(gradient + kept)
                kept = (gradient - pushed) + kept
                rough += pushed if comm.size > 1 else gradient
            bytes_before = client.pushed_bytes
            assert bytes_before == rounds * elements * (2 if comm.size > 1 else 4)
        bench.together()
        total, rounded = np.empty_like(mine), np.empty_like(rough)
        comm.Allreduce(mine, total)
        comm.Allreduce(rough, rounded)
        bound = rounds * comm.size * 2.0**-24 * 1e4
        held = bench.held if bench.server is not None else range(0)
        before = None if bench.server is None else bench.server.parameters.copy()
        if before is not None:
            np.testing.assert_allclose(before, -rounded[held.start : held.stop], atol=bound)
        bench.together()
        if client is not None:
            client.push_kept()
            assert client.pushed_bytes == bytes_before + (4 * elements if comm.size > 1 else 0)
            client.push_kept()  # there is nothing to push any more
            assert client.pushed_bytes == bytes_before + (4 * elements if comm.size > 1 else 0)
        bench.together()
        if bench.server is not None:
            after, exact = bench.server.parameters, -total[held.start : held.stop]
            np.testing.assert_allclose(after, exact, atol=bound)
            if comm.size > 1:
                assert np.abs(before - exact).max() > 30 * np.abs(after - exact).max()
            assert bench.server.version == rounds * bench.plan.workers
        bench.together()


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("elements", [1, 2, 63, 64, 65, 131, 1000])
def test_parameters_come_rounded_to_the_nearest_or_as_they_are(
    comm, monkeypatch, transport, consistent, elements
) -> None:
    monkeypatch.setitem(WAYS, "rounded", {"transport": transport, "wire": "bfloat16"})
    shards = comm.size - 1
    values = np.random.default_rng(elements).normal(size=elements).astype(np.float32)
    with parameter_server(comm, elements, shards=shards, rule=Sgd(1.0), way="rounded", consistent=consistent) as bench:
        if bench.server is not None:
            bench.server.parameters[:] = values[bench.held.start : bench.held.stop]
            bench.server.begin(None)
        bench.together()
        if bench.client is not None:
            found = np.full(elements, np.nan, np.float32)
            bench.client.fetch(found)
            np.testing.assert_array_equal(found, nearest(values))
            assert bench.client.fetched_bytes == 2 * elements
            bench.client.fetch(found, exact=True)
            np.testing.assert_array_equal(found, values)
            found[:] = np.nan
            bench.client.fetch(found, for_gradient=False)
            np.testing.assert_array_equal(found, values)
            bench.client.push(np.ones(elements, np.float32))
            bench.client.fetch(found)
            np.testing.assert_array_equal(found, nearest(values - np.float32(1)))
        bench.together()


@pytest.mark.parallel([1, 3])
def test_on_one_host_nothing_changes(comm, place) -> None:
    topology = {"shards": max(comm.size - 1, 1), "replicas": 1, "colocate": comm.size == 1}
    run = described(place, topology=topology)
    result = train(run, comm)
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], tiny.Twin(run).learn())


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
@pytest.mark.parametrize(
    ("server", "optimizer"),
    [
        ({}, {}),
        ({}, {"n_push": 3, "n_fetch": 2}),
        ({"gradients": "layers"}, {}),
        ({"consistent": True, "chunk_kib": 4.0}, {}),
    ],
)
def test_one_replica_equals_the_serial_loop_that_rounds(comm, place, transport, rule, server, optimizer) -> None:
    run = described(
        place,
        topology={"shards": comm.size - 1, "replicas": 1},
        optimizer={"rule": rule, **optimizer},
        server={"transport": transport, **server},
    )
    result = train(run, tiny.Apart(comm))
    expected = RoundedTwin(run).learn()
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        pushes = len([s for s in range(result.steps) if s % run.optimizer.n_push == 0 or s == result.steps - 1])
        assert (checkpoint.info.step, set(checkpoint.info.shard_versions)) == (result.steps, {pushes})
    waiting.barrier(comm, "the others to have read the checkpoint")


@pytest.mark.parallel([2, 3])
def test_a_run_resumes_where_nothing_is_kept(comm, place) -> None:
    """The end of a session is a checkpoint, so what is kept is in the parameters then."""
    topology = {"shards": comm.size - 1, "replicas": 1}
    for epochs in (2, 3):
        run = described(place, topology=topology, optimizer={"rule": "sgd", "epochs": epochs})
        result = train(run, tiny.Apart(comm))
    twin = RoundedTwin(run)
    expected = twin.learn(pauses=(2 * twin.order.batches_per_epoch,))
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)
    waiting.barrier(comm, "the others to have read the checkpoint")


@pytest.mark.parallel([3, 6], timeout=300)
@pytest.mark.parametrize(
    ("server", "optimizer"),
    [
        ({"overlap": "threads"}, {}),
        ({"overlap": "threads", "gradients": "layers"}, {}),
        ({"max_staleness": 4}, {}),
        ({"max_staleness": 4, "on_stale": "discard", "transport": "p2p"}, {}),
        ({}, {"delay_compensation": "constant"}),
        ({}, {"exchange": "local", "learning_rate": 0.7}),
        ({"transport": "p2p"}, {"exchange": "easgd", "learning_rate": 1.0, "rule": "sgd"}),
        ({}, {"clip_norm": 0.5, "rule": "adam", "learning_rate": 0.01}),
    ],
)
def test_replicas_learn_as_well_as_with_float32(comm, place, server, optimizer) -> None:
    """In every way of learning; partitions divide a replica, and two ranks are on each host."""
    partitions = 1 if comm.size == 3 else 2
    local = {"steps": 3} if "exchange" in optimizer else {}
    local |= {"pushes": "asynchronous"} if optimizer.get("exchange") == "local" else {}
    outcomes, moved = [], []
    for wire in ("float32", "bfloat16"):
        run = described(
            place,
            run={"directory": place / wire},
            topology={"shards": 1 if comm.size == 3 else 2, "partitions": partitions},
            optimizer={"epochs": 12, **optimizer},
            local=local,
            server={"wire": wire, **server},
        )
        result = train(run, tiny.Hosts(comm) if comm.size == 6 else tiny.Apart(comm))
        found = tiny.vectors(result.checkpoint)
        assert all(np.isfinite(vector).all() for vector in found.values())
        with Checkpoint.open(result.checkpoint) as checkpoint:
            assert (checkpoint.info.frontier, checkpoint.info.holes) == (result.steps, ())
        outcomes.append(tiny.Twin(run).test(found["parameters"]))
        moved.append(sum(r["pushed_bytes"] for r in read_records(run.run.directory) if r["kind"] == "worker"))
        waiting.barrier(comm, "the others to have read the records")
    assert outcomes[1].accuracy >= outcomes[0].accuracy - 0.15
    if comm.size < 6 and "max_staleness" not in server:
        assert 0.5 <= moved[1] / moved[0] < 0.6  # what is kept is float32, perhaps after the last record


class Counting:
    """Every parameter is the number of pushes applied, and so is the loss; all must be the same."""

    parameters = {"weights": np.zeros((40, 30)), "biases": np.zeros(50)}  # noqa: RUF012

    def loss_and_gradient(self, parameters, batch):
        return 1.0, {name: -np.ones_like(values) for name, values in parameters.items()}

    def evaluate(self, parameters, batch):
        low = min(float(values.min()) for values in parameters.values())
        high = max(float(values.max()) for values in parameters.values())
        return low if low == high else np.nan


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_evaluations_see_parameters_as_they_are(comm, place, transport) -> None:
    """Those of an evaluator, too: 259 is no bfloat16."""
    batches = -(-tiny.SAMPLES // 6)
    run = described(
        place,
        topology={"evaluators": 1, "shards": comm.size - 2, "replicas": 1},
        network={"layers": ()},
        optimizer={"rule": "sgd", "learning_rate": 1.0, "epochs": 37},
        server={"transport": transport},
    )
    result = train(run, tiny.Apart(comm), objective=Counting())
    assert result.steps == 37 * batches == 259
    assert result.test.mean_loss == 259
    waiting.barrier(comm, "the others")


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_loop_of_ones_own_loses_nothing(comm, place, monkeypatch, transport) -> None:
    """A checkpoint has all that its worker has pushed, and the end all of all workers."""
    names = connection.Connection.__init__.__globals__
    monkeypatch.setitem(names, "Store", lambda *given: Store(*given, shared=False))
    shards, elements, path = max(comm.size - 2, 1), 700, place / "saved.h5"
    section = ServerSection(wire="bfloat16", transport=transport)
    initial = np.random.default_rng(3).normal(size=elements).astype(np.float32)
    mine, pushed = {"w": initial.copy()}, np.zeros(elements)
    server = ParameterServer(comm, mine, "sgd", learning_rate=1.0, shards=shards, server=section)
    if not server.serve():
        np.testing.assert_array_equal(mine["w"], initial)
        random = np.random.default_rng(comm.rank)
        for step in range(20):
            gradient = random.normal(size=elements).astype(np.float32)
            pushed += gradient
            server.push({"w": gradient})
            server.fetch()
            np.testing.assert_array_equal(mine["w"], nearest(mine["w"]))
            if step == 10 and server.workers == 1:
                server.save(path)
                saved = tiny.vectors(path)["parameters"]
                np.testing.assert_allclose(saved, initial - pushed, atol=1e-4)
                assert np.abs(mine["w"] - saved).max() > 1e-3
    server.close()
    total = np.empty_like(pushed)
    comm.Allreduce(pushed, total)
    if server.worker is not None:
        np.testing.assert_allclose(mine["w"], initial - total, atol=1e-4)


@pytest.mark.parallel([1])
def test_a_loop_of_ones_own_rounds_no_float64(comm) -> None:
    with pytest.raises(UserError, match="rounds float32, and the arrays are float64"):
        ParameterServer(comm, {"w": np.zeros(3)}, "sgd", server=ServerSection(wire="bfloat16"))


@pytest.mark.parallel([2, 4])
def test_ranks_of_one_host_without_shared_memory_are_apart(comm, monkeypatch) -> None:
    """Where /dev/shm is too small they use the transport, and so round."""
    monkeypatch.setattr(window, "_shared_memory_free", lambda: 0)
    monkeypatch.setitem(WAYS, "rounded", {"push": "shared", "wire": "bfloat16"})
    elements = 301
    with parameter_server(comm, elements, shards=comm.size // 2, way="rounded") as bench:
        values = np.random.default_rng(5).normal(size=elements).astype(np.float32)
        if bench.client is not None:
            bench.client.push(-values)
            found = np.empty(elements, np.float32)
            bench.client.fetch(found, exact=True)
            if bench.plan.workers == 1:
                np.testing.assert_array_equal(found, nearest(values))
                bench.client.fetch(found)
                np.testing.assert_array_equal(found, nearest(values))
            assert bench.client.pushed_bytes == 2 * elements
            bench.client.push_kept()
            bench.client.fetch(found, exact=True)
        bench.together()
        if bench.server is not None:
            expected = bench.plan.workers * values[bench.held.start : bench.held.stop]
            np.testing.assert_allclose(bench.server.parameters, expected, rtol=1e-6, atol=1e-6)
        bench.together()
