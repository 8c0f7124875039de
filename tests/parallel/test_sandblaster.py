"""Whole runs of Sandblaster under real MPI: equal to a serial twin, whatever the ranks; warm starts and resumes."""

from __future__ import annotations

import os
import re
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.errors import RunFailed, UserError
from dbmpi.kernels import updates, vectors
from dbmpi.methods.descent import Limits
from dbmpi.methods.gradients import with_l2
from dbmpi.methods.lbfgs import lbfgs
from dbmpi.methods.local_space import LocalSpace
from dbmpi.monitor.records import read_records
from dbmpi.mpi import waiting
from dbmpi.network import own
from dbmpi.objective import Outcome
from dbmpi.runs.training import train
from dbmpi.sandblaster.board import Board, PassKind, PostedBatch
from dbmpi.sandblaster.checkpoints import Keeper
from dbmpi.sandblaster.coordinator import Coordinator
from dbmpi.sandblaster.passes import Passes
from dbmpi.sandblaster.work import PortionWork

PORTIONS = 7  # 40 samples in portions of 6
EXAMPLES = Path(__file__).parents[2] / "examples"


def describe(
    place: Path,
    topology: dict[str, object],
    name: str = "run",
    epochs: float = 12,
    server: dict[str, object] | None = None,
    **settings: object,
) -> Run:
    return tiny.describe(
        place,
        run={"directory": place / name},
        topology=topology,
        optimizer={"method": "sandblaster", "batch_size": 6, "epochs": epochs},
        sandblaster=settings,
        server=server or {},
    )


def serial(run: Run, evaluations: int, method: Callable[..., object] | None = None) -> np.ndarray:
    """Return the parameters after a serial run: one vector, one loop over the portions, in their order."""
    twin = tiny.Twin(run)
    space = LocalSpace(twin.server.size, np.float32, vectors={"parameters": twin.server})
    part, weighted = np.empty_like(twin.server), np.empty_like(twin.server)

    def evaluate(point: str, gradient: str) -> float:
        total, x = Outcome(0, 0.0, 0), space.array(point).copy()
        target = space.writable(gradient)
        target[:] = 0
        for portion in range(PORTIONS):
            outcome = twin.network.loss_and_gradient(x, twin.batch(portion), part)
            vectors.combine(weighted, [outcome.samples / tiny.SAMPLES], [part])
            updates.add(target, weighted)
            total = total.plus(outcome)
        return total.mean_loss

    settings = run.sandblaster
    evaluate = with_l2(space, evaluate, settings.l2) if settings.l2 else evaluate
    limits = Limits(settings.gtol, settings.ftol, evaluations=evaluations)
    if method is None:
        lbfgs(space, evaluate, memory=settings.memory, limits=limits)
    else:
        method(space, evaluate, limits=limits, callback=lambda progress: progress.evaluations >= evaluations)
    return twin.server


TOPOLOGIES = {
    1: [{}],
    3: [{"shards": 1, "replicas": 2}, {"shards": 2, "replicas": 1}, {"shards": 3, "replicas": 3, "colocate": True}],
    4: [{"shards": 2, "replicas": 4, "colocate": True}],
    5: [{"shards": 1, "replicas": 4}, {"shards": 3, "replicas": 2}],
}


@pytest.mark.parallel([1, 3, 4, 5])
def test_in_order_all_bits_are_those_of_a_serial_run(comm, place) -> None:
    for number, topology in enumerate(TOPOLOGIES[comm.size]):
        run = describe(place, topology, f"run{number}", deterministic=True, memory=3, l2=0.01 * number, gtol=0, ftol=0)
        result = train(run, comm)
        assert result.stopped_by == 0
        assert result.steps >= 12 * PORTIONS
        expected = serial(run, 12)
        np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)
        assert result.test[:3] == pytest.approx(tiny.Twin(run).test(expected)[:3], rel=1e-5)
        batches = [record for record in read_records(run.run.directory) if record["kind"] == "batch"]
        assert len(batches) == result.steps / PORTIONS
        assert {sum(record["portions"].values()) for record in batches} == {PORTIONS}
        assert {len(record["ledger"]) for record in batches} == {PORTIONS}


@pytest.mark.parallel([1, 4])
def test_a_method_of_ones_own_trains_a_network(comm, place) -> None:
    name = "own_batch_method:barzilai_borwein"
    run = describe(place, TOPOLOGIES[comm.size][0], algorithm=name, deterministic=True, gtol=0)
    run = run.model_copy(update={"network": run.network.model_copy(update={"code": EXAMPLES})})
    result = train(run, comm)
    assert result.steps >= 12 * PORTIONS
    method = own.member(name, "the test", EXAMPLES)
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], serial(run, 12, method))
    for wrong, said in {"nothing": "defines no 'nothing'", "main": "it takes (", "FIRST": "that is a float"}.items():
        other = run.sandblaster.model_copy(update={"algorithm": f"own_batch_method:{wrong}"})
        with pytest.raises(UserError, match=re.escape(said) if comm.rank == 0 else "rank 0"):
            train(run.model_copy(update={"sandblaster": other}), comm)


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("transport", ["rma", "p2p"])
def test_between_hosts_the_bits_are_the_same(comm, place, transport) -> None:
    """Two ranks share memory, others are reached by transfers and atomics or by messages, with one result."""
    comm, server = tiny.Hosts(comm), {"transport": transport}
    topology = {"shards": 1} if comm.size == 3 else {"shards": 2, "colocate": True}
    run = describe(place, topology, server=server, deterministic=True, memory=3, gtol=0, ftol=0, epochs=6)
    np.testing.assert_array_equal(tiny.vectors(train(run, comm).checkpoint)["parameters"], serial(run, 6))
    other = describe(place, topology | {"partitions": 2}, "other", server=server, portions_per_push=3, epochs=6)
    assert train(other, comm).test.samples == tiny.TEST_SAMPLES


@pytest.mark.parallel([3, 5])
@pytest.mark.parametrize("per_push", [1, 3])
def test_in_any_order_the_minimum_is_the_same(comm, place, per_push) -> None:
    run = describe(place, {"shards": 2 if comm.size > 3 else 1}, epochs=200, portions_per_push=per_push, l2=0.05)
    result = train(run, comm)
    x = tiny.vectors(result.checkpoint)["parameters"]
    twin = tiny.Twin(run)
    gradient, part = np.zeros_like(x), np.empty_like(x)
    for portion in range(PORTIONS):
        outcome = twin.network.loss_and_gradient(x, twin.batch(portion), part)
        gradient += outcome.samples / tiny.SAMPLES * part
    assert np.abs(gradient + 0.05 * x).max() < 1e-3
    assert result.steps < 200 * PORTIONS


@pytest.mark.parallel([3, 4, 5])
def test_replicas_of_two_partitions(comm, place) -> None:
    topology = {"shards": 2, "partitions": 2, "colocate": True} if comm.size == 4 else {"shards": 1, "partitions": 2}
    run = describe(place, topology, deterministic=True, memory=3, gtol=0, ftol=0, epochs=6)
    result = train(run, comm)
    np.testing.assert_allclose(tiny.vectors(result.checkpoint)["parameters"], serial(run, 6), rtol=1e-3, atol=1e-4)
    for record in [record for record in read_records(run.run.directory) if record["kind"] == "worker"]:
        assert {"forward 1", "backward 1", "exchange 2"} <= set(record["layers"])
        assert record["seconds"]["exchange"] > 0
    other = describe(place, topology, "other", epochs=6, portions_per_push=2)
    assert train(other, comm).test.samples == tiny.TEST_SAMPLES


@pytest.mark.parallel([2, 3])
def test_downpour_sandblaster_and_downpour_go_on_from_one_another(comm, place) -> None:
    def run(method: str, epochs: float) -> Run:
        return tiny.describe(place, optimizer={"method": method, "batch_size": 6, "epochs": epochs, "rule": "adagrad"})

    first = tiny.vectors(train(run("downpour", 3), comm).checkpoint)
    middle = train(run("sandblaster", 8), comm)
    then = tiny.vectors(middle.checkpoint)
    np.testing.assert_array_equal(then["accumulator"], first["accumulator"])
    assert {"s0", "y0"} < set(then)
    with Checkpoint.open(middle.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.step, info.frontier, info.holes) == (3 * PORTIONS + middle.steps, 8 * PORTIONS, ())
    assert (info.test_step, info.test_loss) == (info.step, middle.test.mean_loss)
    assert 0 < info.loss < 10
    assert 0 <= info.accuracy <= 1
    assert info.seconds > 0
    last = train(run("downpour", 9), comm)
    after = tiny.vectors(last.checkpoint)
    assert last.steps == PORTIONS
    assert np.all(after["accumulator"] >= then["accumulator"])
    assert set(after) == {"parameters", "accumulator"}


STOPS = {"whole": {}, "partial": {"batch_portions": 3, "batch_iterations": 2, "batch_growth": 1.5}}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("batches", STOPS)
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(comm, place, monkeypatch, batches) -> None:
    settings = {"memory": 4, "deterministic": True, "l2": 0.01, "gtol": 0, "ftol": 0, **STOPS[batches]}
    topology = {} if comm.size == 1 else {"shards": 2, "replicas": 1}
    whole = train(describe(place, topology, "whole", epochs=20, **settings), comm)
    calls, allow = [], [0]
    submit = Passes.begin

    def stopping(self: Passes, kind: PassKind, *arguments: int) -> None:
        calls.append(0)
        if len(calls) == allow[0] or (kind == PassKind.TEST and not allow[0]):
            os.kill(os.getpid(), signal.SIGTERM)
        submit(self, kind, *arguments)

    monkeypatch.setattr(Passes, "begin", stopping)
    stops = 0
    for allow[0] in (2, 6, 3, 0):
        calls.clear()
        result = train(describe(place, topology, epochs=20, **settings), comm)
        stops += result.stopped_by == signal.SIGTERM
        with Checkpoint.open(result.checkpoint) as checkpoint:
            info = checkpoint.info
        assert info.step <= 20 * PORTIONS
    assert stops == 4
    assert result.test is None  # the last signal came while it was made
    first, last = tiny.vectors(whole.checkpoint), tiny.vectors(result.checkpoint)
    assert set(last) == set(first) > {"parameters", "s0", "y0"}
    for name, vector in first.items():
        np.testing.assert_array_equal(last[name], vector)
    assert (info.frontier, info.step) == (20 * PORTIONS, whole.steps) if batches == "whole" else info.frontier


@pytest.mark.parallel([1, 3])
def test_downpour_and_sandblaster_go_on_from_one_another_with_batches_of_other_sizes(comm, place) -> None:
    def run(method: str, epochs: float, size: int) -> Run:
        return tiny.describe(place, optimizer={"method": method, "batch_size": size, "epochs": epochs})

    train(run("downpour", 1.5, 4), comm)
    middle = train(run("sandblaster", 6, 11), comm)
    with Checkpoint.open(middle.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.total, info.holes) == (6 * 4, ())
    assert info.frontier in (1 + 4 * k for k in range(6)) or info.frontier % 4 == 1 or info.frontier == info.total
    last = train(run("downpour", 8, 5), comm)
    assert last.samples >= 2 * tiny.SAMPLES
    assert last.test.samples == tiny.TEST_SAMPLES


@pytest.mark.parallel([3])
def test_the_lead_holds_no_more_than_another_shard(comm, place) -> None:
    """Although the coordinator is on it, to whom a vector would be 4 MB: as much as both shards' parts together."""
    layers = ({"units": 1000, "activation": "tanh"}, {"units": 1000}, {"units": tiny.CLASSES})
    optimizer = {"method": "sandblaster", "batch_size": 6, "epochs": 4}
    run = tiny.describe(
        place, network={"layers": layers}, topology={"shards": 2}, optimizer=optimizer, sandblaster={"l2": 0.01}
    )
    tracemalloc.start()
    train(run, comm)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    lead, shard, _ = comm.allgather(peak)
    assert lead - shard < 400_000
    assert shard > 8_000_000  # vectors are counted


@pytest.mark.parallel([3])
@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "conjugate_gradients"},
        {"algorithm": "gradient_descent", "line_search": "backtracking"},
        {"l1": 0.02},
        {"batch_portions": 3, "batch_iterations": 2},
        {"batch_portions": 2, "batch_iterations": 2, "batch_growth": 2.0},
        {"batch_portions": 4, "batch_iterations": 1, "batch_overlap": 1, "line_search": "fixed", "step_length": 0.5},
        {"line_search": "fixed", "step_length": 0.5, "memory": 3},
        {"memory": 0},
    ],
    ids=str,
)
def test_all_methods_decrease_the_loss(comm, place, settings) -> None:
    run = describe(place, {"shards": 2, "replicas": 1}, epochs=15, **settings)
    result = train(run, comm)
    parameters = tiny.vectors(result.checkpoint)["parameters"]
    twin = tiny.Twin(run)
    before, after = (twin.test(x).mean_loss for x in (twin.server, parameters))
    assert after < 0.6 * before
    assert (np.count_nonzero(parameters == 0) > 10) == ("l1" in settings)


@pytest.mark.parallel([1, 3])
def test_dropout_draws_other_masks_with_other_batches(comm, place, monkeypatch) -> None:
    """Of all samples, too; and what is tried along one line sees the same masks."""
    dropped = ({"units": 7, "activation": "tanh"}, {"type": "dropout", "rate": 0.3}, {"units": tiny.CLASSES})
    optimizer = {"method": "sandblaster", "batch_size": 6, "epochs": 20}
    settings = {"batch_iterations": 2, "gtol": 0, "ftol": 0}
    topology = {} if comm.size == 1 else {"shards": 1}
    parts = {"network": {"layers": dropped}, "optimizer": optimizer, "topology": topology}
    run = tiny.describe(place, sandblaster=settings, **parts)
    batches, begin = [], Passes.begin

    def noted(self: Passes, kind: PassKind, portions: int, first: int, *others: int) -> None:
        if kind == PassKind.GRADIENT:
            batches.append((first, portions))
        begin(self, kind, portions, first, *others)

    monkeypatch.setattr(Passes, "begin", noted)
    train(run, comm)
    if comm.rank == 0:
        assert {portions for _, portions in batches} == {PORTIONS}
        firsts = [first for first, _ in batches]
        assert firsts == sorted(firsts)
        assert set(firsts) >= {0, PORTIONS, 2 * PORTIONS}
        assert min(Counter(first for first in firsts if first < firsts[-1]).values()) >= 3  # the first, two iterations
    with pytest.raises(ValueError, match="dropout makes another one with each mask"):
        tiny.describe(place, sandblaster={"l1": 0.1}, **parts)


@pytest.mark.parallel([3])
def test_what_was_learned_is_written_before_a_failure_ends_the_run(comm, place, monkeypatch) -> None:
    """A method that fails after some iterations, and a loss that has no minimum."""
    evaluate, calls = Coordinator.evaluate, []

    def failing(self: Coordinator, point: str, gradient: str) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise RunFailed("the sixth evaluation fails")
        return evaluate(self, point, gradient)

    monkeypatch.setattr(Coordinator, "evaluate", failing)
    ended = []
    run = describe(place, {"shards": 2, "replicas": 1}, gtol=0, ftol=0)
    keep = Keeper.write

    def kept(self: Keeper, steps: int, samples: int, **more: bool) -> None:
        keep(self, steps, samples, **more)
        ended.append(steps)
        monkeypatch.setattr(Coordinator, "evaluate", evaluate)

    monkeypatch.setattr(Keeper, "write", kept)
    if comm.rank == 0:
        raised = []
        coordinate = Coordinator.run

        def running(self: Coordinator) -> None:
            try:
                coordinate(self)
            except RunFailed as failure:
                raised.append(str(failure))
                self._evaluator.end()  # the others of a test are to end, too

        monkeypatch.setattr(Coordinator, "run", running)
    result = train(run, comm)
    if comm.rank == 0:
        assert "the sixth evaluation fails  What was learned before is in " in raised[0]
        assert str(result.checkpoint) in raised[0]
        assert ended == [result.steps]
        assert 0 < result.steps < 6 * PORTIONS
        assert np.isfinite(tiny.vectors(result.checkpoint)["parameters"]).all()


@pytest.mark.parallel([4])
def test_a_slow_replica_gets_fewer_portions(comm, shared_path, monkeypatch) -> None:
    """One of three replicas takes as long for a portion as the others for twenty: they do not wait for it."""
    if comm.rank == 0:
        tiny.write_data(shared_path, samples=360)
    waiting.barrier(comm, "the data")
    compute, computed = PortionWork.compute, shared_path / "computed"

    def total() -> int:
        return computed.stat().st_size if computed.exists() else 0

    def slowly(self: PortionWork, batch: PostedBatch, portion: int, gradient: np.ndarray) -> Outcome:
        """By the count of what the others compute, and not by a clock, which also counts what else the cores do."""
        if comm.rank == 1:  # that of replica 0, behind the shard
            wanted = total() + 20
            while total() < wanted and not (shared_path / "over").exists():
                time.sleep(0.001)
        else:
            with computed.open("ab") as file:
                file.write(b".")
        return compute(self, batch, portion, gradient)

    monkeypatch.setattr(PortionWork, "compute", slowly)
    end = Board.end

    def over(self: Board) -> None:
        (shared_path / "over").touch()
        end(self)

    monkeypatch.setattr(Board, "end", over)
    run = describe(shared_path, {"shards": 1, "replicas": 3}, epochs=4, gtol=0, ftol=0)
    train(run, comm)
    batches = [record for record in read_records(run.run.directory) if record["kind"] == "batch"]
    assert batches
    for record in batches:
        assert sum(record["portions"].values()) == 60
        assert {int(replica): count for replica, count in record["portions"].items()} == Counter(record["ledger"])
        assert record["portions"].get("0", 0) <= 4  # 60 / (20 + 20 + 1), and one more


@pytest.mark.parallel([1, 4])
@pytest.mark.parametrize("size", [1000, 30])
def test_a_batch_smaller_than_a_portion_and_fewer_portions_than_replicas(comm, place, size) -> None:
    run = tiny.describe(place, optimizer={"method": "sandblaster", "batch_size": size, "epochs": 5})
    result = train(run, comm)
    assert result.samples == 5 * tiny.SAMPLES
    batches = [record for record in read_records(run.run.directory) if record["kind"] == "batch"]
    assert {sum(record["portions"].values()) for record in batches} == {-(-tiny.SAMPLES // size)}


@pytest.mark.parallel([1, 2])
def test_less_than_one_batch_is_refused(comm, place) -> None:
    with pytest.raises(
        UserError, match=r"gives 4 portions, but one Sandblaster batch needs 7|rank 0 reports a mistake"
    ):
        train(describe(place, {}, epochs=0.5), comm)
