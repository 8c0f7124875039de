"""Weights of samples in whole runs and in replicas cut over ranks, beside a twin whose samples are repeated instead."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from parallel import tiny
from parallel.test_replica import by_units, dense_network, random_batch, relative

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.replica.replica import Replica
from dbmpi.runs.training import train

OFTEN = np.array([0, 1, 3, 1, 2] * 8)


def write_weighted(place) -> None:
    """Write ``train.h5`` with weights, and ``twin.h5`` with each sample as often as its weight says."""
    with h5py.File(place / "train.h5", "a") as file:
        file["often"] = OFTEN
        inputs, targets = file["inputs"][()], file["targets"][()]
    tiny.write_file(place / "twin.h5", np.repeat(inputs, OFTEN, axis=0), np.repeat(targets, OFTEN))


def learned(run, comm):
    result = train(run, comm)
    if comm.rank:
        return None, result
    with Checkpoint.open(run.run.directory) as checkpoint:
        return checkpoint.parameters(), result


@pytest.mark.parallel([1, 3, 4])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
@pytest.mark.parametrize("loss", ["softmax", "logistic", "squared"])
def test_a_run_with_weights_learns_what_repeated_samples_teach(comm, place, method, loss) -> None:
    """Steps on all samples at once; the replica is cut over all ranks but the shard's."""
    if comm.rank == 0:
        write_weighted(place)
    comm.Barrier()
    epochs, found = 12 if method == "downpour" else 30, []
    for name in ("train", "twin"):
        count = tiny.SAMPLES if name == "train" else int(OFTEN.sum())
        # Sandblaster in portions: their sums must be weighted, too.
        size = count if method == "downpour" else 7
        data = {"train": place / f"{name}.h5", "test": place / "test.h5"}
        run = tiny.describe(
            place,
            run={"directory": place / f"{name}-{loss}-{method}", "seed": 3},
            data=data | ({"weights": "/often"} if name == "train" else {}),
            network={"layers": ({"units": tiny.CLASSES},), "loss": loss},
            topology={"colocate": True} if comm.size == 1 else {"shards": 1, "partitions": comm.size - 1},
            optimizer={"method": method, "rule": "sgd", "learning_rate": 0.3, "batch_size": size, "epochs": epochs},
            sandblaster={"l2": 0.01, "deterministic": True, "gtol": 1e-7, "ftol": 0.0},
        )
        found.append(learned(run, comm))
    (weighted, result), (repeated, twin) = found
    assert result.test is not None
    assert twin.test is not None
    # Held-out samples all count alike.
    assert result.test.samples == tiny.TEST_SAMPLES
    assert result.test.mean_loss == pytest.approx(twin.test.mean_loss, rel=1e-3)
    if comm.rank == 0:
        np.testing.assert_allclose(weighted, repeated, rtol=1e-3, atol=1e-4 if method == "downpour" else 2e-3)


@pytest.mark.parallel([2, 3, 5])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("loss", ["softmax", "logistic", "squared"])
def test_a_weighted_batch_over_partitions(comm, loss, shared) -> None:
    network = dense_network(loss, np.float64, 9, 5)
    whole = np.empty(network.layout.size)
    network.initial(0, whole)
    replica = Replica(network, by_units(network, comm.size), comm, shared=shared)
    for samples in (1, 4, 33):
        batch = random_batch(network, samples)._replace(weights=np.arange(samples) % 4 + 0.25)
        expected = np.empty_like(whole)
        outcome = network.loss_and_gradient(whole, batch, expected)
        mine = replica.parameters.take(whole)
        part = np.empty_like(mine)
        found = replica.loss_and_gradient(mine, batch, part)
        assert found.mean_loss == pytest.approx(outcome.mean_loss, rel=1e-12)
        assert found.correct == outcome.correct
        assert relative(part, replica.parameters.take(expected)) <= 1e-12
    replica.free()


@pytest.mark.parallel([2])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_a_loss_that_makes_no_sense_is_named_at_the_end(comm, place, method) -> None:
    """Targets that have nothing to do with the inputs, and a run too short to tell, and one that learns."""
    rng = np.random.default_rng(7)
    if comm.rank == 0:
        tiny.write_file(place / "noise.h5", np.zeros((400, tiny.FEATURES)), rng.integers(0, tiny.CLASSES, 400))
        tiny.write_file(place / "odd.h5", rng.normal(0, 1e20, (17, tiny.FEATURES)), rng.integers(0, tiny.CLASSES, 17))
    comm.Barrier()

    def warning(name: str, train_file: str, test_file: str, epochs: float) -> str:
        run = tiny.describe(
            place,
            run={"directory": place / name, "seed": 3},
            data={"train": place / train_file, "test": place / test_file},
            network={"layers": ({"units": tiny.CLASSES},)},
            topology={"shards": 1},
            optimizer={"method": method, "batch_size": 8, "epochs": epochs, "learning_rate": 0.05},
            sandblaster={"gtol": 0.0, "ftol": 0.0, "algorithm": "gradient_descent"},
        )
        return train(run, comm).warning

    assert warning("learns", "train.h5", "test.h5", 40) == ""
    assert warning("short", "noise.h5", "test.h5", 1) == ""
    assert "is no better than that of always giving the same answer (1.09" in warning(
        "noise", "noise.h5", "test.h5", 60
    )
    assert "are the test data scaled" in warning("odd", "train.h5", "odd.h5", 40)
