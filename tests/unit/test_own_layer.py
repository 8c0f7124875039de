"""The example of a user's own layer keeps the contract of a layer."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.layer_checks import check_cuts, check_gradients, parameters_of, run

from dbmpi.errors import UserError
from dbmpi.network.own import from_directory

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def own_layer():
    before = list(sys.path)
    # Under the name that runs give it: compiled kernels are kept for the module's name, too.
    from_directory(EXAMPLES)("own_layer:Maxout", "own")
    yield sys.modules["own_layer"]
    sys.path[:] = before
    del sys.modules["own_layer"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outputs_are_the_largest_pieces(own_layer, dtype):
    layer = own_layer.Maxout("own", (3, 2, 2), units=5, pieces=4)
    parameters = parameters_of(layer, dtype)
    inputs = np.random.default_rng(1).normal(size=(3, 2, 2, 7)).astype(dtype)
    outputs, _, _ = run(layer, inputs, parameters=parameters)
    exact = {short: values.astype(np.float64) for short, values in parameters.items()}
    pieces = np.einsum("upi,is->ups", exact["weights"], inputs.reshape(12, 7).astype(np.float64))
    expected = (pieces + exact["bias"][..., np.newaxis]).max(axis=1)
    np.testing.assert_allclose(outputs, expected, atol=1e-5 if dtype == np.float32 else 1e-12)


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_gradients_are_finite_differences(own_layer, units, pieces, seed):
    check_gradients(own_layer.Maxout("own", (2, 3), units=units, pieces=pieces), 4, seed)


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from([np.float32, np.float64]), st.data())
def test_pieces_make_the_whole(own_layer, units, pieces, dtype, data):
    check_cuts(own_layer.Maxout("own", (2, 3), units=units, pieces=pieces), 5, dtype, data)


def test_initial_weights_are_the_same_in_parts(own_layer):
    layer = own_layer.Maxout("own", (30,), units=4)
    whole, part = np.empty(240), np.empty(50)
    layer.initial("weights", whole, 7, 0, 0)
    layer.initial("weights", part, 7, 0, 100)
    np.testing.assert_array_equal(whole[100:150], part)
    assert whole.std() == pytest.approx(30**-0.5, rel=0.15)


def test_settings_that_make_no_sense_are_refused(own_layer):
    with pytest.raises(UserError, match=r"'own'.*0 units"):
        own_layer.Maxout("own", (3,), units=0)
