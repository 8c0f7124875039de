"""Networks of the precision bfloat16: each layer against a naive twin, which rounds and multiplies in float64."""

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from unit.layer_checks import CONTEXT, parameters_of
from unit.test_bfloat16 import nearest, rounded
from unit.test_local import FUNCTIONS

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.kernels import bfloat16, bfloat16_convolution
from dbmpi.kernels.convolution import Tied
from dbmpi.kernels.local import Untied
from dbmpi.network import field
from dbmpi.network.dense import DenseLayer
from dbmpi.network.field import ConvolutionLayer, LocalLayer
from dbmpi.network.layer import BIAS, Backward, Forward, takes_bfloat16
from dbmpi.objective import Batch
from dbmpi.replica.trial import try_layer
from dbmpi.replica.whole import WholeNetwork

pytestmark = pytest.mark.timeout(240)  # kernels are compiled for every number of maps

MAPS = (1, 3, 11)
CHANNELS = (1, 2, 6)


@st.composite
def layers(draw):
    kind = draw(st.sampled_from([DenseLayer, LocalLayer, ConvolutionLayer]))
    activation = draw(st.sampled_from(tuple(FUNCTIONS)))
    if kind is DenseLayer:
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        return DenseLayer("one", shape, config.Dense(units=draw(st.integers(1, 40)), activation=activation))
    field = (draw(st.integers(1, 3)), draw(st.sampled_from((1, 3))))
    shape = (draw(st.sampled_from(CHANNELS)), *(window + draw(st.integers(0, 5)) for window in field))
    settings = {"maps": draw(st.sampled_from(MAPS)), "field": field, "stride": draw(st.integers(1, 3))}
    if kind is LocalLayer:
        return LocalLayer("one", shape, config.Local(activation=activation, **settings))
    return ConvolutionLayer("one", shape, config.Convolution(activation=activation, **settings))


def sums_of(layer, weights, inputs):
    """Return ``W x`` in float64."""
    if isinstance(layer, DenseLayer):
        return weights @ inputs.reshape(-1, inputs.shape[-1])
    sums = np.empty((*layer.output_shape, inputs.shape[-1]))
    for (i, j), covered in fields(layer):
        sums[:, i, j] = np.einsum("mcuv,cuvb->mb", of_position(layer, weights, i, j), inputs[covered])
    return sums


def fields(layer):
    """Yield each position of the outputs, and where its field is in the inputs."""
    (rows, columns), stride = layer.field, layer.section.stride
    for i in range(layer.output_shape[1]):
        for j in range(layer.output_shape[2]):
            yield (i, j), np.s_[:, i * stride : i * stride + rows, j * stride : j * stride + columns]


def of_position(layer, weights, i, j):
    """Return the filters (maps, channels, rows, columns) of a position; a view."""
    return weights if isinstance(layer, ConvolutionLayer) else weights[i, j].transpose(0, 3, 1, 2)


def transposed_sums(layer, weights, gradient, shape):
    """Return ``W' g`` in float64."""
    if isinstance(layer, DenseLayer):
        return (weights.T @ gradient).reshape(shape)
    below = np.zeros(shape)
    for (i, j), covered in fields(layer):
        below[covered] += np.einsum("mcuv,mb->cuvb", of_position(layer, weights, i, j), gradient[:, i, j])
    return below


def outer_products(layer, gradient, inputs):
    """Return ``g x'`` in float64."""
    if isinstance(layer, DenseLayer):
        return gradient @ inputs.reshape(-1, inputs.shape[-1]).T
    result = np.zeros(layer.tensors["weights"].shape)
    for (i, j), covered in fields(layer):
        of_position(layer, result, i, j)[...] += np.einsum("mb,cuvb->mcuv", gradient[:, i, j], inputs[covered])
    return result


def close(found, expected, bound, terms):
    """Whether sums of so many exact products were added up in float32; `bound` is the sum of their magnitudes."""
    return (np.abs(found - expected) <= 2.0**-23 * (terms + 4) * bound + 1e-30).all()


def by_matrices(monkeypatch, chosen):
    """Let all convolutions be products of matrices, or none."""
    monkeypatch.setattr(field, "pays", lambda filters, shape: chosen and filters.tied)
    monkeypatch.setattr(bfloat16_convolution, "MAPS_BACKWARD", 1)


@pytest.mark.parametrize("as_matrices", [False, True])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layer=layers(), samples=st.integers(1, 20), seed=st.integers(0, 99), block=st.sampled_from([1, 300, 1 << 19]))
def test_layers_against_a_naive_twin(monkeypatch, as_matrices, layer, samples, seed, block):
    by_matrices(monkeypatch, as_matrices)
    monkeypatch.setattr(bfloat16_convolution, "BLOCK", block)
    random = np.random.default_rng(seed)
    parameters = parameters_of(layer, np.float32, seed)
    inputs = random.normal(size=(*layer.input_shape, samples)).astype(np.float32)
    of_outputs = random.normal(size=(*layer.output_shape, samples)).astype(np.float32)
    half = {short: values if short == BIAS else rounded(values)[0] for short, values in parameters.items()}
    outputs, gradient, below = np.empty_like(of_outputs), of_outputs.copy(), np.full_like(inputs, np.nan)
    of_parameters = {short: np.full_like(values, np.nan) for short, values in parameters.items()}
    described = (Box.whole(layer.output_shape), half, rounded(inputs)[0], outputs, CONTEXT)
    layer.forward(Forward(*described))
    memory = np.empty(of_outputs.shape, np.uint16)
    layer.backward(Backward(*described, gradient, of_parameters, below, rounded_gradient=memory))

    function, derivative = FUNCTIONS[layer.section.activation]
    weights, x = nearest(parameters["weights"]), nearest(inputs)
    bias = np.moveaxis(parameters["bias"].astype(np.float64), -1, 0)
    bias = bias.reshape(bias.shape + (1,) * (outputs.ndim - bias.ndim))
    depth = layer.inputs
    size = sums_of(layer, np.abs(weights), np.abs(x)) + np.abs(bias)
    assert close(outputs, function(sums_of(layer, weights, x) + bias), size + 1, depth)
    np.testing.assert_allclose(gradient, of_outputs * derivative(outputs.astype(np.float64)), rtol=1e-5, atol=1e-5)
    exact, g = gradient.astype(np.float64), nearest(gradient)
    count = int(np.prod(outputs.shape))
    assert close(below, *(transposed_sums(layer, f(weights), f(g), inputs.shape) for f in (np.array, np.abs)), count)
    found = of_parameters["weights"]
    assert close(found, *(outer_products(layer, f(g), f(x)) for f in (np.array, np.abs)), count)
    axes = (-1,) if isinstance(layer, LocalLayer) else tuple(range(1, outputs.ndim))
    of_bias = [np.moveaxis(f(exact).sum(axis=axes), 0, -1) for f in (np.array, np.abs)]
    assert close(of_parameters["bias"], *of_bias, count)


def network(layers, shape, precision="bfloat16", loss="softmax", dtype=np.float32, targets="classes"):
    section = config.NetworkSection(layers=tuple(layers), precision=precision, loss=loss)
    return WholeNetwork(section, shape, 3, dtype, targets)


def initial(net):
    parameters = np.empty(net.size, np.float32)
    net.initial(0, parameters)
    return parameters


STACKS = {
    "dense": ((20,), [config.Dense(units=30, activation="tanh"), config.Dense(units=5)]),
    "images": (
        (2, 9, 8),
        [
            config.Convolution(maps=3, field=3, activation="relu"),
            config.Pooling(size=2),
            config.Local(maps=3, field=3, activation="sigmoid"),
            config.Normalisation(window=3),
            config.Dropout(rate=0.3),
            config.Dense(units=5),
        ],
    ),
}


def batch_for(net, samples, seed=1):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(*net.input_shape, samples)).astype(np.float32)
    return Batch(inputs, random.integers(0, net.outputs, samples).astype(np.int32))


@pytest.mark.parametrize("name", STACKS)
def test_a_network_differs_from_float32_by_rounding_and_no_more(name):
    shape, layers = STACKS[name]
    nets = [network(layers, shape, precision) for precision in ("float32", "bfloat16")]
    parameters = initial(nets[0])
    batch = batch_for(nets[0], 40)
    gradients = [np.empty_like(parameters) for _ in nets]
    losses = [
        net.loss_and_gradient(parameters, batch, gradient).loss / 40
        for net, gradient in zip(nets, gradients, strict=True)
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    difference = np.linalg.norm(gradients[1] - gradients[0]) / np.linalg.norm(gradients[0])
    assert 1e-4 < difference < 0.03


def test_gradients_that_accrue_add_up():
    net = network(STACKS["dense"][1], (20,))
    parameters, batches = initial(net), [batch_for(net, 17, seed) for seed in (1, 2)]
    alone = [np.empty_like(parameters) for _ in batches]
    total = np.empty_like(parameters)
    for number, batch in enumerate(batches):
        net.loss_and_gradient(parameters, batch, alone[number])
        net.loss_and_gradient(parameters, batch, total, add=number > 0, changed=number == 0)
    np.testing.assert_allclose(total, alone[0] + alone[1], rtol=1e-5, atol=1e-6)


def test_weights_are_rounded_once_for_each_change_of_the_parameters(monkeypatch):
    net = network(STACKS["dense"][1], (20,))
    parameters, batch = initial(net), batch_for(net, 7)
    gradient, shapes = np.empty_like(parameters), []
    original = bfloat16.rounded
    monkeypatch.setattr(bfloat16, "rounded", lambda values, out: (shapes.append(values.shape), original(values, out)))

    def weights_rounded():
        count = sum(shape in {(30, 20), (5, 30)} for shape in shapes)
        shapes.clear()
        return count

    net.loss_and_gradient(parameters, batch, gradient)
    assert weights_rounded() == 2
    first = net.evaluate(parameters, batch, changed=False)
    net.loss_and_gradient(parameters, batch, gradient, changed=False)
    assert weights_rounded() == 0
    others = parameters * np.float32(1.5)
    assert net.evaluate(others, batch, changed=False).loss != first.loss  # another array
    assert weights_rounded() == 2
    parameters *= np.float32(1.5)
    assert net.evaluate(parameters, batch).loss == net.evaluate(others, batch).loss


def test_weights_that_change_in_a_step_are_those_of_its_beginning():
    net = network(STACKS["dense"][1], (20,))
    parameters, batch = initial(net), batch_for(net, 7)
    expected, gradient = np.empty_like(parameters), np.empty_like(parameters)
    net.loss_and_gradient(parameters, batch, expected)
    changing = parameters.copy()

    def applied(layer):
        if layer == 1:
            changing[...] = 0  # as a shard may do where a worker computes on its memory

    net.loss_and_gradient(changing, batch, gradient, applied)
    np.testing.assert_array_equal(gradient, expected)


def test_float64_is_refused():
    with pytest.raises(UserError, match="bfloat16' rounds float32 parameters, and these are float64"):
        network(STACKS["dense"][1], (20,), dtype=np.float64)


def test_layers_without_products_stay_in_float32():
    shape, layers = STACKS["images"]
    net = network(layers, shape)
    assert net.rounded == (True, False, True, False, False, True)
    assert [takes_bfloat16(layer) for layer in net.layers] == list(net.rounded)
    assert not any(network(layers, shape, "float32").rounded)


@pytest.mark.parametrize("as_matrices", [False, True])
@pytest.mark.parametrize("kind", [config.Local, config.Convolution])
def test_reconstruction_against_float32(monkeypatch, kind, as_matrices):
    by_matrices(monkeypatch, as_matrices)
    layers = [kind(maps=3, field=3, reconstruction=0.5), config.Pooling(size=2, penalty=0.1)]
    nets = [network(layers, (2, 7, 8), precision, "reconstruction") for precision in ("float32", "bfloat16")]
    parameters = initial(nets[0])
    inputs = np.random.default_rng(1).normal(size=(2, 7, 8, 6)).astype(np.float32)
    batch = Batch(inputs, np.zeros(6, np.int32))
    gradients = [np.full_like(parameters, np.nan) for _ in nets]
    losses = [net.loss_and_gradient(parameters, batch, out).loss for net, out in zip(nets, gradients, strict=True)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    difference = np.linalg.norm(gradients[1] - gradients[0]) / np.linalg.norm(gradients[0])
    assert 1e-4 < difference < 0.03


def test_rounded_parameters_that_others_keep_are_used():
    net = network(STACKS["dense"][1], (20,))
    parameters, batch = initial(net), batch_for(net, 7)
    expected, gradient, half = np.empty_like(parameters), np.empty_like(parameters), rounded(parameters)[0]
    net.loss_and_gradient(parameters, batch, expected)
    net.keep_rounded(parameters, half)
    net.loss_and_gradient(parameters, batch, gradient)
    np.testing.assert_array_equal(gradient, expected)
    half[:] = rounded(2 * parameters)[0]  # another value shows that this is what is multiplied
    net.loss_and_gradient(parameters, batch, gradient)
    assert not np.array_equal(gradient, expected)
    others = parameters.copy()
    net.loss_and_gradient(others, batch, gradient)
    np.testing.assert_array_equal(gradient, expected)


def refused(table):
    with pytest.raises(ValidationError) as caught:
        config.Run.model_validate(table)
    return str(caught.value)


def test_what_has_no_products_cannot_be_told_how_to_multiply():
    assert "an objective of your own has its own arithmetic" in refused(
        {"network": {"precision": "bfloat16"}, "objective": {"use": "module:Class"}}
    )
    assert "'float32' or 'bfloat16'" in refused({"network": {"precision": "float16"}})


class Doubling:
    """An own layer without weights that takes bfloat16: it is given uint16, and tried with it."""

    takes_bfloat16 = True
    tensors: ClassVar = {}

    def __init__(self, name, input_shape):
        self.name, self.input_shape, self.output_shape = name, input_shape, input_shape

    def input_box(self, output):
        return output

    def tensor_box(self, tensor, output):
        raise KeyError(tensor)

    def flops(self, output, samples, *, input_gradient=True):
        return output.size * samples

    def initial(self, tensor, out, seed, number, start):
        raise KeyError(tensor)

    def forward(self, task):
        bfloat16.widened(task.inputs, task.outputs)
        task.outputs *= 2

    def backward(self, task):
        if task.input_gradient is not None:
            np.multiply(task.gradient, 2, out=task.input_gradient)


def test_a_layer_of_ones_own_may_take_bfloat16():
    layer = Doubling("own", (3,))
    try_layer(layer, np.dtype(np.float32), rounded=True)
    section = config.NetworkSection.model_validate(
        {"layers": [{"type": "any:Doubling"}, {"units": 3}], "precision": "bfloat16"}
    )
    net = WholeNetwork(section, (3,), 1, load=lambda kind, layer: Doubling)
    assert net.rounded == (True, True)
    plain = network([config.Dense(units=3)], (3,), "bfloat16")
    parameters, batch = initial(net), batch_for(net, 4)
    doubled = batch._replace(inputs=2 * nearest(batch.inputs).astype(np.float32))
    assert net.evaluate(parameters, batch) == plain.evaluate(parameters, doubled)


def test_convolutions_are_products_of_matrices_where_that_pays(monkeypatch):
    def chosen(engine, *shape, tied=True):
        monkeypatch.setattr(bfloat16, "engine", lambda: engine)
        return bfloat16_convolution.pays((Tied if tied else Untied)(1), shape)

    assert chosen("amx", 32, 16, 4, 4)
    assert chosen("avx512_bf16", 64, 32, 3, 3)
    assert not chosen("float32", 32, 16, 4, 4)
    assert not chosen("amx", 31, 16, 4, 4)
    assert not chosen("amx", 32, 3, 5, 5)
    assert not chosen("amx", 5, 5, 32, 16, 4, 4, tied=False)
