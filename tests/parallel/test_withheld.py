"""Pushes of gradients that are not finite: no shard applies a part of one, and everything is counted.

Gradients are whole numbers that follow from the number of the batch, and the rate is 1, so that the parameters are
those of a twin which leaves out just these batches, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.errors import RunFailed
from dbmpi.monitor.lines import Record
from dbmpi.monitor.records import read_records
from dbmpi.objective import Batch
from dbmpi.replica.replica import Replica
from dbmpi.runs.training import train

EPOCHS = 6
BATCHES = -(-tiny.SAMPLES // 6) * EPOCHS
SHAPES = {"weights": (5, 4), "bias": (7,)}
BAD = frozenset({3, 8, 9, 10, 20, 31})
"""Batches whose gradient is not finite; never more than three in a row of one replica."""


def whole_numbers(batch: int, name: str) -> np.ndarray:
    """Return the gradient of a batch, if it is finite."""
    return np.random.default_rng([batch, len(name)]).integers(-8, 8, SHAPES[name]).astype(np.float32)


class Spoilt:
    """Gives one element that is no number, or a loss that is none, for certain batches."""

    def __init__(self, bad: frozenset[int] = BAD) -> None:
        self.parameters = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        self._bad = bad

    def loss_and_gradient(self, parameters, batch):
        assert all(np.isfinite(values).all() for values in parameters.values())
        gradient = {name: whole_numbers(batch.step, name) for name in SHAPES}
        loss = 1.0
        if batch.step in self._bad:
            match batch.step % 3:
                case 0:
                    gradient["weights"][2, 1] = np.nan
                case 1:
                    gradient["bias"][-1] = -np.inf
                case 2:
                    loss = np.nan
        return loss, gradient

    def evaluate(self, parameters, batch):
        return 1.0


def pushes(replicas: int, n_push: int) -> Iterator[list[int]]:
    """Yield the batches behind each push."""
    for replica in range(replicas):
        mine = list(range(replica, BATCHES, replicas))
        yield mine[:1]
        yield from (mine[start : start + n_push] for start in range(1, len(mine), n_push))


def twin(replicas: int, n_push: int, bad: frozenset[int] = BAD) -> tuple[np.ndarray, int, int]:
    """Return the parameters without the batches of pushes that are withheld; and how many pushes are, and are not."""
    found, withheld, applied = np.zeros(sum(map(np.prod, SHAPES.values())), np.float32), 0, 0
    for batches in pushes(replicas, n_push):
        if bad.isdisjoint(batches):
            applied += 1
            for batch in batches:
                found -= np.concatenate([whole_numbers(batch, name).reshape(-1) for name in SHAPES])
        else:
            withheld += 1
    return found, withheld, applied


def describe(place: Path, **sections) -> Run:
    optimizer = {"rule": "sgd", "learning_rate": 1.0, "epochs": EPOCHS} | sections.pop("optimizer", {})
    return tiny.describe(place, network={"layers": ()}, optimizer=optimizer, **sections)


def last_reports(place: Path, role: str) -> list[Record]:
    """Return the last record of each worker or shard."""
    return list({record["number"]: record for record in read_records(place / "run") if record["kind"] == role}.values())


WAYS = {
    "in place": ({}, {}),
    "copied": ({"push": "copied"}, {}),
    "messages": ({"push": "copied", "transport": "p2p"}, {}),
    "rounded": ({"wire": "bfloat16"}, {}),
    "consistent": ({"consistent": True}, {}),
    "shared": ({"fetch": "shared"}, {}),
    "overlapped": ({"overlap": "threads"}, {}),
    "accrued": ({}, {"n_push": 3, "n_fetch": 2}),
    "overlapped and accrued": ({"overlap": "threads", "push": "copied"}, {"n_push": 2}),
    "not clipped": ({}, {"clip_norm": 1e6}),
}


@pytest.mark.parallel([1, 2, 3, 4], timeout=300)
@pytest.mark.parametrize("way", WAYS)
def test_parameters_are_those_without_the_batches_of_pushes_that_are_withheld(comm, place, way) -> None:
    server, optimizer = WAYS[way]
    shards = {1: 1, 2: 2, 3: 3, 4: 1}[comm.size]
    run = describe(place, server=server, optimizer=optimizer, topology={"shards": shards, "colocate": comm.size < 4})
    result = train(run, tiny.Apart(comm) if way == "rounded" else comm, objective=Spoilt())
    replicas = comm.size if comm.size < 4 else 3
    expected, withheld, applied = twin(replicas, optimizer.get("n_push", 1))
    found = tiny.vectors(result.checkpoint)["parameters"]
    np.testing.assert_array_equal(found, expected)
    assert (result.steps, result.samples, result.withheld) == (BATCHES, EPOCHS * tiny.SAMPLES, withheld)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.step, info.frontier, info.holes, info.samples) == (BATCHES, BATCHES, (), EPOCHS * tiny.SAMPLES)
    assert info.shard_versions == (applied,) * shards
    assert sum(record["withheld"] for record in last_reports(place, "worker")) == withheld
    assert {record["pushes"] for record in last_reports(place, "shard")} == {applied}


@pytest.mark.parallel([1, 3], timeout=300)
def test_a_run_that_resumes_goes_on_behind_what_was_withheld(comm, place) -> None:
    """And the schedule of the rate goes by all samples, so that the last session's are as without a break."""
    schedule = {"schedule": "step", "decay_epochs": 2.0, "decay_factor": 0.5}
    topology = {"shards": comm.size, "replicas": 1 if comm.size == 1 else 3, "colocate": True}
    for epochs in (2, EPOCHS):
        run = describe(place, topology=topology, optimizer=schedule | {"epochs": epochs})
        result = train(run, comm, objective=Spoilt())
    per_epoch = BATCHES // EPOCHS
    expected = np.zeros(sum(map(np.prod, SHAPES.values())), np.float32)
    if comm.size == 1:
        for batch in sorted({*range(BATCHES)} - BAD):
            step = np.concatenate([whole_numbers(batch, name).reshape(-1) for name in SHAPES])
            expected -= np.float32(0.5 ** (batch // per_epoch // 2)) * step
        np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.step, info.samples) == (BATCHES, EPOCHS * tiny.SAMPLES)
    assert {*info.shard_versions} == {BATCHES - len(BAD)}


@pytest.mark.parallel([1], timeout=300)
@pytest.mark.parametrize(
    ("settings", "server", "bad", "words"),
    [
        ({}, {}, {10, 11, 12, 13}, r"is 1.0 at step 14 .* 13 .*, but the gradient of 'bias' is not finite, for 4"),
        ({"most_withheld": 0}, {}, {5}, r"the loss is nan at step 6 of replica 0, batch 5 of the stream; "),
        ({"most_withheld": 1}, {}, {9, 12, 14, 15}, r"at step 16 .* 'weights' is not finite, for 2 pushes in a row; "),
        (
            {},
            {"gradients": "layers"},
            {6},
            r"at step 7 of .* the gradient of 'weights' is not finite; ",
        ),
        (
            {"most_withheld": 0},
            {"overlap": "threads"},
            {7},
            r"at step 8 of .* the gradient of 'bias' is not finite; ",
        ),
    ],
    ids=["four in a row", "none", "two in a row", "by layers", "overlapped, none"],
)
def test_more_of_them_in_a_row_end_the_run(comm, place, settings, server, bad, words) -> None:
    run = describe(place, optimizer=settings, server=server, topology={"colocate": True})
    with pytest.raises(RunFailed, match=words) as raised:
        train(run, comm, objective=Spoilt(frozenset(bad)))
    assert "lower optimizer.learning_rate (1)" in str(raised.value)


@pytest.mark.parallel([2, 4], timeout=300)
@pytest.mark.parametrize("clip_norm", [0.0, 1e6])
def test_partitions_withhold_together(comm, place, monkeypatch, clip_norm) -> None:
    """Where the gradient of one of them alone is not finite; a network's twin leaves out the same batches."""
    run = tiny.describe(
        place,
        topology={"partitions": 2, "replicas": 1, "shards": comm.size // 2, "colocate": comm.size == 2},
        optimizer={"rule": "sgd", "epochs": EPOCHS, "clip_norm": clip_norm},
    )
    compute = Replica.loss_and_gradient

    def spoil(replica, parameters, batch: Batch, gradient, *arguments, step=0, **named):
        outcome = compute(replica, parameters, batch, gradient, *arguments, step=step, **named)
        if step in BAD and replica._group.rank == step % 2:
            gradient[step % gradient.size] = np.inf
        return outcome

    monkeypatch.setattr(Replica, "loss_and_gradient", spoil)
    result = train(run, comm)
    monkeypatch.undo()
    assert (result.steps, result.withheld) == (BATCHES, len(BAD))
    reports = last_reports(place, "worker")
    assert [record["withheld"] for record in reports] == [len(BAD)] * 2
    one = tiny.Twin(run)
    gradient = np.empty_like(one.server)
    for step in sorted({*range(BATCHES)} - BAD):
        one.network.loss_and_gradient(one.server.copy(), one.batch(step), gradient)
        one.apply(gradient)
    np.testing.assert_allclose(tiny.vectors(result.checkpoint)["parameters"], one.server, rtol=1e-4, atol=1e-5)


class Walking(Spoilt):
    """Its gradient is no number either where a parameter is none."""

    def loss_and_gradient(self, parameters, batch):
        broken = batch.step in self._bad or not all(np.isfinite(values).all() for values in parameters.values())
        return 1.0, {name: whole_numbers(batch.step, name) + np.float32(np.nan if broken else 0) for name in SHAPES}


@pytest.mark.parallel([1], timeout=300)
@pytest.mark.parametrize("n_push", [1, 4])
def test_local_steps_by_a_gradient_that_is_not_finite_end_with_the_push(comm, place, n_push) -> None:
    """The walk is then at no number, and the next step fetches, though it is not its turn."""
    optimizer, bad = {"n_fetch": 12, "n_push": n_push, "local_rate": 0.5}, frozenset({14})
    run = describe(place, optimizer=optimizer, topology={"colocate": True})
    result = train(run, comm, objective=Walking(bad))
    expected, withheld, applied = twin(1, n_push, bad)
    assert result.withheld == withheld == 1
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)
    assert last_reports(place, "shard")[0]["pushes"] == applied


class Diverging:
    """A parabola whose gradient is not finite far away from its minimum at 0, and which begins not far from there."""

    def __init__(self) -> None:
        self.parameters = {"weights": np.full(6, 3.0, np.float32)}

    def loss_and_gradient(self, parameters, batch):
        x = parameters["weights"]
        far = np.float32(np.nan if np.abs(x).max() > 1e6 else 0)
        return 0.5 * float(x @ x), {"weights": x + far}


@pytest.mark.parallel([1, 3], timeout=300)
def test_a_run_goes_back_with_a_lower_rate_until_numbers_stay_finite(comm, place, capfd) -> None:
    """The rate of 5 is too large, that of 0.5 is not; also without a checkpoint, from the beginning."""
    optimizer = {"learning_rate": 5.0, "roll_back": 0.1, "most_withheld": 1}
    run = describe(place, optimizer=optimizer, topology={"colocate": True})
    result = train(run, comm, objective=Diverging())
    assert not result.rolled_back
    assert result.withheld == 0
    values = tiny.vectors(result.checkpoint)["parameters"]
    assert np.abs(values).max() < 1e-2
    with Checkpoint.open(result.checkpoint) as checkpoint:
        info = checkpoint.info
    assert (info.step, info.holes) == (BATCHES, ())
    assert Run.from_json(info.configuration).optimizer.learning_rate == pytest.approx(0.5)
    said = capfd.readouterr().err
    if comm.rank == 0:
        assert f"dbmpi: back to {place / 'run'}, with optimizer.learning_rate 0.5" in said


@pytest.mark.parallel([1, 2], timeout=300)
def test_a_run_does_not_go_back_for_ever(comm, place) -> None:
    run = describe(place, optimizer={"roll_back": 0.5}, topology={"colocate": True})
    with pytest.raises(RunFailed) as raised:
        train(run, comm, objective=Spoilt(frozenset(range(6, BATCHES))))
    if comm.rank == 0:
        assert "the run has gone back 10 times; look for extreme values" in str(raised.value)
