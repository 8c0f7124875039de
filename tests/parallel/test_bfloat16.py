"""Runs whose layers multiply bfloat16: the same on any number of ranks, to rounding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from parallel import tiny
from parallel.test_replica import image_layers, random_cover

from dbmpi import config
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.index.layout import cut
from dbmpi.kernels import bfloat16, bfloat16_convolution
from dbmpi.mpi import waiting
from dbmpi.mpi.topology import Communicators, Plan
from dbmpi.network import field
from dbmpi.objective import Batch, Outcome
from dbmpi.paramserver import rules
from dbmpi.paramserver import server as server_module
from dbmpi.paramserver.store import Store
from dbmpi.replica import placement, precision
from dbmpi.replica.placement import Placement
from dbmpi.replica.precision import precision_notes
from dbmpi.replica.replica import Replica
from dbmpi.replica.whole import WholeNetwork
from dbmpi.runs.prediction import evaluate
from dbmpi.runs.simulation import simulate
from dbmpi.runs.training import train

EXAMPLES = Path(__file__).parents[2] / "examples"
ROUNDED = {"layers": tiny.LAYERS, "precision": "bfloat16"}
PLAIN = config.NetworkSection.model_validate({"layers": tiny.LAYERS})


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)  # the first one compiles
@pytest.mark.parametrize("as_matrices", [False, True])
@pytest.mark.parametrize("seed", [0, 2, 9])  # which together have all kinds of layers
def test_random_networks_on_random_placements(comm, seed, as_matrices, monkeypatch) -> None:
    """A sum that is added up in another order may be rounded to the next bfloat16 number; and no more happens."""
    monkeypatch.setattr(field, "pays", lambda filters, shape: as_matrices and filters.tied)
    monkeypatch.setattr(bfloat16_convolution, "MAPS_BACKWARD", 1)
    rng = np.random.default_rng(seed)
    layers = image_layers(rng)
    networks = {
        name: WholeNetwork(config.NetworkSection(layers=layers, precision=name), (2, 11, 12), seed=3)
        for name in ("float32", "bfloat16")
    }
    network = networks["bfloat16"]
    boxes = tuple(random_cover(rng, layer.output_shape, comm.size) for layer in network.layers)
    splits = tuple("inputs" if placement.can_split_by_inputs(layer) else "outputs" for layer in network.layers)
    batch = Batch(
        np.random.default_rng(7).normal(size=(2, 11, 12, 5)).astype(np.float32),
        np.random.default_rng(8).integers(0, network.outputs, 5).astype(np.int32),
    )
    whole = np.empty(network.size, np.float32)
    network.initial(0, whole)
    expected = {name: np.empty_like(whole) for name in networks}
    losses = {p: one.loss_and_gradient(whole, batch, expected[p], step=1).loss for p, one in networks.items()}
    for placed, shared in (
        (placement.automatic(network.layers, comm.size), True),
        (Placement(boxes, splits), True),
        (Placement(boxes, ("outputs",) * len(boxes)), False),
    ):
        with Replica(network, placed, comm, shared=shared) as replica:
            mine = replica.parameters.take(whole)
            gradient = np.empty_like(mine)
            outcome = replica.loss_and_gradient(mine, batch, gradient, step=1)
            theirs, plain = (replica.parameters.take(expected[p]) for p in ("bfloat16", "float32"))
            assert outcome.loss == pytest.approx(losses["bfloat16"], rel=2e-3)
            if comm.size == 1:
                np.testing.assert_array_equal(gradient, theirs)
            assert relative(gradient, theirs) <= 0.01
            if mine.size:
                assert not np.array_equal(theirs, plain)


def learned(run: config.Run) -> np.ndarray:
    with Checkpoint.open(run.run.directory) as checkpoint:
        assert '"precision":"bfloat16"' in checkpoint.info.configuration.replace(" ", "")
        return checkpoint.parameters()


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("server", [{}, {"fetch": "shared", "gradients": "layers"}, {"overlap": "threads"}])
def test_downpour_learns_what_a_serial_loop_learns(comm, place, server) -> None:
    """One replica, of as many partitions as there are ranks for it; also on the shards' memory."""
    overlaps = server.get("overlap") == "threads"
    shards = 1 if comm.size > 1 else None
    run = tiny.describe(
        place,
        network=ROUNDED,
        optimizer={"rule": "adagrad"},
        server={"overlap": "none"} | server,
        topology={"replicas": 1, "partitions": max(1, comm.size - 1), "shards": shards},
    )
    result = train(run, comm)
    if comm.rank == 0:
        expected = tiny.Twin(run).learn()
        assert result.test is not None
        assert result.test.accuracy is not None
        if not overlaps:  # then the fetch of a step may lack the push before it
            assert relative(learned(run), expected) <= (1e-6 if comm.size < 3 else 5e-3)
        plain = tiny.Twin(run.model_copy(update={"network": PLAIN})).learn()
        assert relative(expected, plain) > 1e-4


@pytest.mark.parallel([2, 3, 6])
def test_synchronous_replicas_learn_what_a_serial_loop_of_large_batches_learns(comm, place) -> None:
    """The mean of the gradients of the replicas is that of all their samples, but for the scale that is rounded."""
    replicas = comm.size - 1
    run = tiny.describe(
        place,
        network=ROUNDED,
        optimizer={"exchange": "synchronous", "batch_size": 4, "epochs": 2, "rule": "sgd"},
        topology={"shards": 1, "replicas": replicas},
    )
    train(run, comm)
    if comm.rank == 0:
        large = tiny.describe(
            place,
            network=ROUNDED,
            optimizer={"batch_size": 4 * replicas, "epochs": 2, "rule": "sgd"},
        )
        assert relative(learned(run), tiny.Twin(large).learn()) <= (1e-6 if replicas == 1 else 1e-3)


@pytest.mark.parallel([1, 2, 3, 4, 6])
def test_sandblaster_has_the_same_bits_on_any_number_of_ranks(comm, place) -> None:
    run = tiny.describe(
        place,
        network=ROUNDED,
        optimizer={"method": "sandblaster", "epochs": 8, "batch_size": 7},
        sandblaster={"deterministic": True, "portions_per_push": 1},
        topology={"shards": 1, "replicas": max(1, comm.size - 1), "colocate": comm.size == 1},
    )
    result = train(run, comm)
    alone = comm.Split(comm.rank, 0)
    if comm.rank == 0:
        single = run.model_copy(
            update={
                "run": config.RunSection(directory=place / "alone", seed=run.run.seed),
                "topology": config.TopologySection(shards=1, replicas=1, colocate=True),
            }
        )
        assert result.test is not None
        train(single, alone)
        np.testing.assert_array_equal(learned(run), learned(single))
    alone.Free()
    comm.Barrier()


@pytest.mark.parallel([1])
def test_a_simulated_replica_learns_what_a_serial_loop_learns(comm, place) -> None:
    run = tiny.describe(place, network=ROUNDED, topology={"shards": 2, "replicas": 1})
    simulate(run)
    np.testing.assert_allclose(learned(run), tiny.Twin(run).learn(), rtol=1e-5, atol=1e-6)


@pytest.mark.parallel([1, 2, 3])
def test_a_run_that_resumes_goes_on_in_its_precision(comm, place) -> None:
    described = {"network": ROUNDED, "topology": {"shards": 1, "replicas": 1, "partitions": max(1, comm.size - 1)}}
    parts = []
    for epochs in ((4,), (2, 4)):
        for until in epochs:
            run = tiny.describe(
                place,
                run={"directory": place / f"run-{len(epochs)}"},
                optimizer={"epochs": until},
                server={"overlap": "none"},
                **described,
            )
            train(run, comm)
        if comm.rank == 0:
            parts.append(learned(run))
    if comm.rank == 0:
        np.testing.assert_array_equal(*parts)


@pytest.mark.parallel([1, 2, 4])
def test_trained_networks_are_evaluated_in_their_precision(comm, place) -> None:
    run = tiny.describe(place, network=ROUNDED)
    result = train(run, comm)
    if comm.rank == 0:
        expected = tiny.Twin(run).test(learned(run))
        plain = tiny.Twin(run.model_copy(update={"network": PLAIN})).test(learned(run))
        assert result.test is not None
        assert result.test.loss == pytest.approx(expected.loss, rel=1e-6)
        assert result.test.loss != pytest.approx(plain.loss, rel=1e-5)
    comm.Barrier()
    again = evaluate(run.run.directory, place / "test.h5", comm=comm)
    if comm.rank == 0:
        assert again.loss == pytest.approx(expected.loss, rel=1e-6)


def pretend(monkeypatch, engine: str) -> None:
    """Let what is said be that of an engine; another one multiplies."""
    said = SimpleNamespace(ENGINES=bfloat16.ENGINES, engine=lambda: engine, reason=lambda: "a reason")
    monkeypatch.setattr(precision, "bfloat16", said)


@pytest.mark.parallel([1, 2, 3])
def test_what_is_said_is_said_once(comm, place, capfd, monkeypatch) -> None:
    """That nothing becomes faster, or that ranks multiply in different ways; and which own layers stay in float32."""
    layers = [{"type": "own_layer:Maxout", "units": 5, "pieces": 3}, *tiny.LAYERS]
    pretend(monkeypatch, ["float32", "amx", "avx512_bf16"][comm.rank])
    run = tiny.describe(
        place,
        network={"layers": layers, "precision": "bfloat16", "code": EXAMPLES},
        optimizer={"epochs": 1},
        monitor={"progress": "lines"},
    )
    capfd.readouterr()
    train(run, comm)
    said = capfd.readouterr().out
    count = int(comm.rank == 0)
    assert said.count("brings no speed here: numbers are rounded, and multiplied as float32 (a reason)") == (
        count if comm.size == 1 else 0
    )
    assert said.count("this job is mixed") == (count if comm.size > 1 else 0)
    if comm.size > 1 and comm.rank == 0:
        assert f"of its {comm.size} ranks, 1 by float32" in said
    assert said.count("layer 'maxout1' is of your own and says nothing of bfloat16") == count


@pytest.mark.parallel([1, 2])
def test_nothing_is_said_in_float32_or_of_the_fastest(comm, monkeypatch) -> None:
    for name, engine in (("float32", "float32"), ("bfloat16", "amx")):
        pretend(monkeypatch, engine)
        network = WholeNetwork(config.NetworkSection(layers=(config.Dense(units=3),), precision=name), (4,), 1)
        assert precision_notes(network, comm) == ()


@pytest.mark.parallel([1, 2, 3, 4, 6])
@pytest.mark.parametrize("rule", [{"rule": "adagrad"}, {"rule": "sgd", "delay_compensation": "constant"}])
def test_shards_keep_rounded_parameters_beside_those_that_workers_compute_on(comm, monkeypatch, rule) -> None:
    """Bit for bit, whoever pushes and however pushes are cut into chunks and blocks."""
    monkeypatch.setattr(server_module, "_BLOCK", 7)
    elements, colocate = 1003, comm.size < 3
    shards = max(1, comm.size // 2)
    plan = Plan(shards, comm.size if colocate else comm.size - shards, colocate=colocate)
    section = config.ServerSection(fetch="shared", overlap="none")
    optimizer = config.OptimizerSection(learning_rate=0.1, **rule)
    compensates = optimizer.delay_compensation != "none"
    with (
        Communicators(comm, plan) as comms,
        Store(
            *(comms.world, plan, cut(elements, shards), section, np.dtype(np.float32), elements),
            chunk=100,
            compensates=compensates,
            kept_size=elements if compensates else 0,
            rounded=True,
        ) as store,
    ):
        server = None if comms.shard is None else store.server(rules.rule(optimizer))
        if server is not None:
            server.parameters[:] = np.random.default_rng(comms.shard).normal(size=server.parameters.size)
            server.begin(None)
        serve = (lambda: False) if server is None else server.poll
        waiting.barrier(comms.world, "all to begin", serve=serve)
        client = None if comms.worker is None else store.client(serve=serve)
        random = np.random.default_rng(100 + comm.rank)
        for _ in range(3 if client is not None else 0):
            client.fetch(client.parameters)
            client.gradients[0][:] = random.normal(size=elements)
            client.push(client.gradients[0])
            client.report(Outcome(1, 0.0, 0), 1)
            client.drain(serve)
            client.wait()
        waiting.barrier(comms.world, "all to be applied", serve=serve)
        if client is not None:
            expected = np.empty(elements, np.uint16)
            bfloat16.rounded(client.parameters, expected)
            np.testing.assert_array_equal(client.rounded, expected)
            assert len(np.unique(expected)) > elements / 4
        waiting.barrier(comms.world, "all to have looked", serve=serve)
