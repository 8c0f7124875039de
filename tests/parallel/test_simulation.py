"""Runs in virtual time: equal to real ones where these are defined, and like them in all that they write."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.cli.main import main
from dbmpi.config import Run
from dbmpi.errors import RunFailed, UserError
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.measures import StalenessHistogram
from dbmpi.monitor.records import Record, read_records
from dbmpi.mpi import waiting
from dbmpi.runs.simulation import simulate
from dbmpi.runs.training import train

EPOCHS = 6
BATCHES = -(-tiny.SAMPLES // 6) * EPOCHS
SHAPES = {"weights": (5, 4), "bias": (7,)}
TIMES = {
    "compute": {"distribution": "gamma", "mean": 1.0, "deviation": 0.7},
    "network": {"distribution": "exponential", "mean": 0.1},
    "service": {"mean": 0.05},
}


class Whole:
    """Gradients are whole numbers that follow from the number of the batch, so that sums are exact."""

    def __init__(self) -> None:
        self.parameters = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}

    def loss_and_gradient(self, parameters, batch):
        flat, gradient = whole_numbers(batch.step), {}
        for name, shape in SHAPES.items():
            gradient[name], flat = flat[: np.prod(shape)].reshape(shape), flat[np.prod(shape) :]
        return 1.0, gradient

    def evaluate(self, parameters, batch):
        return 1.0


class Slow(Whole):
    """Each step takes 100 ms, give or take 50: much more than what else a replica does between its push and a fetch."""

    def loss_and_gradient(self, parameters, batch):
        time.sleep(np.random.default_rng(batch.step).gamma(4.0, 0.025))
        return super().loss_and_gradient(parameters, batch)


def whole_numbers(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(-8, 8, sum(map(np.prod, SHAPES.values()))).astype(np.float32)


def counted(place: Path, **sections: Any) -> Run:
    optimizer = {"rule": "sgd", "learning_rate": 1.0, "epochs": EPOCHS} | sections.pop("optimizer", {})
    simulation = sections.pop("simulation", TIMES)
    return tiny.describe(place, network={"layers": ()}, optimizer=optimizer, simulation=simulation, **sections)


def histogram(records: list[Record]) -> StalenessHistogram:
    found = StalenessHistogram()
    for record in records:
        if record["kind"] == "shard":
            found.merge(StalenessHistogram.from_json(record["staleness_histogram"]))
    return found


SERIAL: list[dict[str, Any]] = [
    {},
    {"rule": "sgd"},
    {"rule": "adam", "schedule": "cosine", "warmup_epochs": 0.5},
    {"n_push": 3},
    {"n_fetch": 3, "local_rate": 0.01},
    {"n_push": 2, "n_fetch": 3, "local_rate": 0.02, "accumulate": "mean"},
    {"n_push": 5, "n_fetch": 4, "clip_norm": 0.5},
    {"delay_compensation": "adaptive", "staleness_rate": "inverse", "warmstart": 5},
]


@pytest.mark.parallel([1], timeout=300)
@pytest.mark.parametrize("optimizer", SERIAL, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_one_virtual_replica_is_the_serial_run_bit_for_bit(comm, place, optimizer, shards) -> None:
    usual = {"learning_rate": 0.1, "batch_size": 6, "epochs": 3} | optimizer
    real = tiny.describe(place, optimizer=usual, run={"directory": place / "real", "seed": 3})
    directory = {"directory": place / "virtual", "seed": 3}
    run = tiny.describe(place, optimizer=usual, run=directory, simulation=TIMES, topology={"shards": shards})
    ours, theirs = simulate(run, comm=comm), train(real, comm)
    assert (ours.steps, ours.samples, ours.test) == (theirs.steps, theirs.samples, theirs.test)
    expected = tiny.vectors(theirs.checkpoint)
    found = tiny.vectors(ours.checkpoint)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].tobytes() == values.tobytes(), name
    with Checkpoint.open(ours.checkpoint) as one, Checkpoint.open(theirs.checkpoint) as other:
        for field in ("step", "samples", "frontier", "holes", "done", "shard_versions", "test_loss"):
            assert getattr(one.info, field) == getattr(other.info, field), field


@pytest.mark.parallel([1], timeout=300)
@pytest.mark.parametrize("replicas", [1, 4, 50])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("server", [{}, {"max_staleness": 2}, {"max_staleness": 2, "on_stale": "discard"}], ids=str)
def test_every_batch_counts_once_and_no_bound_is_exceeded(comm, place, replicas, shards, server) -> None:
    run = counted(place, server=server, topology={"replicas": replicas, "shards": shards})
    result = simulate(run, objective=Whole(), comm=comm)
    assert (result.steps, result.samples) == (BATCHES, EPOCHS * tiny.SAMPLES)
    records = read_records(place / "run")
    if server:
        assert histogram(records).max <= server["max_staleness"]
    applied = {record["number"]: record["pushes"] for record in records if record["kind"] == "shard"}
    dropped = {record["number"]: record["discarded"] for record in records if record["kind"] == "shard"}
    assert [applied[shard] + dropped[shard] for shard in range(shards)] == [BATCHES] * shards
    assert result.discarded == sum(dropped.values())
    assert (result.discarded > 0) == ("on_stale" in server and replicas > 3)
    if not result.discarded:
        expected = -sum(whole_numbers(batch) for batch in range(BATCHES))
        np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.step, info.frontier, info.holes, info.replicas) == (BATCHES, BATCHES, (), replicas)


@pytest.mark.parallel([1], timeout=300)
def test_a_run_follows_from_its_seed(comm, place) -> None:
    """Parameters and records, whatever the real clock says: checkpoints are written all the time here."""
    found = []
    for number, (seed, every) in enumerate([(3, 0.0), (3, 1e-6), (4, 0.0)]):
        run = tiny.describe(
            place,
            run={"directory": place / f"run{number}", "seed": seed},
            topology={"replicas": 7, "shards": 2},
            simulation=TIMES,
            checkpoint={"every_seconds": every},
            monitor={"progress": "none", "report_seconds": 1.5, "evaluate_epochs": 0.5},
        )
        result = simulate(run, comm=comm)
        written = read_records(place / f"run{number}")
        kinds = [record for record in written if record["kind"] in ("worker", "shard", "evaluation")]
        lines = [{key: value for key, value in record.items() if key not in ("time", "session")} for record in kinds]
        found.append((tiny.vectors(result.checkpoint)["parameters"].tobytes(), sorted(map(str, lines))))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


class Stopping:
    """Asks for the end after so many steps."""

    def __init__(self, steps: int, signalled: bool = False) -> None:
        self._left, self._signalled = steps, signalled

    def on_step(self, event) -> bool:
        self._left -= 1
        if self._signalled and self._left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self._left == 0 and not self._signalled


@pytest.mark.parallel([1], timeout=300)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("steps", [{}, {"n_push": 3, "n_fetch": 2}, {"warmstart": 5}], ids=str)
@pytest.mark.parametrize("server", [{}, {"max_staleness": 2}], ids=str)
def test_a_run_that_is_stopped_resumes_and_learns_every_batch_once(comm, place, shards, steps, server) -> None:
    sessions, done = 0, 0
    while done < BATCHES:
        run = counted(place, topology={"replicas": 5, "shards": shards}, optimizer=steps, server=server)
        result = simulate(run, objective=Whole(), comm=comm, callbacks=[Stopping(9)])
        sessions, done = sessions + 1, done + result.steps
        assert sessions < BATCHES, "each session learns something"
    assert (sessions > 2, done) == (True, BATCHES)
    expected = -sum(whole_numbers(batch) for batch in range(BATCHES))
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)


@pytest.mark.parallel([1], timeout=300)
def test_a_signal_ends_it_with_what_there_is_and_a_real_run_goes_on_from_there(comm, place) -> None:
    run = counted(place, topology={"replicas": 5})
    result = simulate(run, objective=Whole(), comm=comm, callbacks=Stopping(9, signalled=True))
    assert result.stopped_by == signal.SIGINT
    assert 9 <= result.steps < BATCHES
    more = train(counted(place), comm, objective=Whole())
    assert result.steps + more.steps == BATCHES
    expected = -sum(whole_numbers(batch) for batch in range(BATCHES))
    np.testing.assert_array_equal(tiny.vectors(more.checkpoint)["parameters"], expected)


@pytest.mark.parallel([1], timeout=300)
def test_the_records_are_those_of_a_run_in_virtual_seconds(comm, place, capsys) -> None:
    times = {"compute": {"mean": 10.0}, "network": {"mean": 1.0}, "service": {"mean": 0.5}}
    run = counted(place, topology={"replicas": 4}, simulation=times, monitor={"progress": "none"})
    result = simulate(run, objective=Whole(), comm=comm)
    records = read_records(place / "run")
    (start,) = (record for record in records if record["kind"] == "start")
    assert (start["virtual"], start["ranks"], start["replicas"], start["shards"]) == (1, 5, 4, 1)
    history = RunHistory(records)
    assert sorted(history.replicas) == [0, 1, 2, 3]
    summary = history.summary()
    assert (summary.steps, summary.samples) == (BATCHES, EPOCHS * tiny.SAMPLES)
    # The first pushes wait in line; afterwards the replicas are half a second apart, and a step takes 12.5 s.
    assert BATCHES == 42
    assert result.seconds == pytest.approx(11 * 12.5 + 0.5)
    assert summary.seconds == pytest.approx(result.seconds, rel=0.05)
    for reports in history.replicas.values():
        seconds = {name: sum(report["seconds"][name] for report in reports) for name in ("compute", "fetch", "push")}
        steps = reports[-1]["step"]
        assert seconds["compute"] == pytest.approx(10.0 * steps)
        assert seconds["fetch"] == pytest.approx(1.0 * steps)
        assert 1.5 * steps <= seconds["push"] + 1e-6 <= 1.5 * steps + 1.5 + 1e-6
    shard = [record for record in records if record["kind"] == "shard"]
    assert sum(record["seconds"]["apply"] for record in shard) == pytest.approx(0.5 * BATCHES)
    assert max(record["queue"] for record in shard) == 4
    for command in ("plot", "inspect", "report"):
        assert main([command, str(place / "run")]) == 0
    assert main(["watch", "--once", str(place / "run")]) == 0
    assert "complete" in capsys.readouterr().out


@pytest.mark.parallel([1], timeout=300)
def test_mean_staleness_is_the_number_of_other_replicas(comm, place) -> None:
    """A replica fetches when its push is applied: in a cycle of its own, every other one pushes once in the mean."""
    run = counted(place, topology={"replicas": 10}, optimizer={"epochs": 300.0})
    result = simulate(run, objective=Whole(), comm=comm)
    assert result.staleness == pytest.approx(9, rel=0.05)


class Broken(Whole):
    def loss_and_gradient(self, parameters, batch):
        loss, gradient = super().loss_and_gradient(parameters, batch)
        if batch.step % 5 == 3:
            gradient["bias"] = np.full(SHAPES["bias"], np.nan, np.float32)
        return loss, gradient


@pytest.mark.parallel([1], timeout=300)
def test_gradients_that_are_not_finite_are_withheld_and_too_many_of_them_end_the_run(comm, place) -> None:
    result = simulate(counted(place, topology={"replicas": 3}), objective=Broken(), comm=comm)
    broken = [batch for batch in range(BATCHES) if batch % 5 == 3]
    assert (result.withheld, result.steps) == (len(broken), BATCHES)
    expected = -sum(whole_numbers(batch) for batch in range(BATCHES) if batch not in broken)
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)
    run = counted(place, run={"directory": place / "other"}, optimizer={"most_withheld": 0})
    with pytest.raises(RunFailed, match="batch 3 of the stream, but the gradient of 'bias' is not finite"):
        simulate(run, objective=Broken(), comm=comm)


@pytest.mark.parallel([1], timeout=300)
def test_a_state_of_the_objective_needs_a_replica_for_itself(comm, place) -> None:
    class Counting(Whole):
        def __init__(self) -> None:
            super().__init__()
            self.state = {"count": np.zeros((), np.int64)}

        def loss_and_gradient(self, parameters, batch):
            self.state["count"] += 1
            return super().loss_and_gradient(parameters, batch)

    with pytest.raises(UserError, match="simulate it with topology"):
        simulate(counted(place, topology={"replicas": 2}), objective=Counting(), comm=comm)
    result = simulate(counted(place, run={"directory": place / "one"}), objective=Counting(), comm=comm)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert int(checkpoint.read_state("count", 0, 1)[0]) == BATCHES


@pytest.mark.parallel([2], timeout=300)
def test_several_ranks_are_refused(comm, place) -> None:
    what = r"2 ranks were started.*leave the launcher out" if comm.rank == 0 else "rank 0 reports a mistake"
    with pytest.raises(UserError, match=what):
        simulate(counted(place), objective=Whole(), comm=comm)


@pytest.mark.parallel([5], timeout=300)
def test_four_virtual_replicas_are_as_stale_as_four_real_ones(comm, place) -> None:
    """By the means; times to compute are those that the real ones have recorded, and not those of a busy core."""
    run = counted(place, topology={"shards": 1, "replicas": 4}, optimizer={"epochs": 24})
    train(run, comm, objective=Slow())
    if comm.rank == 0:
        from mpi4py import MPI

        records = read_records(place / "run")
        real = histogram(records)
        workers = [record for record in records if record["kind"] == "worker"]
        last = {record["number"]: record["step"] for record in workers}
        seconds = sum(record["seconds"]["compute"] for record in workers) / sum(last.values())
        times = {"compute": {"distribution": "gamma", "mean": seconds, "deviation": seconds / 2}}
        sections = {"run": run.run.model_copy(update={"directory": place / "virtual"})}
        again = Run(**dict(run) | sections | {"simulation": times})
        simulate(again, comm=MPI.COMM_SELF, objective=Whole())
        virtual = histogram(read_records(place / "virtual"))
        assert real.total == virtual.total
        assert virtual.mean == pytest.approx(real.mean, rel=0.15)
    waiting.barrier(comm, "rank 0 to simulate the same")


@pytest.mark.parallel([1], timeout=300)
def test_an_evaluation_ends_a_virtual_run_which_stays_ended(comm, place) -> None:
    def run(patience: int) -> Run:
        return tiny.describe(
            place,
            topology={"replicas": 3},
            optimizer={"learning_rate": 0.02, "epochs": 50},
            monitor={"evaluate_epochs": 1, "patience": patience, "min_delta": 10.0},
            checkpoint={"best": "at_once"},
        )

    result = simulate(run(3), comm=comm)
    assert "3 evaluations have not been better (monitor.patience = 3)" in result.ended
    assert 0 < result.steps < 50 * 7
    with Checkpoint.open(place / "run") as checkpoint:
        info = checkpoint.info
    heard = [record["loss"] for record in read_records(place / "run") if record["kind"] == "evaluation"]
    assert info.best_value == pytest.approx(min(heard), rel=1e-5)
    assert [record["reason"] for record in read_records(place / "run") if record["kind"] == "end"] == [result.ended]
    again = simulate(run(3), comm=comm)
    assert (again.steps, again.checkpoint) == (0, result.checkpoint)
    assert simulate(run(info.best_waited + 2), comm=comm).steps > 0


@pytest.mark.parallel([1])
@pytest.mark.parametrize(
    ("section", "setting", "told"),
    [
        ("topology", {"evaluators": 1}, "topology.evaluators = 1: .* set it to 0"),
        ("topology", {"spares": 1}, "topology.spares = 1: .* set it to 0"),
        ("optimizer", {"warmstart_loss": 1.0}, "set optimizer.warmstart or warmstart_samples"),
        ("optimizer", {"warmstart": 5, "release_samples": 20}, "set optimizer.warmstart or warmstart_samples"),
    ],
)
def test_what_virtual_time_does_not_have_is_refused(comm, place, section, setting, told) -> None:
    with pytest.raises(UserError, match=told):
        simulate(tiny.describe(place, **{section: setting}), comm=comm)
