"""Evaluators: ranks that evaluate snapshots of the shards while the replicas learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from parallel import tiny

import dbmpi
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.downpour.evaluator import SnapshotEvaluator
from dbmpi.errors import UserError
from dbmpi.monitor.records import read_records
from dbmpi.objective import Outcome
from dbmpi.runs.training import train

BATCHES = -(-tiny.SAMPLES // 6)
TOPOLOGIES = {
    2: [{"colocate": True}],
    3: [{}, {"colocate": True, "shards": 2}],
    4: [{"shards": 2}, {"colocate": True, "replicas": 1, "partitions": 2}, {"spares": 1, "replicas": 1}],
    6: [{"shards": 2, "replicas": 1, "partitions": 2}],
}
SERVERS = [
    {},
    {"fetch": "shared"},
    {"transport": "p2p", "push": "copied"},
    {"overlap": "threads"},
    {"consistent": True},
]


def described(place: Path, number: int, topology: dict[str, object], epochs: int = 20, **sections: object) -> dbmpi.Run:
    return tiny.describe(
        place,
        run={"directory": place / f"run-{number}"},
        topology={"evaluators": 1, **topology},
        optimizer={"epochs": epochs},
        monitor={"evaluate_epochs": 1, "report_seconds": 0.02, **sections.pop("monitor", {})},
        **sections,
    )


def evaluations(run: dbmpi.Run) -> list[dict[str, object]]:
    return [record for record in read_records(run.run.directory) if record["kind"] == "evaluation"]


class Counting:
    """Every parameter is the number of pushes applied, and so is the loss; all must be the same."""

    parameters = {"weights": np.zeros((40, 30)), "biases": np.zeros(50)}  # noqa: RUF012

    def loss_and_gradient(self, parameters, batch):
        return 1.0, {name: -np.ones_like(values) for name, values in parameters.items()}

    def evaluate(self, parameters, batch):
        low = min(float(values.min()) for values in parameters.values())
        high = max(float(values.max()) for values in parameters.values())
        return low if low == high else np.nan


@pytest.mark.parallel([2, 3, 4, 6])
def test_its_numbers_are_those_of_evaluate(comm, place) -> None:
    for number, (topology, server) in enumerate(
        (topology, server) for topology in TOPOLOGIES[comm.size] for server in SERVERS
    ):
        run = described(place, number, topology, server=server)
        result = train(run, comm)
        assert result.steps == 20 * BATCHES, "each batch once"
        assert result.test is not None
        assert result.lost == ()
        if comm.rank == 0:
            found = evaluations(run)
            assert 1 < len(found) <= 21
            assert found[-1]["loss"] == pytest.approx(result.test.mean_loss, rel=1e-5)
            assert {one["samples"] for one in found} == {tiny.TEST_SAMPLES}
            assert [one["step"] for one in found] == sorted(one["step"] for one in found)
            with Checkpoint.open(result.checkpoint) as checkpoint:
                learning = 2 if topology == TOPOLOGIES[3][1] else 1
                assert checkpoint.info.replicas == learning + topology.get("spares", 0)
                assert checkpoint.info.test_loss == result.test.mean_loss
            if run.topology.partitions in (None, 1):
                again = dbmpi.evaluate(result, str(run.data.test), MPI.COMM_SELF, batch_size=6)
                assert again == result.test, "to the last bit"
            np.testing.assert_allclose(
                result.test.mean_loss, tiny.Twin(run).test(parameters(result)).mean_loss, rtol=1e-5
            )
        comm.Barrier()


def parameters(result: dbmpi.Result) -> np.ndarray:
    with Checkpoint.open(result.checkpoint) as checkpoint:
        return checkpoint.parameters()


@pytest.mark.parallel([2, 3, 4])
def test_each_snapshot_is_evaluated_as_evaluate_does_it(comm, place, monkeypatch) -> None:
    """What it had in its memory goes into checkpoints, for which `evaluate` finds the same, to the last bit."""
    seen: list[tuple[np.ndarray, Outcome]] = []

    def noting(self, part, parts):
        snapshot = self._snapshot.copy()
        outcome = evaluate(self, part, parts)
        assert outcome is not None
        seen.append((snapshot, outcome))
        return outcome

    evaluate = SnapshotEvaluator._outcome
    monkeypatch.setattr(SnapshotEvaluator, "_outcome", noting)
    run = described(place, 0, {"colocate": comm.size == 2, "shards": max(comm.size - 2, 1)})
    result = train(run, comm)
    if comm.rank == comm.size - 1:
        with Checkpoint.open(result.checkpoint) as checkpoint:
            layout, info = checkpoint.layout, checkpoint.info
        assert len(seen) > 2
        assert seen[-1][1] == result.test
        assert len({snapshot.tobytes() for snapshot, _ in seen}) > 2
        for number, (snapshot, outcome) in enumerate(seen):
            with CheckpointWriter(place / f"snapshot-{number}.h5", layout) as writer:
                writer.write("parameters", 0, snapshot)
                path = writer.commit(info, None)
            assert dbmpi.evaluate(path, str(run.data.test), MPI.COMM_SELF, batch_size=6) == outcome
    comm.Barrier()


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("server", [{"consistent": True}, {"consistent": True, "transport": "p2p", "push": "copied"}])
def test_a_snapshot_is_of_the_step_that_is_reported(comm, place, server) -> None:
    """The loss of a snapshot is its version; all of a consistent snapshot is of one."""
    run = tiny.describe(
        place,
        network={"layers": ()},
        topology={"evaluators": 1},
        server=server,
        optimizer={"rule": "sgd", "learning_rate": 1.0, "epochs": 60},
        monitor={"evaluate_epochs": 1},
    )
    result = train(run, comm, objective=Counting())
    if comm.rank == 0:
        found = evaluations(run)
        assert len(found) > 2
        assert all(one["loss"] is not None for one in found), "no snapshot has half a push in it"
        late = [one["step"] - one["loss"] for one in found]
        assert min(late) >= -2 * comm.size
        assert max(late) <= 10 * BATCHES
        assert late[-1] == 0
        assert result.test.mean_loss == 60 * BATCHES


@pytest.mark.parallel([3])
def test_an_evaluation_by_it_ends_the_run(comm, place) -> None:
    run = described(
        place, 0, {}, epochs=3000, monitor={"patience": 2, "min_delta": 100.0}, checkpoint={"best": "at_once"}
    )
    result = train(run, comm)
    assert "monitor.patience" in result.ended
    assert 0 < result.steps < 3000 * BATCHES
    if comm.rank == 0:
        kinds = [record["kind"] for record in read_records(run.run.directory)]
        assert kinds.count("end") == 1
        assert kinds.count("checkpoint") > 1


@pytest.mark.parallel([4, 6])
def test_several_evaluate_in_turn(comm, place) -> None:
    run = described(place, 0, {"evaluators": comm.size - 2}, epochs=60)
    result = train(run, comm)
    assert result.steps == 60 * BATCHES
    if comm.rank == 0:
        found = evaluations(run)
        assert len(found) > 3
        assert {one["samples"] for one in found} == {tiny.TEST_SAMPLES}
        assert found[-1]["loss"] == pytest.approx(result.test.mean_loss, rel=1e-5)


class Seen(Counting):
    """Beside its parameters it has the samples that it has learned from, which are its loss."""

    def __init__(self) -> None:
        self.state = {"seen": np.zeros(1)}

    def loss_and_gradient(self, parameters, batch):
        self.state["seen"] += batch.samples
        return super().loss_and_gradient(parameters, batch)

    def evaluate(self, parameters, batch):
        return float(self.state["seen"][0])


@pytest.mark.parallel([2, 3, 4])
def test_an_evaluator_has_the_state_of_the_first_replica(comm, place) -> None:
    run = tiny.describe(
        place,
        network={"layers": ()},
        topology={"evaluators": 1, "colocate": comm.size == 2},
        optimizer={"rule": "sgd", "learning_rate": 1.0, "epochs": 60},
        monitor={"evaluate_epochs": 1},
    )
    result = train(run, comm, objective=Seen())
    assert result.steps == 60 * BATCHES
    if comm.rank == 0:
        found = [one["loss"] for one in evaluations(run)]
        assert len(found) > 2
        assert found == sorted(found), "each state is a later one"
        assert found[0] > 0
        replicas = max(comm.size - 2, 1)
        assert found[-1] == pytest.approx(60 * tiny.SAMPLES / replicas, abs=6 * BATCHES)
        assert dbmpi.evaluate(result, str(run.data.test), MPI.COMM_SELF, objective=Seen()) == result.test


@pytest.mark.parallel([3])
def test_what_an_evaluator_cannot_do_is_refused(comm, place) -> None:
    state = described(place, 0, {})
    batch = state.model_copy(update={"optimizer": state.optimizer.model_copy(update={"method": "sandblaster"})})
    with pytest.raises(UserError, match=r"topology\.evaluators = 1 is for Downpour: leave it out|reports a mistake"):
        train(batch, comm)
    untested = state.model_copy(update={"data": state.data.model_copy(update={"test": None})})
    untold = r"topology\.evaluators = 1: there are no test data to evaluate: set data\.test|reports a mistake"
    with pytest.raises(UserError, match=untold):
        train(untested, comm)
    many = state.model_copy(update={"topology": state.topology.model_copy(update={"evaluators": 2})})
    with pytest.raises(UserError, match=r"Start 4 ranks, or set topology\.evaluators = 1|reports a mistake"):
        train(many, comm)
