"""Locally connected layers against a naive twin, finite differences, and themselves in pieces."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from unit.layer_checks import CONTEXT, check_cuts, check_gradients, parameters_of, run

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.kernels import fields
from dbmpi.kernels.local import Untied
from dbmpi.network.field import LocalLayer
from dbmpi.network.layer import Backward, Forward

pytestmark = pytest.mark.timeout(240)  # kernels are compiled for every number of maps

FUNCTIONS = {
    "linear": (lambda x: x, np.ones_like),
    "sigmoid": (special.expit, lambda y: y * (1 - y)),
    "tanh": (np.tanh, lambda y: 1 - y**2),
    "relu": (lambda x: np.maximum(x, 0), lambda y: (y > 0).astype(y.dtype)),
}

VARIANTS = {np.float32: (1, 3, 11), np.float64: (1, 3)}
"""One map, a few and two blocks, for each type.

Each number is compiled anew for each type, in a second or two, and so all tests take these, and 2, which is a part of
3.  The heights of blocks and the widths of vectors are independent of one another: large blocks of float32 will do.
"""
RUNS = ((1, 1), (1, 6), (2, 3), (3, 2), (3, 3), (6, 1))
"""Channels, and columns of a field, for the gradient of a local layer's inputs, which is compiled for their product.

That is one row, one block, or two of different heights.
"""


def local(shape, maps, field, stride=1, name="local", **settings):
    return LocalLayer(name, shape, config.Local(maps=maps, field=field, stride=stride, **settings))


@st.composite
def layers(draw, maps, activations=tuple(FUNCTIONS)):
    channels, columns = draw(st.sampled_from(RUNS))
    field = (draw(st.integers(1, 4)), columns)
    shape = (channels, *(window + draw(st.integers(0, 6)) for window in field))
    stride = draw(st.integers(1, 5))
    maps, activation = draw(st.sampled_from(maps)), draw(st.sampled_from(activations))
    return local(shape, maps, field, stride, activation=activation)


def variants(layers):
    """Layers of one of the numbers of maps, with the type that these are compiled for."""
    return st.sampled_from(tuple(VARIANTS)).flatmap(lambda dtype: st.tuples(layers(VARIANTS[dtype]), st.just(dtype)))


def naive(layer, inputs, parameters, gradient):
    """Return outputs, input gradient and the parameters' as the formulas say, in float64."""
    function, derivative = FUNCTIONS[layer.section.activation]
    inputs = inputs.astype(np.float64)
    weights, bias = (parameters[short].astype(np.float64) for short in ("weights", "bias"))
    outputs = np.empty(gradient.shape)
    below, of_weights, of_bias = np.zeros_like(inputs), np.empty_like(weights), np.empty_like(bias)
    rows, columns = layer.field
    for i in range(layer.output_shape[1]):
        for j in range(layer.output_shape[2]):
            top, left = i * layer.section.stride, j * layer.section.stride
            place = np.s_[:, top : top + rows, left : left + columns]
            outputs[:, i, j] = function(np.einsum("muvc,cuvb->mb", weights[i, j], inputs[place]) + bias[i, j][:, None])
            delta = gradient[:, i, j] * derivative(outputs[:, i, j])
            of_weights[i, j] = np.einsum("mb,cuvb->muvc", delta, inputs[place])
            of_bias[i, j] = delta.sum(axis=1)
            below[place] += np.einsum("muvc,mb->cuvb", weights[i, j], delta)
    return outputs, below, {"weights": of_weights, "bias": of_bias}


def assert_close(found, expected, dtype, scale=1.0):
    """Compare with what is due to values of some scale, as where large ones cancel in a sum."""
    precision = {np.float32: 1e-5, np.float64: 3e-13}[dtype]
    np.testing.assert_allclose(found, expected, atol=precision * max(scale, np.abs(expected).max()), rtol=0)


@settings(max_examples=40)
@given(variants(layers), st.integers(1, 70), st.integers(0, 99))
def test_the_naive_twin_says_the_same(variant, samples, seed):
    layer, dtype = variant
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(*layer.input_shape, samples)).astype(dtype)
    parameters = parameters_of(layer, dtype, seed)
    gradient = random.normal(size=(*layer.output_shape, samples)).astype(dtype)
    outputs, below, of_parameters = run(layer, inputs, gradient.copy(), parameters)
    expected = naive(layer, inputs, parameters, gradient)
    used = layer.input_box(Box.whole(layer.output_shape)).slices()
    assert_close(outputs, expected[0], dtype)
    assert_close(below, expected[1][used], dtype)
    for short, values in of_parameters.items():
        assert_close(values, expected[2][short], dtype)


@settings(max_examples=15)
@given(layers(VARIANTS[np.float64], ("linear", "sigmoid", "tanh")), st.integers(0, 99))
def test_gradients_are_finite_differences(layer, seed):
    check_gradients(layer, 3, seed)


@settings(max_examples=30)
@given(layers((1, 2, 3)), st.sampled_from([np.float32, np.float64]), st.data())
def test_pieces_make_the_whole(layer, dtype, data):
    check_cuts(layer, 3, dtype, data)


@settings(max_examples=15)
@given(layers(VARIANTS[np.float32]), st.integers(1, 40), st.integers(0, 99))
def test_outputs_do_not_depend_on_the_box_or_the_batch_by_a_bit(layer, samples, seed):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(*layer.input_shape, samples)).astype(np.float32)
    parameters = parameters_of(layer, np.float32, seed)
    outputs, _, of_parameters = run(layer, inputs, None, parameters)
    box = a_corner_of(layer)
    part, _, of_part = run(layer, inputs, None, parameters, box)
    np.testing.assert_array_equal(part, outputs[box.slices()])
    for short, values in of_part.items():
        np.testing.assert_array_equal(values, of_parameters[short][layer.tensor_box(short, box).slices()])
    few, _, _ = run(layer, np.ascontiguousarray(inputs[..., samples // 2 :]), None, parameters)
    np.testing.assert_array_equal(few, outputs[..., samples // 2 :])


def a_corner_of(layer):
    """Return a quarter of a layer's outputs, of at most 3 maps: of a block of its own where the layer has two."""
    maps, *places = layer.output_shape
    return Box((max(maps // 2, maps - 3), *(length // 2 for length in places)), layer.output_shape)


def test_a_field_deeper_than_one_pass_is_summed_in_several():
    layer = local((9, 12, 13), 11, (10, 10))
    assert layer.inputs > 2 * fields.DEPTH
    random = np.random.default_rng(1)
    inputs = random.normal(size=(*layer.input_shape, 37)).astype(np.float32)
    parameters = parameters_of(layer, np.float32)
    gradient = random.normal(size=(*layer.output_shape, 37)).astype(np.float32)
    found, expected = run(layer, inputs, gradient.copy(), parameters), naive(layer, inputs, parameters, gradient)
    assert_close(found[0], expected[0], np.float32)
    assert_close(found[1], expected[1], np.float32)
    assert_close(found[2]["weights"], expected[2]["weights"], np.float32)


def test_nothing_is_written_beyond_the_results():
    layer = local((3, 7, 9), 11, (3, 2))
    samples = 21
    guarded = {}

    def array(name, shape):
        memory = np.full(int(np.prod(shape)) + 128, 7, np.float32)
        guarded[name] = memory
        return memory[64:-64].reshape(shape)

    box = Box.whole(layer.output_shape)
    inputs = array("inputs", (*layer.input_shape, samples))
    outputs, gradient = (array(name, (*layer.output_shape, samples)) for name in ("outputs", "gradient"))
    below = array("below", inputs.shape)
    parameters = parameters_of(layer, np.float32)
    results = {short: array(short, values.shape) for short, values in parameters.items()}
    layer.forward(Forward(box, parameters, inputs, outputs, CONTEXT))
    layer.backward(Backward(box, parameters, inputs, outputs, CONTEXT, gradient, results, below))
    for memory in guarded.values():
        assert (memory[:64] == 7).all()
        assert (memory[-64:] == 7).all()


def test_not_a_number_reaches_the_fields_that_see_it_only():
    layer = local((3, 6, 6), 3, (2, 2))
    inputs = np.ones((*layer.input_shape, 20), np.float32)
    inputs[1, 3, 3, 4] = np.nan
    outputs, _, of_parameters = run(layer, inputs, None, parameters_of(layer, np.float32))
    where = np.zeros(outputs.shape, bool)
    where[:, 2:4, 2:4, 4] = True
    np.testing.assert_array_equal(np.isnan(outputs), where)
    assert np.isnan(of_parameters["weights"]).any(axis=(2, 3, 4, 5)).sum() == 4


def test_without_an_input_gradient_the_rest_is_the_same():
    layer = local((3, 6, 6), 3, (2, 2), activation="tanh")
    inputs = np.random.default_rng(1).normal(size=(3, 6, 6, 9))
    parameters = parameters_of(layer, np.float64)
    box = Box.whole(layer.output_shape)
    outputs, _, expected = run(layer, inputs, None, parameters)
    found = {short: np.full_like(values, np.nan) for short, values in parameters.items()}
    layer.backward(Backward(box, parameters, inputs, outputs, CONTEXT, np.ones_like(outputs), found, None))
    for short, values in found.items():
        np.testing.assert_array_equal(values, expected[short])


def test_arrays_with_gaps_are_refused_instead_of_copied():
    weights, bias, inputs = np.ones((3, 3, 2, 2, 2, 1)), np.ones((3, 3, 2)), np.ones((1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 4\).*rows without gaps"):
        Untied(1).forward(weights, bias, inputs, np.ones((2, 3, 3, 8))[..., ::2])
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 4\).*C-contiguous"):
        Untied(1).forward(weights, bias, np.ones((1, 4, 4, 8))[..., ::2], np.ones((2, 3, 3, 4)))


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 9))
def test_bands_of_threads_cover_all_rows(places, field, stride, threads):
    height = (places - 1) * stride + field
    bands = fields.bands_of(places, height, field, stride, threads)
    assert bands.size == threads + 1
    assert bands[0] == 0
    assert bands[-1] == height
    assert (np.diff(bands) >= 0).all()


@given(st.integers(1, 200))
def test_blocks_cover_all_maps(maps):
    blocks = fields.Blocks.of(maps)
    assert blocks.tall * blocks.height + blocks.short * (blocks.height - 1) == maps
    assert 1 <= blocks.height <= fields.MAPS
    assert blocks.tall + blocks.short == -(-maps // fields.MAPS)


PROGRAM = """
import hashlib, numpy as np
from dbmpi.kernels.convolution import Tied
from dbmpi.kernels.local import Untied
random = np.random.default_rng(1)
inputs, gradient = (random.normal(size=shape).astype(np.float32) for shape in ((3, 20, 17, 40), (11, 16, 15, 40)))
for kind, shape, places in ((Untied, (16, 15, 11, 5, 3, 3), (16, 15, 11)), (Tied, (11, 3, 5, 3), (11,))):
    kernels = kind(1, "tanh")
    weights, bias = random.normal(size=shape).astype(np.float32), random.normal(size=places).astype(np.float32)
    outputs, of_weights, of_bias, below, mine = map(np.empty_like, (gradient, weights, bias, inputs, gradient))
    mine[...] = gradient
    kernels.forward(weights, bias, inputs, outputs)
    kernels.parameter_gradient(inputs, outputs, mine, of_weights, of_bias)
    kernels.input_gradient(weights, mine, below)
    for array in (outputs, of_weights, of_bias, below):
        print(hashlib.sha256(array.tobytes()).hexdigest(), float(np.abs(array).max()) > 0)
"""


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads():
    def results(threads):
        environment = {**os.environ, "NUMBA_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=300
        )
        return done.stdout.splitlines()

    one = results(1)
    assert len(one) == 8
    assert all(line.endswith("True") for line in one)
    assert results(2) == one
    assert results(3) == one


def test_the_configuration_describes_it():
    layer = local((3, 9, 8), 4, (3, 2), 2)
    assert layer.output_shape == (4, 4, 4)
    assert {short: tensor.shape for short, tensor in layer.tensors.items()} == {
        "weights": (4, 4, 4, 3, 2, 3),
        "bias": (4, 4, 4),
    }
    assert local((1, 5, 5), 1, 5).field == (5, 5)


def test_initial_weights_are_those_of_their_place_and_biases_zero():
    layer = local((3, 9, 8), 4, (3, 2), activation="relu", initial_scale=0.5)
    whole = np.empty(layer.tensors["weights"].size, np.float32)
    layer.initial("weights", whole, 7, 2, 0)
    part = np.empty(100, np.float32)
    layer.initial("weights", part, 7, 2, 333)
    np.testing.assert_array_equal(part, whole[333:433])
    assert whole.std() == pytest.approx(0.5 * np.sqrt(2 / (3 * 3 * 2)), rel=0.05)
    bias = np.full(10, np.nan)
    layer.initial("bias", bias, 7, 3, 0)
    assert not bias.any()


def test_operations_are_counted():
    layer = local((3, 100, 100), 8, (10, 10))
    whole = Box.whole(layer.output_shape)
    assert layer.flops(whole, 32) == 6 * 8 * 91 * 91 * 300 * 32
    assert layer.flops(whole, 32, input_gradient=False) == 4 * 8 * 91 * 91 * 300 * 32


@pytest.mark.parametrize("shape", [(3, 9, 20), (3, 20, 9)])
def test_a_field_larger_than_its_inputs_is_refused(shape):
    with pytest.raises(UserError, match=r"layer 'third'.*field of shape \(10, 10\).*" + re.escape(str(shape))):
        local(shape, 8, (10, 10), name="third")


def test_inputs_without_rows_and_columns_are_refused():
    with pytest.raises(UserError, match=r"layer 'local1'.*\(maps, height, width\).*\(784,\)"):
        local((784,), 8, (10, 10), name="local1")
