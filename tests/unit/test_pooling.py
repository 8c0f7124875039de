"""Pooling against SciPy's filters, finite differences, and itself in pieces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from unit.layer_checks import check_cuts, check_gradients, run

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.network.pooling import EPSILON, PoolingLayer

KINDS = ("l2", "average", "max")


def pooling(shape, kind, size, stride=1, name="pool"):
    return PoolingLayer(name, shape, config.Pooling(kind=kind, size=size, stride=stride))


@st.composite
def layers(draw):
    size = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    shape = (draw(st.integers(1, 3)), *(window + draw(st.integers(0, 6)) for window in size))
    return pooling(shape, draw(st.sampled_from(KINDS)), size, draw(st.integers(1, 5)))


def scipy_pooling(layer, inputs):
    rows, columns = layer.size
    # `origin` moves the window so that it starts at its output's place
    window = {"size": (1, rows, columns, 1), "origin": (0, -(rows // 2), -(columns // 2), 0)}
    if layer.section.kind == "max":
        everywhere = ndimage.maximum_filter(inputs, **window)
    else:
        values = inputs**2 if layer.section.kind == "l2" else inputs
        everywhere = ndimage.uniform_filter(values, **window)
        if layer.section.kind == "l2":
            everywhere = np.sqrt(EPSILON + rows * columns * everywhere)
    _, height, width = layer.output_shape
    return everywhere[:, :: layer.section.stride, :: layer.section.stride][:, :height, :width]


@settings(max_examples=25)
@given(layers(), st.integers(1, 5), st.sampled_from([np.float32, np.float64]), st.integers(0, 99))
def test_pooling_is_scipys_filter_at_every_stride(layer, samples, dtype, seed):
    inputs = np.random.default_rng(seed).normal(size=(*layer.input_shape, samples)).astype(dtype)
    outputs, _, _ = run(layer, inputs)
    expected = scipy_pooling(layer, inputs.astype(np.float64))
    np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-6 if dtype == np.float32 else 1e-12)


@settings(max_examples=15)
@given(layers(), st.integers(0, 99))
def test_gradients_are_finite_differences(layer, seed):
    check_gradients(layer, 2, seed)


@settings(max_examples=25)
@given(layers(), st.sampled_from([np.float32, np.float64]), st.data())
def test_pieces_make_the_whole(layer, dtype, data):
    check_cuts(layer, 3, dtype, data)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gradient_goes_to_the_first_maximum_in_the_order_of_the_window(dtype):
    layer = pooling((1, 2, 3), "max", (2, 2))
    inputs = np.array([[[0, 5, 5], [5, 5, 1]]], dtype)[..., np.newaxis]
    outputs, input_gradient, _ = run(layer, inputs, np.array([[[1, 10]]], dtype)[..., np.newaxis])
    np.testing.assert_array_equal(outputs[0, 0, :, 0], [5, 5])
    np.testing.assert_array_equal(input_gradient[0, :, :, 0], [[0, 11, 0], [0, 0, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_is_passed_on_to_the_windows_that_hold_it(kind):
    inputs = np.zeros((1, 3, 4, 40), np.float32)
    inputs[0, 1, 1, 7] = np.nan
    outputs, input_gradient, _ = run(pooling((1, 3, 4), kind, (2, 2)), inputs)
    lost = np.isnan(outputs)
    assert lost[0, :, :2, 7].all()
    assert lost.sum() == 4
    if kind == "max":  # and its gradient comes back to it
        assert input_gradient[0, 1, 1, 7] == 4
        assert input_gradient.sum() == outputs.size


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_all_inputs_are_zero(kind):
    layer = pooling((2, 4, 4), kind, (3, 3))
    _, input_gradient, _ = run(layer, np.zeros((2, 4, 4, 3)))
    assert np.isfinite(input_gradient).all()


def test_a_layer_is_made_of_its_description():
    assert pooling((4, 9, 9), "max", 3, 2).output_shape == (4, 4, 4)
    layer = PoolingLayer("p", (4, 9, 9), config.Pooling(size=(5, 2), penalty=0.5))
    assert layer.output_shape == (4, 5, 8)
    assert layer.penalty == 0.5
    assert not layer.tensors


def test_what_does_not_fit_is_refused_with_its_name_and_both_shapes():
    with pytest.raises(UserError, match=r"'small'.*\(3, 3\).*\(8, 2, 5\)"):
        pooling((8, 2, 5), "l2", (3, 3), name="small")
    with pytest.raises(UserError, match=r"'flat'.*\(100,\)"):
        pooling((100,), "l2", (3, 3), name="flat")


def naive_l2(layer, inputs, gradient):
    """Return outputs and inputs' gradient of L2 pooling, one window after another, in float64."""
    (rows, columns), stride = layer.size, layer.section.stride
    outputs, input_gradient = np.empty((*layer.output_shape, inputs.shape[-1])), np.zeros(inputs.shape)
    for place, row, column in np.ndindex(layer.output_shape):
        window = np.s_[place, row * stride : row * stride + rows, column * stride : column * stride + columns]
        outputs[place, row, column] = np.sqrt(EPSILON + (inputs[window] ** 2).sum(axis=(0, 1)))
        input_gradient[window] += inputs[window] * (gradient[place, row, column] / outputs[place, row, column])
    return outputs, input_gradient


@pytest.mark.parametrize("magnitude", range(-30, 31, 5))
@pytest.mark.parametrize(("size", "stride"), [((2, 3), 2), ((3, 1), 1), ((1, 1), 2)])
def test_l2_pooling_holds_from_the_smallest_to_the_largest_inputs(magnitude, size, stride):
    """Squares of float32 overflow from 1.9e19 on, and their root does not."""
    layer, random = pooling((2, 7, 8), "l2", size, stride), np.random.default_rng(4)
    inputs = random.normal(size=(2, 7, 8, 3)) * np.array([10.0**magnitude, 1.0, 1e-3])
    inputs, gradient = (values.astype(np.float32) for values in (inputs, random.normal(size=(*layer.output_shape, 3))))
    outputs, input_gradient, _ = run(layer, inputs, gradient)
    expected = naive_l2(layer, inputs.astype(np.float64), gradient.astype(np.float64))
    np.testing.assert_allclose(outputs, expected[0], rtol=1e-6)
    needed = expected[1][layer.input_box(Box.whole(layer.output_shape)).slices()]
    largest = np.abs(needed).max(axis=(0, 1, 2))
    np.testing.assert_allclose(input_gradient / largest, needed / largest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", [0, 6])
def test_one_large_input_among_small_ones_is_found_wherever_it_is(place):
    layer = pooling((1, 7, 7), "l2", (3, 3), 2)
    inputs = np.ones((1, 7, 7, 2), np.float32)
    inputs[0, place, 3, 1] = 1e25
    outputs, input_gradient, _ = run(layer, inputs)
    expected = naive_l2(layer, inputs.astype(np.float64), np.ones(outputs.shape))
    np.testing.assert_allclose(outputs, expected[0], rtol=1e-6)
    np.testing.assert_allclose(input_gradient, expected[1], rtol=1e-6)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_what_has_no_finite_root_shows(value):
    inputs = np.ones((1, 2, 2, 2), np.float32)
    inputs[..., 1] = value
    outputs, _, _ = run(pooling((1, 2, 2), "l2", (2, 2), 1), inputs)
    assert np.isfinite(outputs[..., 0]).all()
    assert not np.isfinite(outputs[..., 1]).any()
