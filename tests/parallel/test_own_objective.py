"""Objectives of a user's own in whole runs: NumPy code, trained like a network by both optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from parallel import own_objectives, tiny
from parallel.own_objectives import Plane, Softmax
from parallel.test_mistakes import assert_told_once

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.errors import RunFailed, UserError
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


@pytest.mark.parallel([1, 3])
def test_classes_are_counted(comm, place) -> None:
    run = describe(place, optimizer={"epochs": 10, "learning_rate": 0.5})
    result = train(run, comm, objective=Softmax())
    assert result.test is not None
    assert result.test.accuracy is not None
    assert result.test.accuracy > 0.9


@pytest.mark.parallel([1, 3])
def test_a_checkpoint_is_evaluated_and_predicts_with_code_that_is_allowed(comm, plane) -> None:
    objective = {"use": "own_objectives:Plane"}
    run = describe(plane, network={"code": HERE}, objective=objective, optimizer={"epochs": 30})
    result = train(run, comm)
    with pytest.raises(UserError, match=r"the objective is of type 'own_objectives:Plane'|rank 0 reports"):
        Inference(run.run.directory, comm)
    trained = Inference(run.run.directory, comm, code=[Path(own_objectives.__file__)], batch_size=7)
    with Source.open(plane / "test.h5", 100, reading=Reading(own=True)) as source:
        outcome = trained.evaluate(source)
        rows = np.concatenate([np.empty((0, 1)), *(rows for _, rows in trained.predict(source))])
        inputs = source.inputs(np.arange(SAMPLES))
    trained.free()
    assert result.test is not None
    assert outcome.mean_loss == pytest.approx(result.test.mean_loss, rel=1e-5)
    if comm.rank == 0:
        parameters = tiny.vectors(result.checkpoint)["parameters"]
        np.testing.assert_allclose(rows[:, 0], inputs @ parameters[:-1] + parameters[-1], rtol=1e-4, atol=1e-4)


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
        (Softmax(), "Softmax on rank 1"),
        (Plane(9), "['slope/weights', 9] on rank 1"),
        (None, "neither"),
    ):
        with pytest.raises(UserError) as raised:
            train(run, comm, objective=Plane() if comm.rank != 1 else other)
        told = [text for text in comm.allgather(str(raised.value)) if words in text]
        assert len(told) == 1, raised.value


@pytest.mark.parallel([1])
def test_a_gradient_that_is_not_finite_ends_the_run(comm, plane) -> None:
    run = describe(plane)
    with pytest.raises(RunFailed, match="the loss is finite, but the gradient of 'bias' is not"):
        train(run, comm, objective=own_objectives.Wrong("infinite"))
