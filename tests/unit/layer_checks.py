"""What every layer must do: its gradients are those of its outputs, and its pieces make the whole."""

from itertools import pairwise, product

import numpy as np
from hypothesis import strategies as st

from dbmpi.index.boxes import Box
from dbmpi.network.layer import Backward, Context, Forward, takes_parts

CONTEXT = Context(training=True, seed=5, step=3)
PRECISION = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-12}


def parameters_of(layer, dtype, seed=0):
    random = np.random.default_rng(seed)
    return {short: random.normal(size=tensor.shape).astype(dtype) for short, tensor in layer.tensors.items()}


def run(layer, inputs, gradient=None, parameters=None, box=None, context=CONTEXT):
    """Return the outputs of a box, the gradient of its inputs and those of its parameters.

    The layer is given whole `inputs` and `parameters`, sees of them what it asks for, and finds NaN in every result.
    `gradient` is that of the box, by default ones.
    """
    box = Box.whole(layer.output_shape) if box is None else box
    needed = layer.input_box(box)
    assert Box.whole(layer.input_shape).holds(needed), needed
    mine = np.ascontiguousarray(inputs[needed.slices()])
    parts = {
        short: np.ascontiguousarray(values[layer.tensor_box(short, box).slices()])
        for short, values in (parameters or {}).items()
    }
    before = [array.copy() for array in (mine, *parts.values())]
    outputs, passed = (around(layer, (*box.shape, inputs.shape[-1]), inputs.dtype) for _ in range(2))
    layer.forward(Forward(box, parts, mine, outputs, context))
    passed[...] = 1 if gradient is None else gradient
    input_gradient = np.full_like(mine, np.nan)
    parameter_gradient = {short: np.full_like(values, np.nan) for short, values in parts.items()}
    layer.backward(Backward(box, parts, mine, outputs, context, passed, parameter_gradient, input_gradient))
    for array, copy in zip((mine, *parts.values()), before, strict=True):
        np.testing.assert_array_equal(array, copy)  # what a layer is given to read it does not change
    for array in (outputs, passed):
        if array.base is not None:
            assert np.isnan(array.base).sum() == np.isnan(array).sum() + array.base.size - array.size
    return outputs, input_gradient, parameter_gradient


def around(layer, shape, dtype):
    """Return an array of NaN; where a layer takes parts, of a larger array: as if halos were around it."""
    if not takes_parts(layer):
        return np.full(shape, np.nan, dtype)
    maps, rows, columns, samples = shape
    return np.full((maps + 1, rows + 3, columns + 2, samples), np.nan, dtype)[1:, 2:-1, 1:-1]


def check_gradients(layer, samples, seed, spread=1.0, tolerance=1e-6):
    """Compare the gradient in random directions with central differences, in float64."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(*layer.input_shape, samples)) * spread
    parameters = parameters_of(layer, np.float64, seed)
    weights = random.normal(size=(*layer.output_shape, samples))
    _, input_gradient, parameter_gradient = run(layer, inputs, weights.copy(), parameters)
    needed = layer.input_box(Box.whole(layer.output_shape)).slices()

    def loss(moved):
        outputs = np.empty(weights.shape)
        values, seen = dict(zip(parameters, moved[1:], strict=True)), np.ascontiguousarray(moved[0][needed])
        layer.forward(Forward(Box.whole(layer.output_shape), values, seen, outputs, CONTEXT))
        return float((outputs * weights).sum())

    points = [inputs, *parameters.values()]
    whole = np.zeros_like(inputs)
    whole[needed] = input_gradient
    gradients = [whole, *parameter_gradient.values()]
    step = 1e-6 * spread
    for changed in range(len(points)):
        single = np.zeros_like(points[changed])
        single.flat[random.integers(single.size)] = 1
        for direction in (single, random.normal(size=single.shape)):
            values = []
            for sign in (1, -1):
                moved = list(points)
                moved[changed] = points[changed] + sign * step * direction
                values.append(loss(moved))
            expected = (values[0] - values[1]) / (2 * step)
            found = float((gradients[changed] * direction).sum())
            scale = float((np.abs(gradients[changed]) * np.abs(direction)).sum()) + 1e-3 * float(np.abs(weights).sum())
            assert abs(found - expected) <= tolerance * scale, (changed, found, expected)


def check_cuts(layer, samples, dtype, data, amplified=0.0):
    """Cut the outputs along every axis at places that `data` draws: same outputs, gradients that add up.

    What rounding leaves of gradients that cancel may be `amplified` by so much.
    """
    random = np.random.default_rng(data.draw(st.integers(0, 999), "seed"))
    inputs = random.normal(size=(*layer.input_shape, samples)).astype(dtype)
    parameters = parameters_of(layer, dtype)
    gradient = random.normal(size=(*layer.output_shape, samples)).astype(dtype)
    outputs, input_gradient, parameter_gradient = run(layer, inputs, gradient.copy(), parameters)

    pieces = np.full_like(outputs, np.nan)
    added = np.zeros((*layer.input_shape, samples))
    added_parameters = {short: np.zeros(values.shape) for short, values in parameters.items()}
    edges = [
        [0, *sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=2))), length] if length > 1 else [0, 1]
        for length in layer.output_shape
    ]
    for intervals in product(*(list(pairwise(axis)) for axis in edges)):
        box = Box(tuple(start for start, _ in intervals), tuple(stop for _, stop in intervals))
        part = np.ascontiguousarray(gradient[box.slices()])
        pieces[box.slices()], below, of_parameters = run(layer, inputs, part, parameters, box)
        added[layer.input_box(box).slices()] += below
        for short, values in of_parameters.items():
            added_parameters[short][layer.tensor_box(short, box).slices()] += values

    precision = PRECISION[np.dtype(dtype)]
    np.testing.assert_allclose(pieces, outputs, rtol=precision, atol=precision * np.abs(outputs).max())
    needed = layer.input_box(Box.whole(layer.output_shape))
    whole = np.zeros_like(added)
    whole[needed.slices()] = input_gradient
    left = amplified * np.finfo(dtype).eps * np.abs(gradient).max()
    np.testing.assert_allclose(added, whole, rtol=precision, atol=max(precision * np.abs(whole).max(), left))
    for short, values in parameter_gradient.items():
        np.testing.assert_allclose(added_parameters[short], values, atol=precision * np.abs(values).max())
