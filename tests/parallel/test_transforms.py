"""A user's function of each batch that is learned from: what it draws follows from the seed and the batch alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parallel import own_transforms, tiny
from parallel.own_objectives import Softmax
from parallel.own_transforms import noise
from parallel.test_from_python import arrays, without_files
from parallel.test_own_objective import describe

from dbmpi.data.numbered_batches import NumberedBatches
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.errors import ToldElsewhere, UserError
from dbmpi.mpi import waiting
from dbmpi.objective import Batch, Samples
from dbmpi.runs.training import train

HERE = Path(__file__).parent


class Noisy(tiny.Twin):
    """The naive twin, with its own transform."""

    def batch(self, number):
        batch = super().batch(number)
        random = np.random.default_rng([self.run.run.seed, number, 0x64617461])
        found = noise(Samples(batch.inputs.T, batch.targets), random)
        return Batch(np.ascontiguousarray(found.inputs.T, np.float32), batch.targets)


def parameters(result):
    return tiny.vectors(result.checkpoint)["parameters"]


@pytest.mark.parallel([1, 3])
def test_a_run_learns_what_a_loop_learns_however_often_it_resumes(comm, place) -> None:
    """With a function that is given, and with one that the configuration names."""
    topology = {"replicas": 1, "shards": max(1, comm.size - 1), "colocate": comm.size == 1}
    run = tiny.describe(place, topology=topology)
    expected = Noisy(run).learn()
    data, test = arrays(place)
    given = train(without_files(run), comm, data=data, test=test, transform=noise)
    np.testing.assert_array_equal(parameters(given), expected)
    named = {"data": {"transform": "own_transforms:noise"}, "network": {"code": HERE}, "topology": topology}
    for epochs in (1, 3):
        result = train(tiny.describe(place, **named, optimizer={"epochs": epochs}), comm)
    np.testing.assert_array_equal(parameters(result), expected)
    # Held-out samples stay as they are.
    assert result.test == given.test
    assert result.test.mean_loss == pytest.approx(Noisy(run).test(expected).mean_loss, rel=1e-5)


@pytest.mark.parallel([3])
def test_sandblaster_does_not_depend_on_the_replicas(comm, place) -> None:
    """All samples are transformed anew every few iterations, for an objective here."""
    found = []
    for ranks in (1, 3):
        few = comm.Split(comm.rank < ranks)
        if comm.rank < ranks:
            run = describe(
                place,
                run={"directory": place / f"run{ranks}"},
                topology={"colocate": True, "shards": 1},
                optimizer={"method": "sandblaster", "epochs": 12},
                sandblaster={"deterministic": True, "batch_iterations": 2},
            )
            found.append(train(run, few, objective=Softmax(), transform=noise))
        waiting.barrier(comm, "the run to end")
        few.Free()
    if comm.rank == 0:
        np.testing.assert_array_equal(parameters(found[0]), parameters(found[1]))
        assert found[1].test.mean_loss < 0.5


MISTAKES = {
    "nothing": (lambda batch, random: None, "the transform returned NoneType None; expected dbmpi.objective.Samples"),
    "an array": (lambda batch, random: batch.inputs, "the transform returned ndarray"),
    "fewer": (lambda batch, random: Samples(batch.inputs[1:], batch.targets[1:]), "made 5 targets of a batch of 6"),
    "shape": (lambda batch, random: batch._replace(inputs=batch.inputs[:, 1:]), "returned inputs that are float32 of"),
    "class": (lambda batch, random: batch._replace(targets=batch.targets + 3), "expected classes, 0 ... 2"),
    "no whole numbers": (lambda batch, random: batch._replace(targets=batch.targets / 2), "(6,) of whole numbers"),
    "raising": (lambda batch, random: 1 // 0, "the transform fails when it is tried on the first batch: ZeroDivision"),
}


@pytest.mark.parallel([3])
@pytest.mark.parametrize("way", MISTAKES)
def test_a_mistake_is_told_before_anything_is_learned(comm, place, way) -> None:
    transform, words = MISTAKES[way]
    with pytest.raises(UserError) as raised:
        train(tiny.describe(place), comm, transform=transform)
    told = comm.allgather(None if isinstance(raised.value, ToldElsewhere) else str(raised.value))
    messages = [message for message in told if message]
    assert len(messages) == 1, told
    assert words in messages[0], messages[0]
    assert not list((place / "run").glob("checkpoints/*"))


@pytest.mark.parallel([1])
def test_what_is_no_transform_is_refused(comm, place) -> None:
    named = {"data": {"transform": "own_transforms:number"}, "network": {"code": HERE}}
    for described, given, words in (
        (tiny.describe(place, **named), None, "is no function"),
        (tiny.describe(place, **named), noise, "data.transform = 'own_transforms:number' already"),
        (tiny.describe(place), own_transforms.number, "transform=5; expected a function"),
        (
            tiny.describe(place, optimizer={"method": "sandblaster"}, sandblaster={"l1": 0.1}),
            noise,
            "data.transform makes another one in each epoch: leave it out",
        ),
    ):
        with pytest.raises(UserError, match=words.replace("(", r"\(")):
            train(described, comm, transform=given)


@pytest.mark.parallel([1])
def test_values_and_weights_of_a_network_may_change(comm, shared_path) -> None:
    """And an objective's inputs may get another shape."""
    tiny.write_file(shared_path / "it.h5", np.arange(24.0).reshape(12, 2), np.arange(24.0).reshape(12, 2), None)

    def changed(batch, random):
        return Samples(batch.inputs[:, ::-1], 2.0 * batch.targets, np.arange(batch.samples))

    order = Order(12, 5, 1, 3)
    with Source.open(shared_path / "it.h5", 1) as source:
        plain, found = (NumberedBatches(source, order, transform).batch(1) for transform in (None, changed))
        np.testing.assert_array_equal(found.inputs, plain.inputs[::-1])
        np.testing.assert_array_equal(found.targets, 2 * plain.targets)
        assert found.weights.tolist() == [0, 1, 2, 3, 4]
        assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in found)
    with Source.open(shared_path / "it.h5", 1, reading=Reading(own=True)) as source:
        batches = NumberedBatches(source, order, lambda batch, random: batch._replace(inputs=batch.inputs[:, :1]))
        assert batches.batch(2).inputs.shape == (2, 1)
