"""Local contrast normalisation against SciPy, finite differences, and itself in pieces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.signal.windows import gaussian
from unit.layer_checks import check_cuts, check_gradients, run

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.network.normalisation import NormalisationLayer

FLOORS = st.sampled_from([0.01, 0.8, 100.0])
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def normalisation(shape, window=5, floor=0.01, name="lcn"):
    return NormalisationLayer(name, shape, config.Normalisation(window=window, floor=floor))


LAYERS = st.builds(normalisation, SHAPES, st.sampled_from([1, 3, 5]), FLOORS)


def normalised(inputs, window, floor):
    """Return what SciPy's correlation with a two-dimensional window makes of (maps, height, width, samples)."""
    single = gaussian(window, window / 4)
    weights = np.outer(single, single)[np.newaxis, :, :, np.newaxis]

    def local_mean(values):  # over all maps and what of the window lies within the image
        maps = values.mean(axis=0, keepdims=True)
        inside = ndimage.correlate(np.ones_like(maps), weights, mode="constant")
        return ndimage.correlate(maps, weights, mode="constant") / inside

    centred = inputs - local_mean(inputs)
    return centred / np.maximum(floor, np.sqrt(local_mean(centred**2)))


@settings(max_examples=25)
@given(LAYERS, st.integers(1, 4), st.sampled_from([np.float32, np.float64]), st.integers(0, 99))
def test_outputs_are_those_of_scipy(layer, samples, dtype, seed):
    inputs = np.random.default_rng(seed).normal(1.0, 1.0, size=(*layer.input_shape, samples)).astype(dtype)
    outputs, _, _ = run(layer, inputs)
    expected = normalised(inputs.astype(np.float64), layer.section.window, layer.section.floor)
    if layer.input_shape[0] * layer.section.window == 1 or layer.input_shape == (1, 1, 1):
        expected[:] = 0  # a value minus itself, where SciPy's rounding is not ours
    precision = 1e-12 if dtype == np.float64 else 2e-5 / min(layer.section.floor, 1)
    np.testing.assert_allclose(outputs, expected, rtol=precision, atol=precision)


@settings(max_examples=15)
@given(LAYERS, st.integers(0, 99))
def test_gradients_are_finite_differences(layer, seed):
    check_gradients(layer, 2, seed, tolerance=1e-5)


@settings(max_examples=25)
@given(LAYERS, st.sampled_from([np.float32, np.float64]), st.data())
def test_pieces_make_the_whole(layer, dtype, data):
    check_cuts(layer, 3, dtype, data, amplified=4 / layer.section.floor)


@pytest.mark.parametrize("window", [1, 3, 5, 7])
def test_the_inputs_asked_for_are_those_that_outputs_depend_on(window):
    layer = normalisation((2, 15, 14), window, 1e-6)
    inputs = np.random.default_rng(1).normal(size=(2, 15, 14, 1))
    for place in ((0, 7, 7), (1, 0, 0), (0, 14, 3)):
        box = Box(place, tuple(index + 1 for index in place))
        _, gradient, _ = run(layer, inputs, box=box)
        # every row, every column and every map of the box counts, and only its corners may be out of reach
        assert (gradient != 0).any(axis=(1, 2)).all()
        assert (gradient != 0).any(axis=(0, 2)).all()
        assert (gradient != 0).any(axis=(0, 1)).all()
        needed = layer.input_box(box)
        others = np.random.default_rng(2).normal(size=inputs.shape)
        others[needed.slices()] = inputs[needed.slices()]
        near = normalised(others, window, layer.section.floor)[place]
        np.testing.assert_allclose(near, normalised(inputs, window, layer.section.floor)[place], rtol=1e-12)


def test_constant_inputs_give_zero_up_to_the_borders():
    outputs, _, _ = run(normalisation((3, 8, 7), 5, 0.01), np.full((3, 8, 7, 2), 5.0))
    np.testing.assert_allclose(outputs, 0, atol=1e-10)


def test_local_deviation_becomes_one():
    inputs = 30 * np.random.default_rng(1).normal(size=(4, 40, 40, 2)) + np.linspace(0, 500, 40)[:, None, None]
    outputs, _, _ = run(normalisation((4, 40, 40)), inputs)
    assert outputs[:, 5:-5].std() == pytest.approx(1, abs=0.05)
    assert abs(outputs[:, 5:-5].mean()) < 0.01


def test_a_layer_is_made_of_its_description():
    layer = normalisation((4, 9, 9), window=7)
    assert layer.output_shape == (4, 9, 9)
    assert layer.input_box(Box((1, 7, 8), (2, 8, 9))) == Box((0, 1, 2), (4, 9, 9))
    assert not layer.tensors
    with pytest.raises(ValueError, match="odd"):
        config.Normalisation(window=4)


def test_inputs_without_rows_and_columns_are_refused():
    with pytest.raises(UserError, match=r"'flat'.*\(100,\)"):
        normalisation((100,), name="flat")


def naive_gradient(layer, inputs, gradient):
    """Return the inputs' gradient by the transposed matrix of each step, in float64, for one sample."""
    shape, size = layer.input_shape, int(np.prod(layer.input_shape))
    single = gaussian(layer.section.window, layer.section.window / 4)
    weights, radius = np.outer(single, single), layer.section.window // 2
    mean = np.zeros((*shape[1:], *shape))
    for row, column in np.ndindex(shape[1:]):
        for v, u in np.ndindex(weights.shape):
            y, x = row + v - radius, column + u - radius
            if 0 <= y < shape[1] and 0 <= x < shape[2]:
                mean[row, column, :, y, x] = weights[v, u]
        mean[row, column] /= mean[row, column].sum()
    mean = np.tile(mean.reshape(-1, size), (shape[0], 1))
    centre = np.eye(size) - mean
    centred = centre @ inputs.reshape(-1)
    root = np.sqrt(mean @ centred**2)
    divisor = np.maximum(root, layer.section.floor)
    quotient = gradient.reshape(-1) / divisor
    of_squares = np.where(root > layer.section.floor, -quotient * (centred / divisor) / divisor, 0.0)
    return (centre.T @ (quotient + centred * (mean.T @ of_squares))).reshape(shape)


@pytest.mark.parametrize("magnitude", range(-30, 31, 5))
@pytest.mark.parametrize("floor", [0.01, 1e-28])
def test_it_holds_from_the_smallest_to_the_largest_inputs(magnitude, floor):
    """Squares of float32 overflow from 1.9e19 on and vanish below 1e-22, where the outputs are as large as ever."""
    layer, random = normalisation((2, 5, 6), 3, floor), np.random.default_rng(3)
    scales = np.array([10.0**magnitude, 1.0])
    inputs = (random.normal(size=(2, 5, 6, 2)) * scales).astype(np.float32)
    gradient = random.normal(size=inputs.shape).astype(np.float32)
    outputs, input_gradient, _ = run(layer, inputs, gradient)
    np.testing.assert_allclose(outputs, normalised(inputs.astype(np.float64), 3, floor), rtol=1e-5, atol=1e-28)
    for sample in range(2):
        expected = naive_gradient(layer, inputs[..., sample].astype(np.float64), gradient[..., sample])
        largest = np.abs(expected).max()
        np.testing.assert_allclose(input_gradient[..., sample] / largest, expected / largest, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_shows(value):
    inputs = np.random.default_rng(1).normal(size=(1, 5, 5, 2)).astype(np.float32)
    inputs[0, 2, 2, 1] = value
    outputs, _, _ = run(normalisation((1, 5, 5), 3), inputs)
    assert np.isfinite(outputs[..., 0]).all()
    assert not np.isfinite(outputs[..., 1]).any()
