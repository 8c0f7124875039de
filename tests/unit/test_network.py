"""Networks as objectives: finite differences, a naive twin, and initial weights however they are cut."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from dbmpi.config import Dense, NetworkSection
from dbmpi.errors import UserError
from dbmpi.index.layout import cut
from dbmpi.kernels import updates
from dbmpi.network.initial import fill_uniform
from dbmpi.objective import Batch, Outcome
from dbmpi.replica.whole import WholeNetwork

ACTIVATIONS = ["sigmoid", "tanh", "relu", "linear"]
LOSSES = [
    ("softmax", "classes"),
    ("logistic", "classes"),
    ("logistic", "values"),
    ("squared", "classes"),
    ("squared", "values"),
]


def network(*units, activation="tanh", last="linear", loss="softmax", inputs=(7,), **options):
    layers = [Dense(units=number, activation=activation) for number in units[:-1]]
    layers.append(Dense(units=units[-1], activation=last))
    return WholeNetwork(NetworkSection(loss=loss, layers=tuple(layers)), inputs, 1, **options)


def initial(net):
    parameters = np.empty(net.layout.size, net.dtype)
    net.initial(0, parameters)
    return parameters


def random_batch(net, samples, seed=1):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(*net.input_shape, samples)).astype(np.float32)
    if net.loss.targets == "classes":
        return Batch(inputs, random.integers(0, net.outputs, samples).astype(np.int32))
    return Batch(inputs, random.uniform(size=(net.outputs, samples)).astype(np.float32))


@pytest.mark.parametrize(("loss", "targets"), LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_against_finite_differences(activation, loss, targets):
    # Squared distance is the only loss under which the last layer may have an activation.
    last = activation if loss == "squared" else "linear"
    net = network(6, 5, 4, activation=activation, last=last, loss=loss, dtype=np.float64, targets=targets)
    parameters = initial(net) + 0.1 * np.random.default_rng(2).normal(size=net.layout.size)
    batch = random_batch(net, 9)
    gradient = np.empty_like(parameters)
    outcome = net.loss_and_gradient(parameters, batch, gradient)
    assert outcome == net.evaluate(parameters, batch)

    def mean_loss(where, step):
        moved = parameters.copy()
        moved[where] += step
        return net.evaluate(moved, batch).mean_loss

    h = 1e-4
    differences = np.empty_like(gradient)
    for where in range(gradient.size):
        near = (mean_loss(where, h) - mean_loss(where, -h)) / (2 * h)
        far = (mean_loss(where, 2 * h) - mean_loss(where, -2 * h)) / (4 * h)
        differences[where] = (4 * near - far) / 3  # of fourth order (Richardson)
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-6 * np.abs(gradient).max())


def naive_step(net, parameters, batch, activation, loss):
    """Return outcome and gradient as a textbook would compute them, in float64."""
    functions = {
        "sigmoid": (special.expit, lambda y: y * (1 - y)),
        "tanh": (np.tanh, lambda y: 1 - y**2),
        "relu": (lambda x: np.maximum(x, 0), lambda y: (y > 0).astype(y.dtype)),
        "linear": (lambda x: x, np.ones_like),
    }
    function, derivative = functions[activation]
    tensors = list(net.layout.views(parameters.astype(np.float64)).values())
    weights, biases = tensors[::2], tensors[1::2]
    samples = batch.samples
    activations = [batch.inputs.reshape(-1, samples).astype(np.float64)]
    for number, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = w @ activations[-1] + b[:, None]
        activations.append(x if number == len(weights) - 1 else function(x))
    last = activations[-1]
    classes = batch.targets.ndim == 1
    targets = np.eye(len(last))[:, batch.targets] if classes else batch.targets.astype(np.float64)
    if loss == "softmax":
        total, delta = -(special.log_softmax(last, axis=0) * targets).sum(), special.softmax(last, axis=0) - targets
    elif loss == "logistic":
        total, delta = (np.logaddexp(0, last) - targets * last).sum(), special.expit(last) - targets
    else:
        total, delta = 0.5 * ((last - targets) ** 2).sum(), last - targets
    delta = delta / samples
    gradients = []
    for number in reversed(range(len(weights))):
        gradients += [delta.sum(axis=1), (delta @ activations[number].T).ravel()]
        if number:
            delta = (weights[number].T @ delta) * derivative(activations[number])
    correct = int((last.argmax(axis=0) == batch.targets).sum()) if classes else -1
    return Outcome(samples, total, correct), np.concatenate(gradients[::-1])


@given(
    units=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    inputs=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    samples=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    kind=st.sampled_from(LOSSES),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_gradients_and_steps_against_a_naive_twin(units, inputs, samples, activation, kind, dtype):
    loss, targets = kind
    net = network(*units, activation=activation, loss=loss, inputs=inputs, targets=targets, dtype=dtype)
    parameters = initial(net) + np.random.default_rng(1).normal(scale=0.1, size=net.layout.size).astype(dtype)
    batch = random_batch(net, samples)
    gradient = np.full(net.layout.size, np.nan, dtype)
    outcome = net.loss_and_gradient(parameters, batch, gradient)
    expected, expected_gradient = naive_step(net, parameters, batch, activation, loss)
    tolerance = 2e-4 if dtype == np.float32 else 1e-11
    scale = max(np.abs(expected_gradient).max(), 1e-3)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=tolerance * scale)
    assert outcome.loss == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
    assert outcome.samples == samples
    if dtype == np.float64:
        assert outcome.correct == expected.correct
    updates.sgd(parameters, gradient, 0.1)
    assert np.isfinite(parameters).all()


def test_a_network_of_large_layers_against_a_naive_twin():
    """Large enough for the products that small layers do not take."""
    net = network(500, 400, 300, activation="sigmoid", inputs=(20, 20))
    parameters, batch = initial(net), random_batch(net, 128)
    gradient = np.empty_like(parameters)
    outcome = net.loss_and_gradient(parameters, batch, gradient)
    expected, expected_gradient = naive_step(net, parameters, batch, "sigmoid", "softmax")
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-5 * np.abs(expected_gradient).max())
    assert outcome.loss == pytest.approx(expected.loss, rel=1e-6)
    assert outcome.correct == expected.correct


def test_repeated_steps_learn():
    net = network(20, 3)
    parameters, batch = initial(net), random_batch(net, 30)
    gradient = np.empty_like(parameters)
    first = net.evaluate(parameters, batch)
    for _ in range(300):
        net.loss_and_gradient(parameters, batch, gradient)
        updates.sgd(parameters, gradient, 0.5)
    last = net.evaluate(parameters, batch)
    assert last.loss < 0.05 * first.loss
    assert last.accuracy == 1.0


def test_the_outcome_of_a_batch_is_the_sum_of_its_parts():
    net = network(11, 5, dtype=np.float64)
    parameters, batch = initial(net), random_batch(net, 40)
    parts = [
        net.evaluate(parameters, Batch(batch.inputs[:, piece], batch.targets[piece]))
        for piece in (slice(0, 13), slice(13, 20), slice(20, 40))
    ]
    total = parts[0].plus(parts[1]).plus(parts[2])
    whole = net.evaluate(parameters, batch)
    assert (total.samples, total.correct) == (whole.samples, whole.correct)
    assert total.loss == pytest.approx(whole.loss, rel=1e-13)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("softmax", lambda z: special.softmax(z, axis=0)), ("logistic", special.expit), ("squared", lambda z: z)],
)
def test_predictions(loss, expected):
    net = network(11, 5, loss=loss, dtype=np.float64)
    parameters, batch = initial(net), random_batch(net, 10)
    parameters += np.random.default_rng(3).normal(size=parameters.size)
    first_weights, first_bias, weights, bias = net.layout.views(parameters).values()
    hidden = np.tanh(first_weights @ batch.inputs + first_bias[:, None])
    predictions = net.predict(parameters, batch.inputs)
    np.testing.assert_allclose(predictions, expected(weights @ hidden + bias[:, None]), rtol=1e-12)
    again = predictions.copy()
    net.predict(parameters, -batch.inputs)  # of the same size, in the same workspace
    np.testing.assert_array_equal(predictions, again)
    if loss != "squared":
        correct = (predictions.argmax(axis=0) == batch.targets).sum()
        assert net.evaluate(parameters, batch).correct == correct


def test_gradients_are_announced_from_the_last_layer_to_the_first():
    """A caller may use a layer's gradient, and overwrite its parameters, as soon as it is told."""
    net = network(9, 8, 4)
    parameters, batch = initial(net), random_batch(net, 6)
    expected, gradient = np.empty_like(parameters), np.full(parameters.size, np.nan, np.float32)
    net.loss_and_gradient(parameters, batch, expected)
    announced = []

    def on_gradient(number):
        announced.append(number)
        for tensor in net.layers[number].tensors.values():
            start = net.layout.offsets[tensor.name]
            piece = slice(start, start + tensor.size)
            np.testing.assert_array_equal(gradient[piece], expected[piece])
            parameters[piece] = np.nan

    net.loss_and_gradient(parameters, batch, gradient, on_gradient)
    assert announced == [2, 1, 0]


def test_steps_allocate_nothing_large_and_workspaces_are_few():
    net = network(300, 200, inputs=(100,), activation="sigmoid")
    parameters = initial(net)
    gradient = np.empty_like(parameters)
    batches = [random_batch(net, samples) for samples in (64, 17, 40)]
    for batch in batches:
        net.loss_and_gradient(parameters, batch, gradient)
    assert list(net._replica._workspaces) == [17, 40]
    tracemalloc.start()
    try:
        for batch in (batches[2], batches[1]) * 5:
            net.loss_and_gradient(parameters, batch, gradient)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000  # the smallest activation has 13,600 bytes, all of them 500,000


def test_inputs_of_any_order_and_type_are_taken():
    net = network(9, 4, inputs=(3, 5))
    parameters, batch = initial(net), random_batch(net, 6)
    expected = net.evaluate(parameters, batch)
    fortran = batch._replace(inputs=np.asfortranarray(batch.inputs), targets=batch.targets.astype(np.int64))
    assert net.evaluate(parameters, fortran) == expected
    assert net.evaluate(parameters, batch._replace(inputs=batch.inputs.astype(np.float64))) == expected


def test_initial_weights_have_the_announced_spread():
    section = NetworkSection(
        layers=(
            Dense(units=400, activation="sigmoid"),
            Dense(units=300, activation="relu", initial_scale=0.5),
            Dense(units=200),
        )
    )
    net = WholeNetwork(section, (20, 25), 3)
    views = net.layout.views(initial(net))
    expected = {1: math.sqrt(1 / 500), 2: 0.5 * math.sqrt(2 / 400), 3: math.sqrt(1 / 300)}
    for number, deviation in expected.items():
        weights = views[f"dense{number}/weights"]
        assert weights.std() == pytest.approx(deviation, rel=0.01)
        assert abs(weights.mean()) < 0.02 * deviation
        assert np.abs(weights).max() <= math.sqrt(3) * deviation * (1 + 1e-6)
        assert len(np.unique(weights)) > 0.9 * weights.size
        assert not views[f"dense{number}/bias"].any()
    other = np.empty(net.layout.size, np.float32)
    WholeNetwork(section, (20, 25), 4).initial(0, other)
    assert (other != initial(net)).sum() > 0.99 * (other.size - 900)


@given(parts=st.integers(1, 40), units=st.lists(st.integers(1, 20), min_size=1, max_size=3), inputs=st.integers(1, 20))
def test_initial_parameters_do_not_depend_on_the_cut(parts, units, inputs):
    net = network(*units, inputs=(inputs,))
    pieces = []
    for piece in cut(net.layout.size, parts):
        pieces.append(np.full(len(piece), np.nan, np.float32))
        net.initial(piece.start, pieces[-1])
    np.testing.assert_array_equal(np.concatenate(pieces), initial(net))


@given(start=st.integers(0, 200_000), size=st.integers(0, 70_000), seed=st.integers(0, 2**63 - 1))
def test_any_range_of_a_tensor_can_be_made_alone(start, size, seed):
    whole, part = np.empty(start + size), np.empty(size)
    fill_uniform(whole, seed, 3, 0, 1.0)
    fill_uniform(part, seed, 3, start, 1.0)
    np.testing.assert_array_equal(part, whole[start:])


def test_single_and_double_precision_start_alike():
    single, double = network(9, 4), network(9, 4, dtype=np.float64)
    np.testing.assert_array_equal(initial(single), initial(double).astype(np.float32))


def test_operations_are_counted():
    net = network(20, 30, 5, inputs=(2, 5))
    # forward and weight gradient of all layers; input gradient of all but the first
    assert net.flops(8) == 2 * 8 * (2 * (10 * 20 + 20 * 30 + 30 * 5) + 20 * 30 + 30 * 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": np.zeros((8, 6), np.float32)}, r"inputs: given float32 \(8, 6\), expected \(7, samples\)"),
        ({"inputs": np.zeros((7, 0), np.float32)}, r"inputs: given float32 \(7, 0\).*at least one sample"),
        ({"inputs": np.float32(1)}, r"inputs: given float32 \(\), expected"),
        ({"targets": np.zeros(5, np.int32)}, r"targets: given int32 \(5,\), expected int32 \(6,\)"),
        ({"targets": np.zeros(6, np.float32)}, r"targets: given float32 \(6,\), expected int32 \(6,\)"),
        ({"targets": np.zeros((4, 6), np.int32)}, r"targets: given int32 \(4, 6\), expected int32 \(6,\)"),
        ({"targets": np.array([0, 1, 4, 0, 0, 0])}, r"classes from 0 to 4, but the network has 4 outputs"),
        ({"targets": np.array([0, 1, -1, 0, 0, 0])}, r"classes from -1 to 1, but"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, message):
    net = network(9, 4)
    batch = random_batch(net, 6)._replace(**change)
    parameters = initial(net)
    with pytest.raises(ValueError, match=message):
        net.evaluate(parameters, batch)
    with pytest.raises(ValueError, match=message):
        net.loss_and_gradient(parameters, batch, np.empty_like(parameters))


def test_values_of_another_shape_are_refused():
    net = network(9, 4, loss="squared", targets="values")
    batch = random_batch(net, 6)._replace(targets=np.zeros((5, 6), np.float32))
    with pytest.raises(ValueError, match=r"targets: given float32 \(5, 6\), expected \(4, 6\)"):
        net.evaluate(initial(net), batch)


def test_vectors_that_do_not_fit_are_refused():
    net = network(9, 4)
    batch, parameters = random_batch(net, 6), initial(net)
    for wrong in (parameters[:-1], parameters.astype(np.float64), np.zeros(2 * parameters.size, np.float32)[::2]):
        with pytest.raises(ValueError, match=r"parameters: given .*, expected contiguous float32 \(112,\)"):
            net.evaluate(wrong, batch)
        with pytest.raises(ValueError, match=r"gradient: given .*, expected contiguous float32 \(112,\)"):
            net.loss_and_gradient(parameters, batch, wrong)


def test_softmax_of_values_is_refused():
    with pytest.raises(UserError, match="'softmax' needs classes"):
        network(9, 4, targets="values")
