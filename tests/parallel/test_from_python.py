"""Runs whose data a program gives: the same as from files, to the last bit, wherever the arrays are."""

from __future__ import annotations

import argparse

import h5py
import numpy as np
import pytest
from parallel import tiny
from parallel.own_objectives import Softmax
from parallel.test_own_objective import describe

from dbmpi.cli import train as cli_train
from dbmpi.config import Run, load
from dbmpi.data.shared import SharedArrays
from dbmpi.errors import ToldElsewhere, UserError
from dbmpi.mpi import waiting
from dbmpi.mpi import window as windows
from dbmpi.objective import Samples
from dbmpi.runs.training import train


def arrays(place):
    """Return training and test data of the tiny files as arrays."""
    found = []
    for name in ("train", "test"):
        with h5py.File(place / f"{name}.h5") as file:
            found.append((file["inputs"][()], file["targets"][()]))
    return found


def without_files(run: Run) -> Run:
    """Return the run with another directory, and without its data files."""
    data = run.data.model_copy(update={"train": None, "test": None})
    directory = run.run.directory.with_name("given")
    return run.model_copy(update={"data": data, "run": run.run.model_copy(update={"directory": directory})})


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("method", "way"),
    [("downpour", "arrays"), ("downpour", "function"), ("downpour", "copies"), ("sandblaster", "function")],
)
def test_a_network_learns_from_arrays_what_it_learns_from_files(comm, place, monkeypatch, method, way) -> None:
    if way == "copies":
        monkeypatch.setattr(windows, "missing", lambda *_: 1)
    topology = {"replicas": 1, "shards": max(1, comm.size - 1), "colocate": comm.size == 1}
    epochs = 3 if method == "downpour" else 6
    run = tiny.describe(
        place,
        topology=topology,
        optimizer={"method": method, "epochs": epochs},
        sandblaster={"deterministic": True},
        monitor={"evaluate_epochs": 1},
    )
    calls = []

    def made(number):
        calls.append(number)
        return arrays(place)[number]

    data, test = arrays(place)
    given = {"data": data, "test": test} if way == "arrays" else {"data": lambda: made(0), "test": lambda: made(1)}
    expected = train(run, comm)
    result = train(without_files(run), comm, **given)
    assert result.test == expected.test
    assert comm.allreduce(len(calls)) == (0 if way == "arrays" else 2), "a function is called once on each node"
    np.testing.assert_array_equal(
        tiny.vectors(result.checkpoint)["parameters"], tiny.vectors(expected.checkpoint)["parameters"]
    )
    # And the run goes on with the files: they are the same data.
    longer = {"optimizer": run.optimizer.model_copy(update={"epochs": 2.0 * epochs})}
    files = run.model_copy(update={"run": without_files(run).run, **longer})
    assert train(files, comm).steps > 0


@pytest.mark.parallel([3])
@pytest.mark.parametrize("fits", [True, False])
def test_a_function_gives_all_ranks_of_a_node_the_same_memory(comm, monkeypatch, fits) -> None:
    if not fits:
        monkeypatch.setattr(windows, "missing", lambda *_: 1)
    random = np.random.default_rng(1)
    inputs = {"b": random.normal(size=(5, 3)).T, "a": np.arange(3, dtype=np.int16)}
    labels, weights = ["x", "y", "x"], np.ones(3)
    with SharedArrays(comm, lambda: (inputs, labels, weights), "it") as shared:
        one, two = shared.data.inputs
        assert (one.name, two.name, shared.data.named) == ("a", "b", True)
        for found, given in zip(shared.data.arrays, (inputs["a"], inputs["b"], labels, weights), strict=True):
            np.testing.assert_array_equal(found.values, given)
        waiting.barrier(comm, "the others to look")
        if comm.rank == 0:
            one.values[:] = 7
        waiting.barrier(comm, "the first to write")
        assert (one.values[0] == 7) == (fits or comm.rank == 0)
        assert ("copy of its own" in shared.note) == (not fits)
        del one, two, found, shared.data
        waiting.barrier(comm, "the others to have looked")


@pytest.mark.parallel([3])
def test_what_differs_between_ranks_is_refused(comm, place) -> None:
    (inputs, labels), _ = arrays(place)
    run = without_files(tiny.describe(place))
    odd = comm.rank == comm.size - 1
    for given, words in (
        ({"data": (inputs[1:], labels[1:]) if odd else (inputs, labels)}, "39 samples of (6,)"),
        ({"data": (inputs + odd, labels)}, "the arrays differ between ranks"),
        ({"data": (lambda: (inputs, labels)) if odd else (inputs, labels)}, "data is a function"),
        ({"data": None if odd else (inputs, labels)}, "no data to learn from"),
    ):
        with pytest.raises(UserError) as raised:
            train(run, comm, **given)
        told = [text for text in comm.allgather(str(raised.value)) if words in text]
        assert len(told) == 1, comm.allgather(str(raised.value))


@pytest.mark.parallel([3])
def test_mistakes_in_what_is_given_are_told_once(comm, place) -> None:
    (inputs, labels), _ = arrays(place)
    run = without_files(tiny.describe(place))

    def failing():
        raise ZeroDivisionError("no data today")

    packed = h5py.File("packed", "w", driver="core", backing_store=False).create_dataset("it", data=inputs)
    packed.attrs["scale_factor"] = 0.5
    for described, given, words in (
        (tiny.describe(place), {"data": (inputs, labels)}, "but the run has data.train ="),
        (run, {"data": lambda: (packed, labels)}, "which a function cannot return; give the dataset itself"),
        (run, {}, "the run has no data to learn from"),
        (run, {"data": failing}, "ZeroDivisionError: no data today"),
        (run, {"data": (inputs, labels), "test": (inputs[:, :5], labels)}, "samples have shape (5,), but those of"),
        (run, {"data": (inputs, labels + 1), "test": (inputs, labels)}, "label 0 of sample 2 is not a class"),
        (run, {"data": (np.where(inputs > 2, np.inf, inputs), labels)}, "NaN, infinity"),
    ):
        with pytest.raises(UserError) as raised:
            train(described, comm, **given)
        told = comm.allgather(None if isinstance(raised.value, ToldElsewhere) else str(raised.value))
        messages = [message for message in told if message]
        assert len(messages) == 1, told
        assert words in messages[0], messages[0]


@pytest.mark.parallel([1])
def test_the_command_line_says_which_file_is_missing(comm, shared_path) -> None:
    """Where a program may give arrays to the same configuration."""
    config = shared_path / "run.toml"
    config.write_text("[[network.layers]]\nunits = 3\n")
    with pytest.raises(UserError, match=r"run.toml: 'data.train' is missing: HDF5 file with the training samples"):
        cli_train.described(argparse.Namespace(config=config, overrides=[]), comm)
    inputs = np.eye(3, dtype=np.float32)
    run = load(config, [f"run.directory={shared_path / 'run'}", "optimizer.epochs=1", "monitor.progress=none"])
    assert train(run, comm, data=(inputs, np.arange(3))).steps == 1


class Embedding(Softmax):
    """Softmax of features that are looked up by integers, and of others that are added."""

    def loss_and_gradient(self, parameters, batch):
        looked_up = np.eye(6, dtype=np.float32)[batch.inputs["kind"]] + batch.inputs["more"]
        assert batch.inputs["kind"].dtype == np.int16
        assert all(array.flags.c_contiguous for array in (*batch.inputs.values(), batch.targets))
        return super().loss_and_gradient(parameters, Samples(looked_up, batch.targets))

    evaluate = None


@pytest.mark.parallel([1, 3])
def test_an_objective_gets_several_inputs_of_their_own_types(comm, place) -> None:
    """From arrays, or from the datasets of a file."""
    random = np.random.default_rng(1)
    kind = random.integers(0, 6, 40).astype(np.int16)
    more = random.normal(0, 0.1, (40, 6))
    if comm.rank == 0:
        with h5py.File(place / "several.h5", "w") as file:
            file["kind"], file["more"], file["targets"] = kind, more, kind % 3
    waiting.barrier(comm, "the file")
    optimizer = {"epochs": 10, "learning_rate": 0.5}
    topology = {"replicas": 1, "colocate": comm.size == 1, "shards": max(1, comm.size - 1)}
    inputs = {"inputs": ("kind", "more"), "train": place / "several.h5", "test": place / "several.h5"}
    run = describe(place, data=inputs, optimizer=optimizer, topology=topology)
    expected = train(run, comm, objective=Embedding())
    given = {"kind": kind, "more": more}, kind % 3
    result = train(without_files(run), comm, objective=Embedding(), data=given, test=lambda: given)
    assert result.test == expected.test
    assert result.test.mean_loss < 0.3
