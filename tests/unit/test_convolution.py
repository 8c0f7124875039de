"""Convolutions against SciPy's, finite differences, and themselves in pieces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from unit.layer_checks import check_cuts, check_gradients, parameters_of, run
from unit.test_local import FUNCTIONS, VARIANTS, a_corner_of, assert_close, naive, variants

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.kernels import convolution
from dbmpi.network.field import ConvolutionLayer, LocalLayer

pytestmark = pytest.mark.timeout(240)  # kernels are compiled for every number of maps


def convolved(shape, maps, field, stride=1, name="convolution", **settings):
    return ConvolutionLayer(name, shape, config.Convolution(maps=maps, field=field, stride=stride, **settings))


@st.composite
def layers(draw, maps, activations=tuple(FUNCTIONS)):
    field = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    shape = (draw(st.integers(1, 5)), *(window + draw(st.integers(0, 6)) for window in field))
    stride, activation = draw(st.integers(1, 5)), draw(st.sampled_from(activations))
    return convolved(shape, draw(st.sampled_from(maps)), field, stride, activation=activation)


def scipy_convolution(layer, inputs, parameters):
    """Return the outputs by SciPy's correlation of each channel and sample, in float64."""
    _, height, width = layer.output_shape
    outputs = np.empty((*layer.output_shape, inputs.shape[-1]))
    for m in range(layer.section.maps):
        for sample in range(inputs.shape[-1]):
            everywhere = sum(
                signal.correlate2d(inputs[c, ..., sample], parameters["weights"][m, c], mode="valid")
                for c in range(layer.input_shape[0])
            )
            outputs[m, ..., sample] = everywhere[:: layer.section.stride, :: layer.section.stride][:height, :width]
    return FUNCTIONS[layer.section.activation][0](outputs + parameters["bias"][:, None, None, None])


@settings(max_examples=25)
@given(variants(layers), st.integers(1, 20), st.integers(0, 99))
def test_outputs_are_scipys(variant, samples, seed):
    layer, dtype = variant
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(*layer.input_shape, samples)).astype(dtype)
    parameters = parameters_of(layer, dtype, seed)
    outputs, _, _ = run(layer, inputs, None, parameters)
    exact = {short: values.astype(np.float64) for short, values in parameters.items()}
    assert_close(outputs, scipy_convolution(layer, inputs.astype(np.float64), exact), dtype)


@settings(max_examples=25)
@given(variants(layers), st.integers(1, 70), st.integers(0, 99))
def test_it_is_a_local_layer_whose_filters_are_all_the_same(variant, samples, seed):
    layer, dtype = variant
    check_against_local(layer, samples, dtype, seed)


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_longer_than_one_pass_are_summed_in_several(stride):
    layer = convolved((2, 7, 45), 3, (3, 3), stride)
    assert layer.output_shape[2] * 67 > convolution.PIECE
    check_against_local(layer, 67, np.float32, 1)


@pytest.mark.parametrize("samples", [19, 61])
def test_the_inputs_gradient_of_many_channels_is_gathered(samples):
    """In blocks with two vectors of samples, and with four."""
    layer = convolved((11, 8, 9), 3, (3, 2))
    assert layer.input_shape[0] >= convolution._GATHERED
    check_against_local(layer, samples, np.float32, 1)


def check_against_local(layer, samples, dtype, seed):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(*layer.input_shape, samples)).astype(dtype)
    parameters = parameters_of(layer, dtype, seed)
    gradient = random.normal(size=(*layer.output_shape, samples)).astype(dtype)
    section = layer.section.model_dump(exclude={"type"})
    untied = LocalLayer("local", layer.input_shape, config.Local(**section))
    places = layer.output_shape[1:]
    repeated = {
        "weights": np.tile(parameters["weights"].transpose(0, 2, 3, 1), (*places, 1, 1, 1, 1)),
        "bias": np.tile(parameters["bias"], (*places, 1)),
    }
    outputs, below, of_parameters = run(layer, inputs, gradient.copy(), parameters)
    expected = naive(untied, inputs, repeated, gradient)
    used = layer.input_box(Box.whole(layer.output_shape)).slices()
    assert_close(outputs, expected[0], dtype)
    assert_close(below, expected[1][used], dtype)
    sums = {short: values.sum(axis=(0, 1)) for short, values in expected[2].items()}
    scale = np.sqrt(gradient[0].size)  # of a sum of so many values of either sign
    assert_close(of_parameters["weights"], sums["weights"].transpose(0, 3, 1, 2), dtype, scale)
    assert_close(of_parameters["bias"], sums["bias"], dtype, scale)


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
def test_outputs_do_not_depend_on_the_box_by_a_bit(layer, samples, seed):
    inputs = np.random.default_rng(seed).normal(size=(*layer.input_shape, samples)).astype(np.float32)
    parameters = parameters_of(layer, np.float32, seed)
    outputs, _, _ = run(layer, inputs, None, parameters)
    box = a_corner_of(layer)
    part, _, _ = run(layer, inputs, None, parameters, box)
    np.testing.assert_array_equal(part, outputs[box.slices()])


def test_many_rows_are_summed_in_bands():
    layer = convolved((2, 3 * convolution.BANDS, 9), 3, (3, 3))
    inputs = np.random.default_rng(1).normal(size=(*layer.input_shape, 20))
    _, _, of_parameters = run(layer, inputs, None, parameters_of(layer, np.float64))
    rows, columns = (length - 2 for length in layer.input_shape[1:])
    expected = [[inputs[c, u : u + rows, v : v + columns].sum() for u in range(3) for v in range(3)] for c in range(2)]
    for of_map in of_parameters["weights"]:
        np.testing.assert_allclose(of_map.reshape(2, 9), expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(of_parameters["bias"], rows * columns * 20)


def test_the_configuration_describes_it():
    layer = convolved((3, 9, 8), 4, (3, 2), 2)
    assert layer.output_shape == (4, 4, 4)
    assert {short: tensor.shape for short, tensor in layer.tensors.items()} == {
        "weights": (4, 3, 3, 2),
        "bias": (4,),
    }


def test_initial_weights_are_those_of_their_place_and_biases_zero():
    layer = convolved((30, 9, 8), 14, (3, 2))
    whole = np.empty(layer.tensors["weights"].size, np.float32)
    layer.initial("weights", whole, 7, 2, 0)
    part = np.empty(100, np.float32)
    layer.initial("weights", part, 7, 2, 333)
    np.testing.assert_array_equal(part, whole[333:433])
    assert whole.std() == pytest.approx(np.sqrt(1 / (30 * 3 * 2)), rel=0.05)
    bias = np.full(10, np.nan)
    layer.initial("bias", bias, 7, 3, 0)
    assert not bias.any()


def test_operations_are_counted():
    layer = convolved((3, 100, 100), 8, (10, 10))
    whole = Box.whole(layer.output_shape)
    assert layer.flops(whole, 32) == 6 * 8 * 91 * 91 * 300 * 32


def test_a_field_larger_than_its_inputs_is_refused():
    with pytest.raises(UserError, match=r"layer 'second'.*field of shape \(5, 6\).*\(3, 20, 5\)"):
        convolved((3, 20, 5), 8, (5, 6), name="second")
