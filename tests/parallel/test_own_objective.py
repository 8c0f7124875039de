"""Objectives of a user's own in whole runs: NumPy code, trained like a network by both optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from parallel import own_objectives, tiny
from parallel.own_objectives import Centred, Dropping, Measured, Plane, Softmax, Wrong
from parallel.test_mistakes import assert_told_once

import dbmpi
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.errors import RunFailed, UserError
from dbmpi.monitor.records import read_records
from dbmpi.mpi import waiting
from dbmpi.runs.inference import Inference
from dbmpi.runs.training import train

HERE = Path(__file__).parent
SAMPLES, FEATURES = 40, 6


@pytest.fixture
def plane(comm, shared_path) -> Iterator[Path]:
    """A directory with samples of a plane, and a little noise."""
    if comm.rank == 0:
        rng = np.random.default_rng(5)
        for name in ("train", "test"):
            inputs = rng.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
            targets = inputs @ np.arange(FEATURES) - 1 + rng.normal(0, 0.1, SAMPLES)
            tiny.write_file(shared_path / f"{name}.h5", inputs, targets.astype(np.float32)[:, None], classes=None)
    waiting.barrier(comm, "the samples")
    yield shared_path
    waiting.barrier(comm, "the others to finish")


def describe(directory: Path, **sections) -> Run:
    """Describe a run without layers."""
    network = {"layers": ()} | sections.pop("network", {})
    return tiny.describe(directory, network=network, **sections)


def twin(run: Run, objective: Plane) -> np.ndarray:
    """Return the parameters that one worker learns by SGD or Adagrad, in a loop over the same batches."""
    with Source.open(run.data.train, 100, reading=Reading(own=True)) as source:
        order = Order(SAMPLES, run.optimizer.batch_size, run.optimizer.epochs, run.run.seed)
        first = objective.initial(run.run.seed)
        values = {"slope/weights": first["slope"]["weights"], "bias": first["bias"]}
        found = {name: np.array(value, np.float32) for name, value in values.items()}
        sums = {name: np.zeros_like(value) for name, value in found.items()}
        for number in range(order.batches):
            named = {"slope": {"weights": found["slope/weights"]}, "bias": found["bias"]}
            _, gradient = objective.loss_and_gradient(named, source.batch(order.indices(number)))
            for name, value in (("slope/weights", gradient["slope"]["weights"]), ("bias", gradient["bias"])):
                single, rate = np.float32(value), np.float32(run.optimizer.learning_rate)
                if run.optimizer.rule == "sgd":
                    found[name] -= rate * single
                else:
                    sums[name] += single * single
                    found[name] -= rate * single / (np.sqrt(sums[name]) + np.float32(run.optimizer.epsilon))
    return np.concatenate([value.reshape(-1) for value in found.values()])


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    ("server", "rule"),
    [
        ({}, "adagrad"),
        ({"align": "equal", "fetch": "shared"}, "sgd"),
        ({"gradients": "layers"}, "adagrad"),
        ({"push": "copied", "consistent": True}, "sgd"),
    ],
    ids=["copied", "shared", "by arrays", "consistent"],
)
def test_one_worker_learns_what_a_loop_learns_bit_for_bit(comm, plane, server, rule) -> None:
    shards = max(1, comm.size - 1)
    run = describe(
        plane,
        server=server,
        topology={"shards": shards, "replicas": 1, "colocate": comm.size == 1},
        optimizer={"rule": rule, "learning_rate": 0.05},
    )
    result = train(run, comm, objective=Plane())
    assert result.steps == 3 * -(-SAMPLES // 6)
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], twin(run, Plane()))
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert {tensor.name: tensor.shape for tensor in checkpoint.layout.tensors} == {
            "slope/weights": (FEATURES,),
            "bias": (1,),
        }


@pytest.mark.parallel([1, 3, 4])
def test_a_run_that_resumes_learns_what_one_at_a_stretch_does(comm, plane) -> None:
    """On other shards, and with the objective named in the description instead of given."""
    objective = {"use": "parallel.own_objectives:Plane", "scale": 0.5}
    for epochs in (1, 3):
        # On other shards: the first session uses one rank or two.
        few = comm.Split(comm.rank < 2 or epochs == 3)
        if comm.rank < 2 or epochs == 3:
            topology = {"shards": max(1, few.size - 1), "replicas": 1, "colocate": few.size == 1}
            run = describe(
                plane,
                network={"code": HERE.parent},
                objective=objective,
                optimizer={"epochs": epochs},
                topology=topology,
            )
            result = train(run, few)
        waiting.barrier(comm, "the session to end")
        few.Free()
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], twin(run, Plane(scale=0.5)))


RESUMED = {
    "downpour": ({"rule": "adagrad"}, {}, 1, (1.3, 3)),
    "sandblaster": ({"method": "sandblaster"}, {"deterministic": True, "memory": 3, "gtol": 0, "ftol": 0}, 2, (4, 9)),
}


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("method", RESUMED)
def test_a_run_with_state_that_resumes_equals_an_uninterrupted_one_bit_for_bit(comm, plane, method) -> None:
    """With one replica of Downpour and 2 or 3 shards; with two replicas of Sandblaster and 1 or 2."""
    optimizer, sandblaster, replicas, sessions = RESUMED[method]

    def learn(directory: str, epochs: float) -> dict[str, np.ndarray]:
        run = describe(
            plane,
            run={"directory": plane / directory, "seed": 3},
            optimizer=optimizer | {"epochs": epochs},
            sandblaster=sandblaster,
            topology={"shards": comm.size - replicas, "replicas": replicas},
        )
        result = train(run, comm, objective=Centred(moving=method == "downpour"))
        with Checkpoint.open(result.checkpoint) as checkpoint:
            assert len(checkpoint.files) == comm.size - replicas + (comm.size - replicas > 1)
            steps = {"steps": np.array(checkpoint.info.step)}
            return tiny.vectors(result.checkpoint) | checkpoint.objective_state() | steps

    whole = learn("whole", sessions[-1])
    early, late = (learn("resumed", epochs) for epochs in sessions)
    assert set(whole) == set(late) > {"parameters", "seen", "of/inputs"}
    for name, values in whole.items():
        np.testing.assert_array_equal(late[name], values)
    assert not np.array_equal(early["parameters"], late["parameters"])
    assert whole["seen"] == (3 * SAMPLES if method == "downpour" else 0)


@pytest.mark.parallel([1, 2, 3, 4, 6])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_several_replicas_find_the_plane(comm, plane, method) -> None:
    settings = {"rule": "adagrad", "learning_rate": 0.5, "epochs": 60, "method": method}
    server = {"overlap": "threads", "gradients": "layers"} if method == "downpour" and comm.size == 4 else {}
    run = describe(plane, topology={"colocate": comm.size < 3}, server=server, optimizer=settings)
    result = train(run, comm, objective=Plane())
    assert result.test is not None
    assert result.test.samples == SAMPLES
    assert result.test.accuracy is None
    assert result.test.mean_loss < 0.02
    found = tiny.vectors(result.checkpoint)["parameters"]
    np.testing.assert_allclose(found, [*range(FEATURES), -1], atol=0.15)


class Seen:
    """A callback that keeps the metrics of evaluations."""

    def __init__(self) -> None:
        self.metrics = []

    def on_evaluation(self, event) -> None:
        self.metrics.append(event.metrics)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_classes_and_metrics_are_those_of_all_held_out_samples(comm, place, method) -> None:
    """Also where the batches differ in size, and whoever computes them."""
    settings = {"epochs": 10, "learning_rate": 0.5, "method": method}
    topology = {"shards": 1, "colocate": True}
    run = describe(place, optimizer=settings, topology=topology, monitor={"evaluate_epochs": 3})
    seen = Seen()
    result = train(run, comm, objective=Measured(), callbacks=seen)
    assert result.test is not None
    assert result.test.accuracy is not None
    assert result.test.accuracy > 0.9
    with Source.open(place / "test.h5", 100, reading=Reading(own=True)) as source:
        samples = source.batch(np.arange(tiny.TEST_SAMPLES))
    expected = pytest.approx(Measured().metrics(dbmpi.parameters(result), samples), rel=1e-5)
    assert result.test.metrics == expected
    assert [*result.test.metrics] == ["surest", "of-class-0"]
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert checkpoint.info.test_metrics == result.test.metrics
    assert comm.rank or seen.metrics[-1] == expected
    assert dbmpi.evaluate(result, place / "test.h5", comm, objective=Measured(), batch_size=5).metrics == expected
    waiting.barrier(comm, "the records")
    records = [record for record in read_records(place / "run") if record["kind"] == "evaluation"]
    assert len(records) > 1
    assert records[-1]["metrics"] == expected
    for record in records:
        assert record["metrics"]["of-class-0"] == pytest.approx((samples.targets == 0).mean())


@pytest.mark.parallel([1, 3])
def test_a_checkpoint_is_evaluated_and_predicts_with_code_that_is_allowed(comm, plane) -> None:
    objective = {"use": "own_objectives:Plane"}
    run = describe(plane, network={"code": HERE}, objective=objective, optimizer={"epochs": 30})
    result = train(run, comm)
    with pytest.raises(UserError, match=r"the objective is of type 'own_objectives:Plane'|rank 0 reports"):
        Inference(run.run.directory, comm)
    test = plane / "test.h5"
    with Source.open(test, 100, reading=Reading(own=True)) as source:
        inputs, targets, *_ = source.batch(np.arange(SAMPLES))
    parameters = dbmpi.parameters(result)
    assert result.test is not None
    mine, closed = Plane(), []
    mine.close = lambda: closed.append(True)  # type: ignore[attr-defined]
    for usual in ({"allow_code": [own_objectives.__file__]}, {"objective": mine}):
        outcome = dbmpi.evaluate(result, str(test), comm, batch_size=7, **usual)
        rows = dbmpi.predict(run.run.directory, test, comm, batch_size=7, **usual)
        assert comm.allgather(outcome)[0] == outcome
        assert outcome.mean_loss == pytest.approx(result.test.mean_loss, rel=1e-5)
        assert (rows is None) == (comm.rank > 0)
        for data in ((inputs, targets), lambda: (inputs, targets)):
            assert dbmpi.evaluate(result, data, comm, batch_size=7, **usual) == outcome
        again = dbmpi.predict(result, inputs, comm, batch_size=7, **usual)
        assert (again is None) if rows is None else np.array_equal(again, rows)
        if rows is not None:
            expected = inputs @ parameters["slope/weights"] + parameters["bias"]
            np.testing.assert_allclose(rows[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert len(closed) == 5


@pytest.mark.parallel([1, 3])
def test_what_cannot_be_evaluated_or_predicted_is_refused_on_all_ranks(comm, plane) -> None:
    result = train(describe(plane, optimizer={"epochs": 1}), comm, objective=Plane())
    test = plane / "test.h5"
    for call, words in (
        (
            lambda: dbmpi.evaluate(result, test, comm, objective=Plane(9)),
            "slope/weights is 6 in the file and 9 in the obj",
        ),
        (lambda: dbmpi.evaluate(result, test, comm, objective=Plane(), partitions=comm.size + 1), "cannot be replicas"),
        (lambda: dbmpi.evaluate(result, None, comm, objective=Plane()), "data: 'inputs' is NoneType"),
        (lambda: dbmpi.evaluate(test, test, comm), "not a whole checkpoint"),
        (lambda: dbmpi.evaluate(result, test, comm, objective=Plane(), batch_size=0), "batch_size: given 0"),
        (lambda: dbmpi.predict(result, test, comm, objective=Softmax()), "another objective"),
        (lambda: dbmpi.predict(result, test, comm, objective=Wrong("width"), batch_size=9), "predict returned rows of"),
    ):
        with pytest.raises(UserError) as raised:
            call()
        told = [text for text in comm.allgather(str(raised.value)) if words in text]
        assert len(told) == 1, raised.value
    last = comm.rank == comm.size - 1 > 0
    for given in ({"batch_size": 7 + last}, {"partitions": 1 + last}):
        if comm.size > 1:
            with pytest.raises(UserError) as raised:
                dbmpi.evaluate(result, test, comm, objective=Plane(), **given)
            assert len([text for text in comm.allgather(str(raised.value)) if "different things" in text]) == 1


MISTAKES = {
    "making": ("fails when it is made", "nothing works today", "own_objectives.py"),
    "no parameters": ("has no parameters", "initial(seed)"),
    "no dictionary": ("an array of float64 of shape (3,)", "expected a dictionary of float arrays"),
    "integers": ("weights is an array of int64", "expected a dictionary of float arrays"),
    "a name": ("'a/b' is no name for an array",),
    "nothing in it": ("weights is an array of float64 of shape (0,)",),
    "not finite at first": ("the first values of 'weights' are not all finite",),
    "shape": ("the gradient of 'slope/weights' has shape (6, 1)", "expected that of the parameter, (6,)"),
    "name": ("the gradient of 'slope/weight'", "no parameter is called so"),
    "missing": ("the gradient of 'bias'", "there is none"),
    "complex": ("bias is an array of complex128",),
    "loss alone": ("loss_and_gradient returned", "expected two things"),
    "loss of each sample": ("for the loss; expected a number",),
    "metrics": ("metrics returned list [1.0]", "expected a dictionary of numbers by name"),
    "writing": ("fails when it is tried on the first batch", "read-only"),
}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("way", MISTAKES)
def test_a_mistake_is_told_before_anything_is_learned(comm, plane, way) -> None:
    run = describe(plane, network={"code": HERE.parent}, objective={"use": "parallel.own_objectives:Wrong", "way": way})
    before = tiny.snapshot(plane)
    waiting.barrier(comm, "the others to have looked")
    assert_told_once(comm, run, "the objective", *MISTAKES[way])
    assert not list((plane / "run").glob("checkpoints/*"))
    assert {name for name in tiny.snapshot(plane) if "run" not in name} == {*before}


@pytest.mark.parallel([1, 3])
def test_what_makes_no_run_is_refused(comm, plane) -> None:
    run = describe(plane)
    with pytest.raises(UserError, match=r"neither network.layers nor an objective|rank 0 reports"):
        train(run, comm)
    with pytest.raises(UserError, match=r"has network.layers already|rank 0 reports"):
        train(tiny.describe(plane), comm, objective=Plane())
    with pytest.raises(UserError, match=r"without a method 'loss_and_gradient|rank 0 reports"):
        train(run, comm, objective=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes the place of"):
        tiny.describe(plane, objective={"use": "a:b"})
    with pytest.raises(ValueError, match=r"topology.partitions = 2: an objective of your own is computed by one rank"):
        describe(plane, objective={"use": "a:b"}, topology={"partitions": 2})


@pytest.mark.parallel([3])
def test_different_objectives_on_different_ranks_are_refused(comm, plane) -> None:
    run = describe(plane)
    for other, words in (
        (Softmax(), 'Softmax" on rank 1'),
        (Plane(9), "['slope/weights', 9] on rank 1"),
        (None, "neither"),
    ):
        with pytest.raises(UserError) as raised:
            train(run, comm, objective=Plane() if comm.rank != 1 else other)
        told = [text for text in comm.allgather(str(raised.value)) if words in text]
        assert len(told) == 1, raised.value


@pytest.mark.parallel([1])
def test_a_gradient_that_is_not_finite_ends_the_run_unless_a_point_is_only_tried(comm, plane) -> None:
    sections = {"optimizer": {"method": "sandblaster", "epochs": 40}, "run": {"directory": plane / "tried"}}
    result = train(describe(plane, **sections), comm, objective=Wrong("infinite far away"))
    assert result.test is not None
    assert result.test.mean_loss < 0.02
    run = describe(plane)
    with pytest.raises(RunFailed, match=r"at step \d+ .*, but the gradient of 'bias' is not finite, for 4 pushes"):
        train(run, comm, objective=Wrong("infinite"))


@pytest.mark.parallel([1, 3])
def test_what_is_dropped_changes_in_batches_of_all_samples(comm, plane) -> None:
    """As with dropout of a network; and methods that minimise one function are refused."""
    topology, optimizer = {"shards": 1, "colocate": True}, {"method": "sandblaster", "epochs": 20}
    sections = {"topology": topology, "optimizer": optimizer}
    mine = Dropping()
    result = train(describe(plane, sandblaster={"batch_iterations": 2}, **sections), comm, objective=mine)
    assert result.steps > 4
    per_epoch = -(-SAMPLES // 6)
    steps = [
        step for of_rank in comm.allgather(mine.steps[2:]) for step in of_rank
    ]  # a rank may compute a few portions
    assert len({step // per_epoch for step in steps}) > 1
    named = {"network": {"code": HERE.parent}, "objective": {"use": "parallel.own_objectives:Dropping"}}
    run = describe(plane, sandblaster={"l1": 0.1}, run={"directory": plane / "sparse"}, **named, **sections)
    assert_told_once(comm, run, "sandblaster.l1 = 0.1 minimises one function", "draws random numbers")


@pytest.mark.parallel([1, 3])
def test_a_run_begins_with_given_values(comm, plane) -> None:
    """From a dictionary, from a file, and from another run; both optimizers; and a run that resumes ignores them."""
    random = np.random.default_rng(7)
    values = {"slope": {"weights": random.normal(size=FEATURES)}, "bias": random.normal(size=())}
    expected = np.float32([*values["slope"]["weights"], values["bias"]])
    hardly = {"rule": "sgd", "learning_rate": 1e-30, "epochs": 1}
    shards = {"shards": max(1, comm.size - 1), "replicas": 1, "colocate": comm.size == 1}
    settled = {"optimizer": hardly, "topology": shards}
    result = train(describe(plane, **settled), comm, objective=Plane(), initial=values)
    np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], expected)
    if comm.rank == 0:
        np.savez(plane / "some.npz", **{"slope.weights": values["slope"]["weights"]})
    waiting.barrier(comm, "the file")
    again = {"run": {"directory": plane / "again", "initial": plane / "some.npz"}}
    with pytest.raises(UserError, match=r"'bias' of shape \(1,\) is missing|rank 0 reports"):
        train(describe(plane, **settled, **again), comm, objective=Plane())
    again["run"]["initial_names"] = "some"
    some = train(describe(plane, **settled, **again), comm, objective=Plane())
    np.testing.assert_array_equal(dbmpi.parameters(some)["slope/weights"], expected[:-1])
    assert abs(dbmpi.parameters(some)["bias"][0]) < 1e-20
    again["run"]["initial"] = plane / "removed"
    more = {"optimizer": hardly | {"epochs": 2}, "topology": shards}
    resumed = train(describe(plane, **more, **again), comm, objective=Plane())
    np.testing.assert_array_equal(dbmpi.parameters(resumed)["slope/weights"], expected[:-1])
    method = {"optimizer": {"method": "sandblaster"}, "run": {"directory": plane / "batch", "initial": plane / "run"}}
    train(describe(plane, topology=shards, **method), comm, objective=Plane())
    with Source.open(plane / "train.h5", 100, reading=Reading(own=True)) as source:
        samples = source.batch(np.arange(SAMPLES))
    loss, _ = Plane().loss_and_gradient({"slope": {"weights": expected[:-1]}, "bias": expected[-1]}, samples)
    first = next(record for record in read_records(plane / "batch") if record["kind"] == "batch")
    assert first["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parallel([3])
def test_ranks_that_would_begin_differently_are_refused(comm, plane) -> None:
    values = {"slope": {"weights": np.full(FEATURES, float(comm.rank == 2))}, "bias": np.zeros(())}
    for given, words in (
        (values, "the arrays differ"),
        ({} if comm.rank == 1 else None, "the arrays differ"),
        (plane / f"{comm.rank == 1}.npz", "different descriptions: run.initial"),
    ):
        with pytest.raises(UserError) as raised:
            train(describe(plane), comm, objective=Plane(), initial=given)
        told = [text for text in comm.allgather(str(raised.value)) if words in text]
        assert len(told) == 1, raised.value
    mine = Plane(scale=0.1 + comm.rank // 2)
    with pytest.raises(UserError) as raised:
        train(describe(plane), comm, objective=mine)
    told = [text for text in comm.allgather(str(raised.value)) if "first values of 'slope/weights' differ" in text]
    assert len(told) == 1, raised.value
    values = mine.initial(0) | {"slope": {"weights": np.zeros(FEATURES)}}
    train(describe(plane, optimizer={"epochs": 1}), comm, objective=mine, initial=values)
