"""Whole runs under real MPI: equal to a serial twin where that is defined, exactly-once everywhere, and resumable."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint import directory
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.config import Run
from dbmpi.data.stream import Order, Stream
from dbmpi.downpour import buffer
from dbmpi.downpour.worker import Worker
from dbmpi.monitor.records import read_records
from dbmpi.mpi import waiting
from dbmpi.paramserver.client import Client
from dbmpi.runs.training import train

ALL = 10**9


class Loads:
    """Which batches this rank's worker has loaded, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mine: list[int] = []
        self.samples: list[int] = []
        self.before: Callable[[int], None] = lambda number: None
        load = Worker.load

        def noted(worker: Worker, number: int):
            self.before(number)
            self.mine.append(number)
            self.samples += worker._order.indices(number).tolist()
            return load(worker, number)

        monkeypatch.setattr(Worker, "load", noted)

    def all(self, comm) -> Counter[int]:
        """Return how often any rank has loaded each batch since the last call (collective)."""
        counted = Counter(number for mine in comm.allgather(self.mine) for number in mine)
        self.mine = []
        return counted


@pytest.fixture
def loads(monkeypatch) -> Loads:
    return Loads(monkeypatch)


def one_worker(ranks: int, colocate: bool) -> dict[str, dict[str, object]]:
    """Let one replica learn everything, whatever the number of ranks."""
    if colocate or ranks == 1:
        # The other replicas wait for the end of a warmstart that does not end: their ranks are there for the shards.
        return {
            "topology": {"shards": ranks, "replicas": ranks, "colocate": True},
            "optimizer": {"warmstart": ALL if ranks > 1 else 0},
        }
    return {"topology": {"shards": ranks - 1, "replicas": 1}, "optimizer": {}}


def describe_one(place: Path, ranks: int, colocate: bool, **optimizer: object) -> Run:
    settings = one_worker(ranks, colocate)
    usual = {"learning_rate": 0.1, "batch_size": 6, "epochs": 7.14}
    return tiny.describe(place, topology=settings["topology"], optimizer=usual | settings["optimizer"] | optimizer)


# One worker equals the serial twin


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "colocated"])
def test_one_worker_equals_the_serial_loop_bit_for_bit(comm, place, rule, colocate) -> None:
    run = describe_one(place, comm.size, colocate, rule=rule, epsilon=1e-8)
    result = train(run, comm)
    twin = tiny.Twin(run)
    assert twin.order.batches == result.steps == 50
    expected, found = twin.learn(), tiny.vectors(result.checkpoint)
    np.testing.assert_array_equal(found["parameters"], expected)
    if rule == "adagrad":
        np.testing.assert_array_equal(found["accumulator"], twin.rule.state["accumulator"])
    assert result.staleness == 0


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(("n_push", "n_fetch", "local_rate"), [(3, 2, 0.05), (2, 5, 0.0), (1, 4, 0.2), (4, 1, 0.1)])
def test_one_worker_equals_algorithm_1_1_bit_for_bit(comm, place, n_push, n_fetch, local_rate) -> None:
    run = describe_one(place, comm.size, False, n_push=n_push, n_fetch=n_fetch, local_rate=local_rate, rule="adagrad")
    result = train(run, comm)
    twin = tiny.Twin(run)
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], twin.learn())
    with Checkpoint.open(result.checkpoint) as checkpoint:
        pushes = -(-50 // n_push) if (50 - 1) % n_push == 0 else (50 - 1) // n_push + 2
        assert (checkpoint.info.step, set(checkpoint.info.shard_versions)) == (50, {pushes})


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("push", ["shared", "copied"])
@pytest.mark.parametrize("gradients", ["whole", "layers"])
@pytest.mark.parametrize("fetch", ["shared", "copied"])
def test_computing_on_the_shards_own_memory_and_layer_by_layer_equals_copies(
    comm, place, monkeypatch, push, gradients, fetch
) -> None:
    monkeypatch.setattr(buffer, "_ENOUGH", 1)
    server = {"push": push, "fetch": fetch, "gradients": gradients}
    topology = {"shards": comm.size - 1, "replicas": 1}
    run = tiny.describe(place, server=server, topology=topology)
    result = train(run, comm)
    if comm.rank == 0:
        np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], tiny.Twin(run).learn())


@pytest.mark.parallel([2, 6])
def test_more_shards_than_parameters(comm, place) -> None:
    """Two parameters, up to five shards: those with nothing to hold take part all the same."""
    if comm.rank == 0:
        x = np.linspace(-1, 1, 20)[:, None]
        tiny.write_file(place / "line.h5", x, (0.5 * x - 0.25).astype(np.float32), classes=None)
    waiting.barrier(comm, "the line")
    run = tiny.describe(
        place,
        data={"train": place / "line.h5", "test": None},
        network={"layers": [{"units": 1}], "loss": "squared"},
        topology={"shards": comm.size - 1},
        optimizer={"rule": "sgd", "epochs": 5},
    )
    result = train(run, comm)
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], tiny.Twin(run).learn())


# Several workers


@pytest.mark.parallel([2, 3, 4, 6])
@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "colocated"])
def test_every_sample_is_learned_exactly_once_an_epoch(comm, place, loads, colocate) -> None:
    run = tiny.describe(place, topology={"shards": 1, "colocate": colocate}, optimizer={"epochs": 4, "warmstart": 3})
    result = train(run, comm)
    order = Order(tiny.SAMPLES, 6, 4, run.run.seed)
    samples = Counter(sample for mine in comm.allgather(loads.samples) for sample in mine)
    assert samples == dict.fromkeys(range(tiny.SAMPLES), 4)
    assert loads.all(comm) == dict.fromkeys(range(order.batches), 1)
    assert (result.steps, result.samples) == (order.batches, 4 * tiny.SAMPLES)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.step, info.samples, sum(info.done)) == (order.batches, 4 * tiny.SAMPLES, order.batches)
    assert (info.frontier, info.total, info.holes) == (order.batches, order.batches, ())


@pytest.mark.parallel([6])
def test_a_world_of_six_learns(comm, place) -> None:
    run = tiny.describe(place, topology={"shards": 2}, optimizer={"epochs": 60, "learning_rate": 0.05, "warmstart": 10})
    result = train(run, comm)
    assert result.test is not None
    assert result.test.accuracy >= 0.9
    assert result.steps == 60 * 7


@pytest.mark.parallel([1, 2, 4])
def test_the_final_evaluation_equals_a_serial_one_of_the_checkpoint(comm, place) -> None:
    run = tiny.describe(place, topology={"shards": 1}, optimizer={"epochs": 6})
    result = train(run, comm)
    expected = tiny.Twin(run).test(tiny.vectors(result.checkpoint)["parameters"])
    assert result.test is not None
    assert (result.test.samples, result.test.correct) == (tiny.TEST_SAMPLES, expected.correct)
    assert result.test.loss == pytest.approx(expected.loss, rel=1e-5)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.test_step, info.test_loss) == (info.step, result.test.mean_loss)
    assert (info.test_accuracy, info.data_name, info.data_samples) == (result.test.accuracy, "train.h5", tiny.SAMPLES)
    assert (run.run.directory / "checkpoints" / "best").resolve() == result.checkpoint.resolve()
    if comm.rank == 0:
        last = [record for record in read_records(run.run.directory) if record["kind"] == "evaluation"][-1]
        assert (last["samples"], last["epoch"]) == (tiny.TEST_SAMPLES, 6)
        assert last["loss"] == pytest.approx(expected.mean_loss, rel=1e-5)


@pytest.mark.parallel([1])
def test_evaluations_do_not_hide_staleness(comm, place) -> None:
    """With four steps a fetch, one replica's own pushes make its gradients 0, 1, 2 and 3 versions old."""
    optimizer = {"n_fetch": 4, "epochs": 8, "batch_size": 10}
    run = tiny.describe(place, optimizer=optimizer, monitor={"evaluate_epochs": 0.25, "progress": "none"})
    assert train(run, comm).staleness == 1.5


# Warmstart


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "colocated"])
def test_other_replicas_begin_after_the_warmstart(comm, place, loads, monkeypatch, colocate) -> None:
    versions: list[int] = []
    fetch = Client.fetch

    def noted(client: Client, parameters: np.ndarray, **options: bool) -> None:
        fetch(client, parameters, **options)
        if options.get("for_gradient", True):
            versions.append(client.versions[0])

    monkeypatch.setattr(Client, "fetch", noted)
    run = tiny.describe(place, topology={"shards": 1, "colocate": colocate}, optimizer={"epochs": 6, "warmstart": 20})
    train(run, comm)
    workers = [(v, mine) for v, mine in comm.allgather((versions, loads.mine)) if mine]
    (first, learned), others = workers[0], workers[1:]
    assert learned[:20] == list(range(20))
    assert first[:20] == list(range(20))
    assert others
    assert all(v[0] >= 20 for v, _ in others)
    assert all(min(mine) >= 20 for _, mine in others)


@pytest.mark.parallel([3])
def test_a_wait_longer_than_the_stall_limit_is_no_stall_while_the_run_moves(comm, place, loads, monkeypatch) -> None:
    """A long warmstart, then a replica that is much slower than the other, then an evaluation; an empty shard.

    Time passes by the batches of who is waited for alone: what else keeps the cores or the disk busy is no stall.
    """
    clock, slow = place / "clock", comm.rank == 0
    if comm.rank == 0:
        x = np.linspace(-1, 1, 20)[:, None]
        tiny.write_file(place / "line.h5", x, (0.5 * x - 0.25).astype(np.float32), classes=None)
        clock.touch()
    waiting.barrier(comm, "the line")
    run = tiny.describe(
        place,
        data={"train": place / "line.h5", "test": place / "line.h5"},
        network={"layers": [{"units": 1}], "loss": "squared"},
        topology={"shards": 3, "colocate": True},
        optimizer={"rule": "sgd", "epochs": 8, "batch_size": 2, "warmstart": 20},
    )

    def tick(number: int) -> None:
        if number < 20 or slow:
            with clock.open("ab") as file:
                file.write(b".")

    loads.before = tick
    monkeypatch.setattr(waiting, "STALL_SECONDS", 10.0)
    monkeypatch.setattr(time, "monotonic", lambda: float(clock.stat().st_size))
    result = train(run, comm)
    assert result.steps == 80
    assert loads.all(comm) == dict.fromkeys(range(80), 1)
    assert clock.stat().st_size == 40


# Going on from a checkpoint


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "colocated"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(comm, place, colocate) -> None:
    whole = describe_one(place, comm.size, colocate, epochs=7.14)
    seconds, tested = 0.0, 0
    for epochs in (1.3, 1.3, 7.14):  # the second one has nothing left to do
        result = train(describe_one(place, comm.size, colocate, epochs=epochs), comm)
        with Checkpoint.open(result.checkpoint) as checkpoint:
            info = checkpoint.info
        assert info.seconds > seconds
        assert info.test_step > tested or epochs == 1.3
        assert 0 <= info.accuracy <= 1
        assert np.isfinite(info.loss)
        assert info.host
        assert info.user
        seconds, tested = info.seconds, info.test_step
    twin = tiny.Twin(whole)
    found = tiny.vectors(result.checkpoint)
    np.testing.assert_array_equal(found["parameters"], twin.learn())
    np.testing.assert_array_equal(found["accumulator"], twin.rule.state["accumulator"])
    assert (info.step, max(info.shard_versions), info.frontier, info.holes) == (50, 50, 50, ())
    with h5py.File(result.checkpoint) as file:  # also where it is a view of several files
        for vector in ("parameters", "state/accumulator"):
            scales = [dimension[0].name for dimension in file[f"{vector}/dense1/weights"].dims]
            assert scales == [f"/{vector}/dense1/unit", f"/{vector}/dense1/input"]
        assert file.attrs["test_loss"] == info.test_loss
    assert info.samples == sum(twin.order.size(number) for number in range(50))
    if comm.rank == 0:
        assert {record["session"] for record in read_records(whole.run.directory)} <= {1, 2, 3}


def learned(checkpoint: Path) -> set[int]:
    """Return the batches that a checkpoint says have been learned."""
    with Checkpoint.open(checkpoint) as opened:
        info = opened.info
    left = Stream(info.total, info.frontier, info.holes)
    return set(range(info.total)) - {left.item(position) for position in range(len(left))}


@pytest.mark.parallel([4, 6])
@pytest.mark.parametrize("n_push", [1, 3])
def test_another_topology_learns_every_remaining_batch_exactly_once(comm, place, loads, n_push) -> None:
    """Stopped by a signal, so that the replicas are at different places; three topologies, the last with partitions."""
    epochs, order = 20, Order(tiny.SAMPLES, 6, 20, 3)
    seen: Counter[int] = Counter()
    topologies = [{"shards": 1}, {"shards": comm.size, "colocate": True}, {"shards": 2, "partitions": 2}]
    for session, topology in enumerate(topologies):
        run = tiny.describe(place, topology=topology, optimizer={"epochs": epochs, "n_push": n_push, "warmstart": 5})
        stop_at = 10 * (comm.rank + 1)

        def stop(number: int, session: int = session, stop_at: int = stop_at) -> None:
            if session < 2 and len(loads.mine) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001 * comm.rank)

        loads.before = stop
        result = train(run, comm)
        loaded, partitions = loads.all(comm), topology.get("partitions", 1)
        assert all(times % partitions == 0 for times in loaded.values())
        now = Counter({batch: times // partitions for batch, times in loaded.items()})
        assert result.steps == sum(now.values())
        seen += now
        assert set(seen) == learned(result.checkpoint)
        with Checkpoint.open(result.checkpoint) as checkpoint:
            info = checkpoint.info
        assert info.step == sum(seen.values())
        assert info.samples == sum(order.size(number) for number in seen)
        assert result.stopped_by == (signal.SIGTERM if session < 2 else 0)
        assert 0 < len(seen) < order.batches or session == 2
    assert seen == dict.fromkeys(range(order.batches), 1)


@pytest.mark.parallel([2])
def test_a_run_goes_on_under_another_rule(comm, place) -> None:
    for epochs, rule in ((1, "adagrad"), (2, "sgd"), (3, "adagrad")):
        result = train(tiny.describe(place, optimizer={"epochs": epochs, "rule": rule}), comm)
        assert ("accumulator" in tiny.vectors(result.checkpoint)) == (rule == "adagrad")
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert checkpoint.info.step == 21


# Checkpoints in mid-run


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize(("n_push", "colocate"), [(1, False), (1, True), (3, False)])
def test_checkpoints_in_mid_run_are_consistent(comm, place, n_push, colocate) -> None:
    """As many pauses as can be: each file holds what all replicas have pushed, and the same on every shard."""
    run = tiny.describe(
        place,
        topology={"shards": max(1, comm.size // 2), "colocate": colocate},
        optimizer={"epochs": 12, "n_push": n_push, "warmstart": 4},
        checkpoint={"every_seconds": 1e-6, "keep": 1000},
    )
    result = train(run, comm)
    order = Order(tiny.SAMPLES, 6, 12, 3)
    assert result.steps == order.batches
    files = directory.checkpoints(run.run.directory / "checkpoints")
    assert len(files) > 1  # how many more depends on the disk: the run goes on while one is written
    for path in files[comm.rank :: comm.size]:
        with Checkpoint.open(path) as checkpoint:
            info = checkpoint.info
        batches = learned(path)
        assert info.step == sum(info.done) == len(batches) == directory.step_of(path)
        assert info.samples == sum(order.size(number) for number in batches)
        assert len(set(info.shard_versions)) == 1
        if n_push == 1:
            assert info.shard_versions[0] == info.step


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("layout", ["shards", "single"])
def test_an_interrupted_run_equals_an_uninterrupted_one_also_from_a_checkpoint_in_mid_run(comm, place, layout) -> None:
    """Written while training went on; then loaded by another number of shards."""
    run = describe_one(place, comm.size, False, epochs=2)
    section = run.checkpoint.model_copy(update={"every_seconds": 1e-6, "keep": 99, "layout": layout})
    often = run.model_copy(update={"checkpoint": section})
    train(often, comm)
    files = directory.checkpoints(run.run.directory / "checkpoints")
    waiting.barrier(comm, "all to have looked")
    middle = files[len(files) // 2]
    if comm.rank == 0:
        for path in files[: len(files) // 2]:
            path.unlink()
        (middle.parent / "latest").unlink()
    waiting.barrier(comm, "later checkpoints to be gone")
    assert directory.step_of(middle) not in (0, 14)
    assert len(directory.shard_files(middle)) == (comm.size - 1 if comm.size > 1 and layout == "shards" else 0)
    waiting.barrier(comm, "all to have looked again")
    result = train(describe_one(place, comm.size, True, epochs=2), comm)
    assert result.steps == 14 - directory.step_of(middle)
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], tiny.Twin(run).learn())


# The end by a signal


@pytest.mark.parallel([1, 3, 4])
@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "colocated"])
def test_a_stop_during_a_pause_ends_the_run(comm, place, loads, monkeypatch, colocate) -> None:
    """The lead gets the signal while it writes a checkpoint and all workers rest."""
    commit, sent = CheckpointWriter.commit, []

    def interrupted(writer: CheckpointWriter, *arguments: object) -> Path:
        if not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return commit(writer, *arguments)

    monkeypatch.setattr(CheckpointWriter, "commit", interrupted)
    results = []
    for every in (1e-6, 0):
        run = tiny.describe(
            place,
            topology={"colocate": colocate},
            optimizer={"epochs": 100},
            checkpoint={"every_seconds": every},
        )
        results.append(train(run, comm))
    assert [result.stopped_by for result in results] == [signal.SIGINT, 0]
    assert 0 < results[0].steps < 700
    assert loads.all(comm) == dict.fromkeys(range(700), 1)


@pytest.mark.parallel([3])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_stop_while_a_warmstart_waits_ends_the_run(comm, place, loads, rank, number) -> None:
    """Whoever gets the signal: the lead, the replica that learns, or the one that waits."""
    run = tiny.describe(place, topology={"shards": 1}, optimizer={"epochs": 10**6, "warmstart": ALL})
    learning, sent = place / "learning", comm.rank != rank
    serve = waiting.Backoff.sleep

    def learn(batch: int) -> None:
        if batch == 5:
            learning.touch()

    def sleep(backoff: waiting.Backoff) -> None:
        nonlocal sent
        if not sent and learning.exists():
            sent = True
            os.kill(os.getpid(), number)
        serve(backoff)

    loads.before = learn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting.Backoff, "sleep", sleep)
        result = train(run, comm)
    assert result.stopped_by == number
    assert result.steps >= 5
    assert [mine > 0 for mine in comm.allgather(len(loads.mine))] == [False, True, False]
    assert signal.getsignal(number) == (signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
