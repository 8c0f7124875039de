"""An objective of a user's own between named arrays and the flat vector of the optimizers."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.checkpoint_files import make_info

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.cli.main import main
from dbmpi.errors import RunFailed, UserError
from dbmpi.objective import Samples
from dbmpi.replica.own_objective import OwnModel, OwnReplica, try_objective
from dbmpi.runs.trained_network import load_state

NAMES = st.sampled_from(["a", "b", "weights", "0.bias", "x-1"])
ARRAYS = st.lists(st.integers(1, 3), max_size=3).map(tuple)
TREES = st.recursive(ARRAYS, lambda inside: st.dictionaries(NAMES, inside, min_size=1, max_size=3), max_leaves=8)


def filled(tree, random):
    if isinstance(tree, dict):
        return {name: filled(inside, random) for name, inside in tree.items()}
    return random.normal(size=tree)


def flat(tree):
    return [value for inside in tree.values() for value in (flat(inside) if isinstance(inside, dict) else [inside])]


def mapped(function, tree):
    return {
        name: mapped(function, inside) if isinstance(inside, dict) else function(inside)
        for name, inside in tree.items()
    }


class Twice:
    """The gradient of each parameter is twice its value."""

    def __init__(self, first):
        self.parameters, self.seen = first, None

    def loss_and_gradient(self, parameters, batch):
        self.seen = parameters, batch
        return np.float32(0.25), mapped(lambda values: 2 * values, parameters)


def batch(samples=3):
    return Samples(np.zeros((samples, 2), np.float32), np.zeros(samples, np.int32))


@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=4), st.integers(0, 99), st.data())
def test_arrays_come_back_as_they_were_nested_whatever_the_cut(tree, seed, data):
    first = filled(tree, np.random.default_rng(seed))
    objective = Twice(first)
    model = OwnModel(objective, 1, "the objective")
    expected = np.concatenate([np.ravel(value) for value in flat(first)]).astype(np.float32)
    edges = sorted({0, model.layout.size, *data.draw(st.lists(st.integers(0, model.layout.size), max_size=4))})
    whole = np.empty(model.layout.size, np.float32)
    for start, stop in itertools.pairwise(edges):
        model.initial(start, whole[start:stop])
    np.testing.assert_array_equal(whole, expected)
    replica, gradient, order = OwnReplica(model), np.full_like(whole, 7), []
    outcome = replica.loss_and_gradient(whole, batch(), gradient, order.append)
    assert (outcome.samples, outcome.loss, outcome.correct) == (3, 0.75, -1)
    assert order == list(range(len(model.layout.tensors)))[::-1]
    np.testing.assert_array_equal(gradient, 2 * expected)
    named, _ = objective.seen
    for given_, found in zip(flat(first), flat(named), strict=True):
        assert np.shape(given_) == found.shape
        assert not found.flags.writeable
        assert np.shares_memory(found, whole)
    replica.loss_and_gradient(whole, batch(), gradient, add=True)
    np.testing.assert_array_equal(gradient, 4 * expected)
    buffers = [np.empty(len(part), np.float32) for part in replica.parameters.parts]
    replica.loss_and_gradient(whole, batch(), buffers.__getitem__)
    np.testing.assert_array_equal(np.concatenate(buffers), 2 * expected)


class Written:
    """As `Twice`, array by array in some order, some of them computed in place."""

    def __init__(self, first, order=None, in_place=()):
        self.parameters, self._order, self._in_place = first, order or list(first), in_place

    def write_gradient(self, parameters, batch, gradients):
        for name in self._order:
            values = parameters[name]
            if name in self._in_place:
                gradients.ready(name, np.multiply(values, 2, out=gradients.out(name)))
            else:
                gradients.ready(name, 2 * values.astype(float))
        return 0.25


@given(st.permutations("abcd"), st.sets(st.sampled_from("abcd")), st.integers(0, 1))
def test_gradients_may_come_one_by_one_in_any_order(order, in_place, steps_before):
    first = {name: np.random.default_rng(number).normal(size=number) for number, name in enumerate("abcd", 1)}
    replica = OwnReplica(OwnModel(Written(first, order, in_place), 1, "it"))
    whole = np.concatenate(list(first.values())).astype(np.float32)
    # In a vector of their own, as a sum where there are earlier steps.
    gradient, left = np.full_like(whole, 7), []
    if steps_before:
        replica.loss_and_gradient(whole, batch(), gradient)
    outcome = replica.loss_and_gradient(whole, batch(), gradient, left.append, add=steps_before > 0)
    assert (outcome.samples, outcome.loss) == (3, 0.75)
    assert left == [3, 2, 1, 0]
    np.testing.assert_array_equal(gradient, 2 * (1 + steps_before) * whole)
    # In memory that they share, which is gone as soon as an array has left.
    memory, found, parts = np.empty(4, np.float32), {}, replica.parameters.parts

    def leave(number):
        found[number] = memory[: len(parts[number])].copy()
        memory.fill(np.nan)

    replica.loss_and_gradient(whole, batch(), lambda number: memory[: len(parts[number])], leave)
    assert list(found) == [3, 2, 1, 0]
    np.testing.assert_array_equal(np.concatenate([found[number] for number in range(4)]), 2 * whole)
    for_once = whole.copy()
    assert replica.evaluate(for_once, batch()).loss == 0.75
    gone = weakref.ref(for_once)
    del for_once
    assert gone() is None, "kept after an evaluation"


def test_a_gradient_in_place_is_where_it_is_pushed_from():
    class InPlace(Written):
        def write_gradient(self, parameters, batch, gradients):
            self.addresses = {name: gradients.out(name).ctypes.data for name in parameters}
            return super().write_gradient(parameters, batch, gradients)

    objective = InPlace({"a": np.ones(3), "b": np.ones((2, 2))}, in_place="ab")
    replica, gradient = OwnReplica(OwnModel(objective, 1, "it")), np.empty(7, np.float32)
    replica.loss_and_gradient(np.ones(7, np.float32), batch(), gradient)
    start = gradient.ctypes.data
    assert objective.addresses == {"a": start, "b": start + 12}


def test_a_gradient_in_place_may_be_given_transposed():
    class Transposed(Written):
        def write_gradient(self, parameters, batch, gradients):
            out = gradients.out("a")
            out[:] = [[1, 2], [3, 4]]
            gradients.ready("a", out.T)
            return 0.25

    gradient = np.empty(4, np.float32)
    OwnReplica(OwnModel(Transposed({"a": np.ones((2, 2))}), 1, "it")).loss_and_gradient(gradient, batch(), gradient)
    assert gradient.tolist() == [1, 3, 2, 4]


@pytest.mark.parametrize(
    ("given_", "error", "message"),
    [
        ([("a", np.zeros(3)), ("a", np.zeros(3))], UserError, "'a' is ready twice"),
        ([("c", np.zeros(3))], UserError, "'c': no parameter is called so"),
        ([("a", np.zeros(3))], UserError, "'b': there is none"),
        ([("a", np.zeros((3, 1)))], UserError, r"shape \(3, 1\); expected that of the parameter, \(3,\)"),
        ([("a", np.zeros(3, int))], UserError, "is int64; expected a float array"),
        ([("b", np.array(np.nan, np.float32)), ("a", np.zeros(3))], RunFailed, "gradient of 'b' is not"),
        ([("b", 1e39), ("a", np.zeros(3))], RunFailed, "gradient of 'b' is not"),
    ],
)
def test_gradients_that_do_not_fit(given_, error, message):
    class Some:
        parameters = {"a": np.zeros(3), "b": np.zeros(())}  # noqa: RUF012

        def write_gradient(self, parameters, batch, gradients):
            for name, values in given_:
                gradients.ready(name, values)
            return 0.0

    replica = OwnReplica(OwnModel(Some(), 1, "it"))
    with pytest.raises(error, match=message):
        replica.loss_and_gradient(np.zeros(4, np.float32), batch(), np.empty(4, np.float32))


def test_state_is_kept_byte_by_byte_and_compared(tmp_path):
    class Stateful(Twice):
        state = {"mean": np.arange(3.0), "inner": {"seen": np.array(7), "mask": np.array([True, False])}}  # noqa: RUF012

        def loss_and_gradient(self, parameters, batch):
            self.state["mean"] += 1  # type: ignore[misc]
            self.state["inner"]["seen"] = np.array(8)
            return super().loss_and_gradient(parameters, batch)

    model = OwnModel(Stateful({"a": np.zeros(2)}), 1, "it")
    assert model.state.description == [["mean", "<f8", 3], ["inner/seen", "<i8"], ["inner/mask", "|b1", 2]]
    assert model.state.nbytes == 34
    assert try_objective(model, batch())
    assert OwnReplica(model).evaluate(np.zeros(2, np.float32), batch()).samples == 3
    assert model.state.arrays["mean"].tolist() == [0, 1, 2]
    OwnReplica(model).loss_and_gradient(np.zeros(2, np.float32), batch(), np.empty(2, np.float32))
    stored = model.state.to_store(model.state.pack())
    assert {name: (str(array.dtype), array.tolist()) for name, array in stored.items()} == {
        "mean": ("float64", [1, 2, 3]),
        "inner/seen": ("int64", 8),
        "inner/mask": ("uint8", [1, 0]),
    }

    def load(changed, of=model.state):
        with CheckpointWriter(tmp_path / "it.h5", model.layout, objective_state=changed) as writer:
            writer.write("parameters", 0, np.zeros(2, np.float32))
            writer.commit(make_info())
        with Checkpoint.open(tmp_path / "it.h5") as checkpoint:
            return load_state(of, checkpoint)

    assert load(stored | {"mean": np.full(3, 5.0)}) == ""
    assert model.state.arrays["mean"].tolist() == [5, 5, 5]
    with pytest.raises(UserError, match="'mean' is float64 of shape \\(4,\\) in the file and float64 of shape"):
        load(stored | {"mean": np.zeros(4)})
    with pytest.raises(UserError, match="'other' is float64 of shape \\(1,\\) in the file and absent"):
        load(stored | {"other": np.zeros(1)})
    without = OwnModel(Twice({"a": np.zeros(2)}), 1, "it").state
    with pytest.raises(UserError, match="'mean' is float64 of shape \\(3,\\) in the file and absent"):
        load(stored, of=without)
    assert "has no state of the objective, which begins with its first values" in load({})
    assert load({}, of=without) == ""
    model.state.arrays["mean"].flags.writeable = False
    with pytest.raises(UserError, match="'mean' is read-only"):
        OwnModel(Stateful({"a": np.zeros(2)}), 1, "it")
    Stateful.state = {"mean": [1.0]}
    with pytest.raises(UserError, match="'mean' is list"):
        OwnModel(Stateful({"a": np.zeros(2)}), 1, "it")


def test_a_gradient_in_double_precision_is_rounded_once():
    class Thirds(Twice):
        def loss_and_gradient(self, parameters, batch):
            return 0.0, {"a": np.full(3, 1 / 3)}

    replica = OwnReplica(OwnModel(Thirds({"a": np.zeros(3)}), 1, "it"))
    gradient = np.empty(3, np.float32)
    replica.loss_and_gradient(np.zeros(3, np.float32), batch(), gradient)
    np.testing.assert_array_equal(gradient, np.float32(1 / 3))


@pytest.mark.parametrize("words", [["bench", "network"], ["inspect", "--placement"]])
def test_commands_for_networks_say_that_there_is_none(tmp_path, capsys, words):
    config = tmp_path / "run.toml"
    config.write_text('[data]\ntrain = "train.h5"\n[objective]\nuse = "mine:Mine"\n')
    assert main([*words, str(config), "--input-shape", "4"]) == 2
    assert "there is no network" in capsys.readouterr().err


def test_an_evaluation_of_its_own_is_preferred():
    class Both(Twice):
        def evaluate(self, parameters, batch):
            return 0.5, 2

    parameters = np.zeros(2, np.float32)
    assert OwnReplica(OwnModel(Twice({"a": np.zeros(2)}), 1, "it")).evaluate(parameters, batch()).loss == 0.75
    outcome = OwnReplica(OwnModel(Both({"a": np.zeros(2)}), 1, "it")).evaluate(parameters, batch())
    assert (outcome.loss, outcome.correct, outcome.accuracy) == (1.5, 2, 2 / 3)
