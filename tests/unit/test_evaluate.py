"""``dbmpi evaluate`` and ``dbmpi predict``: the same numbers as a plain network in NumPy gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import special
from unit.checkpoint_files import as_version_1, make_info

from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.cli.main import main
from dbmpi.data.source import Source
from dbmpi.index.layout import Layout, Tensor
from dbmpi.kernels import compile as compiling
from dbmpi.machine import threads
from dbmpi.runs import prediction

ACTIVATIONS = {
    "sigmoid": special.expit,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
}
INPUT_SHAPE = (4, 3)
LAYERS = [
    {"type": "dense", "name": "lower", "units": 9, "activation": "tanh"},
    {"type": "dense", "name": None, "units": 7, "activation": "relu"},
    {"type": "dense", "name": None, "units": 5, "activation": "linear"},
]
NAMES = ["lower", "dense2", "dense3"]
SAMPLES = 53


def train(run: Path, loss="softmax", layers=LAYERS, classes=5, step=7, **fields) -> dict[str, np.ndarray]:
    """Write a checkpoint with random parameters; return them by name."""
    sizes = [int(np.prod(INPUT_SHAPE)), *(layer["units"] for layer in layers)]
    shapes = {}
    for name, below, above in zip(NAMES, sizes, sizes[1:], strict=False):
        shapes |= {f"{name}/weights": (above, below), f"{name}/bias": (above,)}
    layout = Layout(tuple(Tensor(name, shape) for name, shape in shapes.items()))
    values = np.random.default_rng(step).normal(size=layout.size).astype(np.float32)
    described = json.dumps({"network": {"loss": loss, "layers": layers}, "of a later version": True})
    info = make_info(
        **({"configuration": described, "input_shape": INPUT_SHAPE, "classes": classes, "step": step} | fields)
    )
    with CheckpointWriter(checkpoint_path(run, step), layout) as writer:
        writer.write("parameters", 0, values)
        writer.commit(info)
    return layout.views(values.astype(np.float64))


def make_data(path: Path, *, targets: str | None = "classes", samples=SAMPLES, shape=INPUT_SHAPE, classes=5):
    """Write a data file; return its inputs (samples, features) and targets."""
    random = np.random.default_rng(3)
    inputs = random.normal(size=(samples, *shape)).astype(np.float32)
    expected = None
    with h5py.File(path, "w") as file:
        file["inputs"] = inputs
        if targets == "classes":
            expected = file["targets"] = random.integers(0, classes, samples)
            file["targets"].attrs["classes"] = classes
        elif targets == "values":
            expected = file["targets"] = random.normal(size=(samples, classes)).astype(np.float32)
    return inputs.reshape(samples, -1).astype(np.float64), expected


def naive(tensors: dict[str, np.ndarray], inputs: np.ndarray, layers=LAYERS) -> np.ndarray:
    """Return what the last layer gives, (samples, units)."""
    values = inputs
    for name, layer in zip(NAMES, layers, strict=False):
        values = ACTIVATIONS[layer["activation"]](values @ tensors[f"{name}/weights"].T + tensors[f"{name}/bias"])
    return values


def run(capsys, *words) -> str:
    code = main([str(word) for word in words])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


def refused(capsys, *words) -> str:
    """Return the message with which a command ends."""
    assert main([str(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("batch_size", [1, 8, 1024])
def test_evaluate_softmax(tmp_path, capsys, batch_size):
    tensors = train(tmp_path / "run")
    inputs, classes = make_data(tmp_path / "data.h5")
    outputs = naive(tensors, inputs)
    losses = -special.log_softmax(outputs, axis=1)[np.arange(SAMPLES), classes]
    correct = int((outputs.argmax(axis=1) == classes).sum())
    words = ("evaluate", tmp_path / "run", "--data", tmp_path / "data.h5", "--batch-size", batch_size)
    found = json.loads(run(capsys, *words, "--json"))
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert (found["correct"], found["samples"], found["step"]) == (correct, SAMPLES, 7)
    assert found["accuracy"] == correct / SAMPLES
    text = run(capsys, *words)
    assert f"{100 * correct / SAMPLES:.2f} % ({correct} of {SAMPLES})" in text
    assert "step-000000007.h5 (step 7)" in text


def test_evaluate_values(tmp_path, capsys):
    tensors = train(tmp_path / "run", loss="squared", classes=0)
    inputs, values = make_data(tmp_path / "data.h5", targets="values")
    expected = 0.5 * ((naive(tensors, inputs) - values) ** 2).sum(axis=1).mean()
    found = json.loads(run(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / "data.h5", "--json"))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] is None


def test_fewer_classes_in_the_test_data(tmp_path, capsys):
    tensors = train(tmp_path / "run")
    inputs, classes = make_data(tmp_path / "data.h5", classes=2)
    correct = int((naive(tensors, inputs).argmax(axis=1) == classes).sum())
    found = json.loads(run(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / "data.h5", "--json"))
    assert found["correct"] == correct


@pytest.mark.parametrize("targets", ["classes", None])
@pytest.mark.parametrize("batch_size", [1, 10, 1024])
def test_predict_classes(tmp_path, capsys, batch_size, targets):
    tensors = train(tmp_path / "run")
    inputs, _ = make_data(tmp_path / "data.h5", targets=targets)
    expected = special.softmax(naive(tensors, inputs), axis=1)
    out = tmp_path / "out.h5"
    run(capsys, "predict", tmp_path / "run", "--data", tmp_path / "data.h5", "--out", out, "--batch-size", batch_size)
    with h5py.File(out) as file:
        assert file["outputs"].dtype == np.float32
        np.testing.assert_allclose(file["outputs"][()], expected, rtol=1e-4, atol=1e-6)
        assert (file["classes"][()] == expected.argmax(axis=1)).all()
        assert file.attrs["step"] == 7
        assert file.attrs["checkpoint"].decode().endswith("step-000000007.h5")
    assert sorted(os.listdir(tmp_path)) == ["data.h5", "out.h5", "run"]


def test_a_small_network_is_evaluated_by_one_thread(tmp_path, capsys, monkeypatch):
    train(tmp_path / "run")
    make_data(tmp_path / "data.h5")
    monkeypatch.setattr(threads, "_prepared", threads.Preparation(2, threads.Node(1, 2, 2), {}, False, "", {}))
    asked = []
    monkeypatch.setattr(compiling, "limit_threads", asked.append)
    used, batch = [], Source.batch

    def noting(source, indices):
        used.append(asked[-1])
        return batch(source, indices)

    monkeypatch.setattr(Source, "batch", noting)
    run(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / "data.h5")
    assert used == [1]
    assert asked[-1] == threads._prepared.kernels


def test_predict_values(tmp_path, capsys):
    layers = [LAYERS[0] | {"activation": "relu"}, LAYERS[1] | {"units": 2, "activation": "sigmoid"}]
    tensors = train(tmp_path / "run", loss="squared", classes=0, layers=layers)
    inputs, _ = make_data(tmp_path / "data.h5", targets=None)
    run(capsys, "predict", tmp_path / "run", "--data", tmp_path / "data.h5", "--out", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_allclose(file["outputs"][()], naive(tensors, inputs, layers), rtol=1e-5, atol=1e-6)
        assert "classes" not in file


def spoil(run: Path, value: float, tensor="lower/weights", place=(1, 2)) -> None:
    """Put a number into the parameters of a checkpoint that has no checksums."""
    with h5py.File(os.path.realpath(run / "checkpoints" / "latest"), "r+") as file:
        as_version_1(file)
        file[f"parameters/{tensor}"][place] = value


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("loss", ["softmax", "logistic", "squared"])
def test_outputs_that_are_no_numbers_are_never_right(tmp_path, capsys, loss, value):
    train(tmp_path / "run", loss=loss)
    spoil(tmp_path / "run", value, "dense3/bias", 0)
    make_data(tmp_path / "data.h5")
    words = ("--data", str(tmp_path / "data.h5"))
    assert main(["evaluate", str(tmp_path / "run"), *words]) == 1
    output = capsys.readouterr()
    assert "0.00 % (0 of 53)" in output.out
    assert "outputs are NaN or infinite" in output.err
    assert "'dense3/bias'" in output.err
    assert main(["evaluate", str(tmp_path / "run"), *words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["loss"], found["correct"]) == (None, 0)
    assert main(["predict", str(tmp_path / "run"), *words, "--out", str(tmp_path / "out.h5")]) == 1
    assert "of 53 of 53 samples are NaN or infinite; their class is -1" in capsys.readouterr().err
    with h5py.File(tmp_path / "out.h5") as file:
        assert (file["classes"][()] == -1).all()
        assert not np.isfinite(file["outputs"][()]).all(axis=1).any()


def test_only_the_samples_whose_outputs_are_no_numbers_are_wrong(tmp_path, capsys):
    layers = [LAYERS[2] | {"name": "lower"}]
    tensors = train(tmp_path / "run", layers=layers)
    _, classes = make_data(tmp_path / "data.h5")
    with h5py.File(tmp_path / "data.h5", "r+") as file:
        file["inputs"][::3, 0, 0] = 3e38
        inputs = file["inputs"][()].reshape(SAMPLES, -1)
    tensors["lower/weights"] *= 1000
    with h5py.File(os.path.realpath(tmp_path / "run" / "checkpoints" / "latest"), "r+") as file:
        as_version_1(file)
        file["parameters/lower/weights"][...] = tensors["lower/weights"]
    outputs = naive(tensors, inputs.astype(np.float64), layers)
    broken = np.abs(outputs.max(axis=1)) > np.finfo(np.float32).max
    expected = np.where(broken, -1, outputs.argmax(axis=1))
    assert 0 < broken.sum() < SAMPLES
    words = ("--data", str(tmp_path / "data.h5"))
    assert main(["evaluate", str(tmp_path / "run"), *words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["correct"] == (expected == classes).sum()
    assert main(["predict", str(tmp_path / "run"), *words, "--out", str(tmp_path / "out.h5")]) == 1
    assert f"of {broken.sum()} of 53 samples" in capsys.readouterr().err
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["classes"][()], expected)


def test_a_parameter_that_is_no_number_is_named_though_it_does_not_show(tmp_path, capsys):
    train(tmp_path / "run")
    spoil(tmp_path / "run", np.inf, "lower/bias", 0)  # tanh makes it 1
    make_data(tmp_path / "data.h5")
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "data.h5")]) == 1
    assert "'lower/bias' in" in capsys.readouterr().err


def test_values_that_are_no_numbers_are_warned_of(tmp_path, capsys):
    train(tmp_path / "run", loss="squared", classes=0)
    spoil(tmp_path / "run", np.nan)
    make_data(tmp_path / "data.h5", targets="values")
    words = ("--data", str(tmp_path / "data.h5"))
    assert main(["evaluate", str(tmp_path / "run"), *words]) == 1
    assert "'lower/weights'" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "run"), *words, "--out", str(tmp_path / "out.h5")]) == 1
    message = capsys.readouterr().err
    assert "of 53 of 53 samples are NaN or infinite" in message
    assert "class" not in message.replace("classes", "")


def test_a_file_larger_than_the_memory_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prediction, "MEMORY_MIB", 1)
    tensors = train(tmp_path / "run")
    inputs, _ = make_data(tmp_path / "data.h5", samples=30_000)
    with Source.open(tmp_path / "data.h5", prediction.MEMORY_MIB) as source:
        assert not source.storage.resident
    run(capsys, "predict", tmp_path / "run", "--data", tmp_path / "data.h5", "--out", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        expected = special.softmax(naive(tensors, inputs), axis=1)
        np.testing.assert_allclose(file["outputs"][()], expected, rtol=1e-3, atol=1e-6)


def test_predict_overwrites_only_if_told(tmp_path, capsys):
    train(tmp_path / "run")
    make_data(tmp_path / "data.h5")
    out = tmp_path / "out.h5"
    out.write_text("precious")
    words = ("predict", tmp_path / "run", "--data", tmp_path / "data.h5", "--out")
    assert "--force" in refused(capsys, *words, out)
    assert out.read_text() == "precious"
    run(capsys, *words, out, "--force")
    with h5py.File(out) as file:
        assert len(file["outputs"]) == SAMPLES
    checkpoint = checkpoint_path(tmp_path / "run", 7)
    for read in (tmp_path / "data.h5", checkpoint):
        before = read.read_bytes()
        assert "is the file to read from" in refused(capsys, *words, read, "--force")
        assert read.read_bytes() == before
    assert "is not a file" in refused(capsys, *words, tmp_path, "--force")
    assert "directory that can be written to" in refused(capsys, *words, tmp_path / "missing" / "out.h5")


def test_wrong_data_is_named(tmp_path, capsys):
    train(tmp_path / "run")
    data = tmp_path / "data.h5"
    evaluate = ("evaluate", tmp_path / "run", "--data", data)
    predict = ("predict", tmp_path / "run", "--data", data, "--out", tmp_path / "out.h5")
    assert "data.h5" in refused(capsys, *evaluate)
    data.write_text("hello")
    assert "data.h5" in refused(capsys, *evaluate)
    make_data(data, shape=(3, 4))
    for command in (evaluate, predict):
        message = refused(capsys, *command)
        assert "(3, 4)" in message
        assert "(4, 3)" in message
    make_data(data, targets=None)
    assert "no dataset 'targets'" in refused(capsys, *evaluate)
    make_data(data, targets="values")
    assert "the targets are 5 values a sample" in refused(capsys, *evaluate)
    make_data(data, classes=6)
    assert "has 6 classes" in refused(capsys, *evaluate)
    make_data(data)
    with h5py.File(data, "r+") as file:
        file["inputs"][17, 2, 1] = np.nan
    for command in (evaluate, predict):
        assert "sample 17" in refused(capsys, *command)
    assert not (tmp_path / "out.h5").exists()


def test_data_are_read_as_those_of_the_training_were(tmp_path, capsys):
    """Names, channels and gaps are in the configuration; the command line may name others."""
    data = {"train": "gone.h5", "inputs": "/entry/x", "targets": "y", "channels": "last", "missing": 0.5}
    described = {"network": {"loss": "softmax", "layers": LAYERS}, "data": data, "of a later version": True}
    tensors = train(tmp_path / "run", configuration=json.dumps(described))
    random = np.random.default_rng(4)
    inputs, labels = random.normal(size=(SAMPLES, 3, 4)).astype(np.float32), random.integers(0, 5, SAMPLES)
    inputs[7, 1, 2] = np.nan
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["entry/x"] = file["moved"] = inputs
        file["y"] = np.eye(5)[labels]
        file["classes"] = labels
    command = ("evaluate", tmp_path / "run", "--data", tmp_path / "data.h5", "--json")

    def expected(missing):
        whole = np.moveaxis(np.nan_to_num(inputs, nan=missing), -1, 1).reshape(SAMPLES, -1)
        outputs = naive(tensors, whole)
        return -special.log_softmax(outputs, axis=1)[np.arange(SAMPLES), labels].mean()

    for extra, missing in [
        ((), 0.5),
        (("--inputs", "moved", "--targets", "classes"), 0.5),
        (("--missing", "-2"), -2.0),
    ]:
        assert json.loads(run(capsys, *command, *extra))["loss"] == pytest.approx(expected(missing), rel=1e-5)
    assert "has no dataset 'z'" in refused(capsys, *command, "--targets", "z")
    out = tmp_path / "out.h5"
    run(capsys, "predict", tmp_path / "run", "--data", tmp_path / "data.h5", "--inputs", "moved", "--out", out)
    with h5py.File(out) as file:
        whole = np.moveaxis(np.nan_to_num(inputs, nan=0.5), -1, 1).reshape(SAMPLES, -1)
        np.testing.assert_allclose(
            file["outputs"], special.softmax(naive(tensors, whole), axis=1), rtol=1e-4, atol=1e-6
        )


def test_wrong_checkpoints_are_named(tmp_path, capsys):
    data = tmp_path / "data.h5"
    make_data(data)
    assert "no such checkpoint" in refused(capsys, "evaluate", tmp_path / "run", "--data", data)
    assert "is it a data file" in refused(capsys, "evaluate", data, "--data", data)
    harms = {
        "not described with a [network]": {"configuration": "{}"},
        "described with": {"configuration": "no JSON"},
        "layers": {"configuration": json.dumps({"network": {"layers": [{"units": 0}]}})},
        "another network": {"input_shape": (4, 4)},
    }
    for step, (message, fields) in enumerate(harms.items()):
        train(tmp_path / "run", step=step, **fields)
        assert message in refused(capsys, "evaluate", tmp_path / "run", "--data", data)


def test_a_fallback_is_said(tmp_path, capsys):
    train(tmp_path / "run", step=1)
    train(tmp_path / "run", step=2)
    checkpoint_path(tmp_path / "run", 2).write_bytes(b"torn")
    make_data(tmp_path / "data.h5")
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "data.h5")]) == 0
    output = capsys.readouterr()
    assert "step 1" in output.out
    assert "step-000000002.h5" in output.err


def test_batch_size_must_be_positive(capsys):
    for size in ("0", "x"):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", "run", "--data", "x", "--batch-size", size])
        assert ended.value.code == 2


@pytest.mark.parametrize("command", ["evaluate", "predict", "inspect"])
def test_help_loads_nothing_heavy(command):
    code = (
        f"import sys, argparse; from dbmpi.cli import {command} as command\n"
        "command.add_arguments(argparse.ArgumentParser())\n"
        "print({'numpy', 'h5py', 'mpi4py', 'numba', 'rich', 'pydantic'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
