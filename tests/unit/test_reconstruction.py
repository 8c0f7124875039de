"""The objective without targets: its value by the formula, its gradient by finite differences, and its fall."""

import h5py
import numpy as np
import pytest

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.kernels import reconstruction
from dbmpi.kernels.memory import rows_of
from dbmpi.network.field import ConvolutionLayer, LocalLayer
from dbmpi.objective import Batch
from dbmpi.replica.whole import WholeNetwork
from dbmpi.runs.training import train


def section(*, activation="linear", kind=config.Local, stride=1):
    layers = (
        kind(maps=3, field=(3, 2), stride=stride, reconstruction=0.7, activation=activation),
        config.Pooling(kind="l2", size=2, penalty=0.1),
        config.Normalisation(window=3),
        config.Local(maps=2, field=2, reconstruction=1.3),
    )
    return config.NetworkSection(loss="reconstruction", layers=layers)


def prepared(section, dtype=np.float64, samples=4):
    network = WholeNetwork(section, (2, 8, 7), seed=3, dtype=dtype)
    parameters = np.empty(network.layout.size, dtype)
    network.initial(0, parameters)
    inputs = np.random.default_rng(1).standard_normal((2, 8, 7, samples)).astype(dtype)
    return network, parameters, Batch(inputs, np.zeros(samples, np.int32))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_loss_is_what_the_formula_says(stride):
    described = section(stride=stride)
    described = described.model_copy(update={"layers": described.layers[:2]})
    network, parameters, batch = prepared(described)
    x, tensors = batch.inputs, network.layout.views(parameters)
    weights, bias, decoder = (tensors[f"local1/{name}"] for name in ("weights", "bias", "decoder"))
    maps, rows, columns = network.layers[0].output_shape
    hidden, estimate = np.empty((maps, rows, columns, batch.samples)), np.zeros_like(x)
    for i in range(rows):
        for j in range(columns):
            field = np.s_[:, i * stride : i * stride + 3, j * stride : j * stride + 2]
            hidden[:, i, j] = np.einsum("muvc,cuvb->mb", weights[i, j], x[field]) + bias[i, j][:, None]
            estimate[field] += np.einsum("muvc,mb->cuvb", decoder[i, j], hidden[:, i, j])
    pooled = sum(
        np.sqrt(1e-8 + (hidden[:, i : i + 2, j : j + 2] ** 2).sum(axis=(1, 2))).sum()
        for i in range(rows - 1)
        for j in range(columns - 1)
    )
    expected = 0.7 * ((estimate - x) ** 2).sum() + 0.1 * pooled
    assert network.evaluate(parameters, batch).loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("activation", ["linear", "sigmoid"])
@pytest.mark.parametrize("kind", [config.Local, config.Convolution])
def test_the_gradient_is_that_of_finite_differences(activation, kind):
    network, parameters, batch = prepared(section(activation=activation, kind=kind))
    gradient = np.empty_like(parameters)
    outcome = network.loss_and_gradient(parameters, batch, gradient)
    assert outcome == network.evaluate(parameters, batch)
    assert outcome.accuracy is None
    rng = np.random.default_rng(2)
    for _ in range(6):
        direction = rng.standard_normal(parameters.size)
        there, here = (network.evaluate(parameters + step * direction, batch).mean_loss for step in (1e-5, -1e-5))
        assert (there - here) / 2e-5 == pytest.approx(gradient @ direction, rel=1e-6)


@pytest.mark.parametrize(("kind", "filters"), [("local", "ijmuvc"), ("convolution", "mcuv")])
def test_what_comes_from_an_estimate_is_added(kind, filters):
    """Over fields deeper than one pass, and two blocks of maps."""
    made, described = {"local": (LocalLayer, config.Local), "convolution": (ConvolutionLayer, config.Convolution)}[kind]
    layer = made("layer", (9, 12, 13), described(maps=11, field=10, reconstruction=1.0))
    samples, rng = 37, np.random.default_rng(1)
    parameters = {name: rng.normal(size=one.shape).astype(np.float32) for name, one in layer.tensors.items()}
    of_parameters = {name: np.zeros_like(values) for name, values in parameters.items()}
    outputs, gradient = (rng.normal(size=(*layer.output_shape, samples)).astype(np.float32) for _ in range(2))
    of_estimate = rng.normal(size=(*layer.input_shape, samples)).astype(np.float32)
    fields = np.lib.stride_tricks.sliding_window_view(of_estimate.astype(np.float64), layer.field, (1, 2))
    added = np.einsum(f"{filters},cijbuv->mijb", parameters["decoder"], fields, optimize=True)
    expected, before = gradient + added, outputs.copy()
    layer.reconstruct_backward(Box.whole(layer.output_shape), parameters, outputs, of_estimate, of_parameters, gradient)
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    of_decoder = np.einsum(f"mijb,cijbuv->{filters}", before, fields, optimize=True)
    np.testing.assert_allclose(of_parameters["decoder"], of_decoder, atol=1e-5 * np.abs(of_decoder).max(), rtol=0)
    np.testing.assert_array_equal(outputs, before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_terms_of_a_part_of_an_array_against_naive_twins(dtype):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 9, 8, 300)).astype(dtype)[1:, 2:7, 3:]
    estimate = rng.normal(size=values.shape).astype(dtype)
    assert reconstruction.total(rows_of(values), values.shape) == pytest.approx(values.sum(dtype=np.float64), rel=1e-10)
    difference = estimate - values
    found = reconstruction.squared_error(estimate, rows_of(values), 0.25)
    assert found == pytest.approx((difference.astype(np.float64) ** 2).sum(), rel=1e-12)
    np.testing.assert_array_equal(estimate, dtype(0.25) * difference)


def test_a_run_learns_from_a_file_without_targets(tmp_path):
    """Faces of one shape under changing light: there is a structure to be found."""
    rng = np.random.default_rng(1)
    light, shapes = rng.standard_normal((96, 3)), rng.standard_normal((3, 8, 8))
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["inputs"] = np.tensordot(light, shapes, 1).astype(np.float32)
    layers = [
        {"type": "local", "maps": 3, "field": 4, "reconstruction": 1.0},
        {"type": "pooling", "size": 2, "penalty": 0.01},
    ]
    described = {
        "run": {"directory": tmp_path / "run"},
        "data": {"train": tmp_path / "train.h5", "test": tmp_path / "train.h5"},
        "network": {"loss": "reconstruction", "layers": layers},
        "optimizer": {"learning_rate": 0.02, "batch_size": 16, "epochs": 0.17},
        "monitor": {"progress": "none"},
    }
    before = train(config.Run.model_validate(described)).test
    described["run"] = {"directory": tmp_path / "longer"}
    described["optimizer"] = described["optimizer"] | {"epochs": 30}
    after = train(config.Run.model_validate(described)).test
    assert after.mean_loss < 0.3 * before.mean_loss


@pytest.mark.parametrize(
    ("loss", "layer", "message"),
    [
        ("reconstruction", config.Dense(units=3), "needs a layer with reconstruction > 0"),
        ("softmax", config.Local(maps=1, field=2, reconstruction=1.0), "needs loss = 'reconstruction'"),
        ("squared", config.Pooling(size=2, penalty=1.0), "needs loss = 'reconstruction'"),
    ],
)
def test_objectives_of_layers_and_the_loss_belong_together(loss, layer, message):
    with pytest.raises(ValueError, match=message):
        config.NetworkSection(loss=loss, layers=(layer, config.Dense(units=2)))


def test_predictions_are_the_last_features():
    network, parameters, batch = prepared(section())
    outputs = network.predict(parameters, batch.inputs)
    assert outputs.shape == (network.outputs, batch.samples)
    assert network.outputs == np.prod(network.layers[-1].output_shape)
