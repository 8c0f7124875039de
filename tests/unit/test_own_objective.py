"""An objective of a user's own between named arrays and the flat vector of the optimizers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.cli.main import main
from dbmpi.objective import Samples
from dbmpi.replica.own_objective import OwnModel, OwnReplica

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
