"""Exported parameters and networks, judged by NumPy, by onnxruntime, and by a reader of safetensors written here."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from unit.checkpoint_files import as_version_1, make_info
from unit.checkpoint_files import write as write_checkpoint

from dbmpi.checkpoint import named_arrays
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.meaning import Meaning
from dbmpi.checkpoint.named_state import take_state
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.cli.main import main
from dbmpi.config import NetworkSection
from dbmpi.errors import DiskFailed, UserError
from dbmpi.formats import onnx_graph
from dbmpi.formats.export import export
from dbmpi.formats.torch_names import torch_names
from dbmpi.index.layout import Layout, Tensor
from dbmpi.network.description import Network
from dbmpi.replica.placement import automatic
from dbmpi.replica.replica import Replica

onnxruntime = pytest.importorskip("onnxruntime", reason="the judge of exported networks is not installed")

DENSE = {"type": "dense", "units": 5}
NETWORKS = {
    "dense": ((4, 3), "softmax", [{**DENSE, "activation": "tanh"}, {"type": "dropout", "rate": 0.5}, DENSE]),
    "convolution": (
        (9, 8),
        "logistic",
        [
            {"type": "convolution", "maps": 3, "field": [3, 2], "stride": 2, "activation": "relu"},
            {"type": "pooling", "kind": "max", "size": 2},
            DENSE,
        ],
    ),
    "local": (
        (2, 9, 11),
        "squared",
        [
            {"type": "local", "maps": 3, "field": [3, 2], "stride": 2, "activation": "sigmoid"},
            {"type": "pooling", "kind": "l2", "size": [2, 3]},
            {"type": "normalisation", "window": 5},
            DENSE,
        ],
    ),
    "reconstruction": (
        (1, 7, 7),
        "reconstruction",
        [
            {"type": "convolution", "maps": 3, "field": 3, "reconstruction": 1.0},
            {"type": "pooling", "kind": "average", "size": 2, "stride": 2},
        ],
    ),
}


def write(run: Path, name: str, seed: int = 1, **meaning) -> tuple[Path, Network, np.ndarray]:
    """Write a checkpoint of a network with random parameters; return it with the network and them."""
    shape, loss, layers = NETWORKS[name]
    section = {"loss": loss, "layers": layers}
    network = Network(NetworkSection.model_validate(section), shape, seed)
    values = np.random.default_rng(seed).normal(scale=0.5, size=network.size).astype(np.float32)
    with CheckpointWriter(checkpoint_path(run, 7), network.layout) as writer:
        writer.write("parameters", 0, values)
        described = json.dumps({"network": section})
        classes = 0 if loss == "reconstruction" else 5
        info = make_info(configuration=described, input_shape=shape, classes=classes, step=7)
        path = writer.commit(info.__class__(**{**vars(info), "meaning": Meaning(**meaning)}))
    return path, network, values


def outputs(network: Network, parameters: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Return what dbmpi predicts for inputs (samples, *shape)."""
    with Replica(network, automatic(network.layers, 1), None) as replica:
        innermost = np.ascontiguousarray(np.moveaxis(inputs, 0, -1))
        found = replica.outputs(parameters, innermost)
    if network.loss is not None:
        network.loss.predict(found)
    return found.reshape(-1, len(inputs)).T


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_computes_what_the_network_does(tmp_path: Path, name: str) -> None:
    path, network, parameters = write(tmp_path, name)
    session = onnxruntime.InferenceSession(export(path, tmp_path / "model.onnx"))
    for samples in (1, 6):
        inputs = np.random.default_rng(2).normal(size=(samples, *network.input_shape)).astype(np.float32)
        (found,) = session.run(["outputs"], {"inputs": inputs})
        np.testing.assert_allclose(found, outputs(network, parameters, inputs), rtol=1e-5, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["step"] == "7"
    assert facts["inputs"] == "as the network sees them"


def test_bytes_are_scaled_in_the_graph(tmp_path: Path) -> None:
    path, network, parameters = write(tmp_path, "dense", elements="bytes", scale=1 / 255, labels=(3, 4, 5, 6, 8))
    session = onnxruntime.InferenceSession(export(path, tmp_path / "model.onnx"))
    inputs = np.random.default_rng(2).integers(0, 256, (6, *network.input_shape), np.uint8)
    (found,) = session.run(["outputs"], {"inputs": inputs})
    expected = outputs(network, parameters, inputs * np.float32(1 / 255))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["labels"]) == [3, 4, 5, 6, 8]
    assert "probability of each class" in facts["outputs"]


def test_large_parameters_are_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, network, parameters = write(tmp_path, "local")
    monkeypatch.setattr(onnx_graph, "LARGEST", 1000)
    exported = export(path, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size > 1024
    inputs = np.ones((2, *network.input_shape), np.float32)
    (found,) = onnxruntime.InferenceSession(exported).run(["outputs"], {"inputs": inputs})
    np.testing.assert_allclose(found, outputs(network, parameters, inputs), rtol=1e-5, atol=1e-5)


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a file by the words of the format's description."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    facts, body = header.pop("__metadata__"), data[8 + length :]
    arrays = {}
    assert sorted(offset for entry in header.values() for offset in entry["data_offsets"])[-1] == len(body)
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        types = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1"}
        arrays[name] = np.frombuffer(body[start:stop], types[entry["dtype"]])
        assert start % arrays[name].itemsize == 0
        arrays[name] = arrays[name].reshape(entry["shape"])
    return arrays, facts


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("names", ["dbmpi", "torch"])
def test_arrays_are_those_of_the_checkpoint(tmp_path: Path, suffix: str, names: str) -> None:
    path, network, values = write(tmp_path, "convolution")
    file = export(path, tmp_path / f"out.{suffix}", names=names)
    found = dict(np.load(file)) if suffix == "npz" else read_safetensors(file)[0]
    short = {"weights": "weight", "bias": "bias"}
    for name, expected in network.layout.views(values).items():
        layer, _, array = name.partition("/")
        np.testing.assert_array_equal(found.pop(name if names == "dbmpi" else f"{layer}.{short[array]}"), expected)
    assert not found


def test_a_checkpoint_of_one_file_is_as_good_as_the_original(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_state = write_checkpoint(tmp_path, fill=3)
    with h5py.File(with_state, "r+") as file:
        as_version_1(file)
    place = tmp_path / "exported"
    path = export(tmp_path, place / "step-000000123.h5")
    assert list(place.iterdir()) == [path]  # and no pointer
    with Checkpoint.open(with_state) as original, Checkpoint.open(path) as whole:
        assert whole.has_checksums
        assert not original.has_checksums
        assert (whole.layout, whole.vectors) == (original.layout, original.vectors)
        assert whole.info == replace(original.info, libraries=whole.info.libraries)
        for vector in original.vectors:
            both = np.empty((2, original.layout.size), np.float32)
            original.read(vector, 0, both[0])
            whole.read(vector, 0, both[1])
            np.testing.assert_array_equal(*both)
    with pytest.raises(UserError, match="beside the checkpoints of a run"):
        export(path, with_state, force=True)
    with pytest.raises(UserError, match=r"cannot be written here: File exists$"):
        export(path, path / "below.h5")
    write_checkpoint(tmp_path, 124).write_bytes(b"torn")
    export(tmp_path, path, force=True)
    assert "step-000000124.h5: is not an HDF5 file" in capsys.readouterr().err


def test_the_state_of_an_objective_goes_with_its_parameters(tmp_path: Path) -> None:
    """Into files, and from them into a new run, where a mask of booleans is one again."""
    layout = Layout((Tensor("w", (3,)),))
    state = {"mean": np.float32([1, 2]), "count": np.array(7), "w": np.array([0.5]), "none": np.empty((0, 2))}
    mask, values = np.array([True, False, True]), np.float32([1, 2, 3])
    with CheckpointWriter(tmp_path / "c.h5", layout, objective_state={"mask": mask.view(np.uint8), **state}) as writer:
        writer.write("parameters", 0, values)
        writer.commit(make_info())
    expected = {
        "w": values,
        "mask": mask,
        **{name if name != "w" else "objective_state/w": state[name] for name in state},
    }
    npz, other = (export(tmp_path / "c.h5", tmp_path / f"out.{suffix}") for suffix in ("npz", "safetensors"))
    for found in (dict(np.load(npz)), read_safetensors(other)[0]):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == (np.uint8 if name == "mask" else array.dtype)
    now = {name: np.zeros_like(array) for name, array in {"mask": mask, **state}.items()}
    for path in (npz, other, tmp_path / "c.h5"):
        with named_arrays.opened(path) as stored:
            first = take_state(layout, now, stored, str(path))
            assert named_arrays.match(layout, stored, str(path)).keys() == {"w"}
        assert first.keys() == now.keys()
        for name, array in {"mask": mask, **state}.items():
            np.testing.assert_array_equal(first[name], array)
        for wrong, words in (
            ({"mean": np.zeros(3)}, r"has shape \(2,\), the state"),
            ({"mean": mask[:2]}, "is float32"),
        ):
            with named_arrays.opened(path) as stored, pytest.raises(UserError, match=f"'mean' {words}"):
                take_state(layout, wrong, stored, str(path))


def test_what_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, *_ = write(tmp_path, "local")
    with pytest.raises(UserError, match=r"local1/weights: PyTorch has no module with such a parameter"):
        export(path, tmp_path / "out.npz", names="torch")
    with pytest.raises(UserError, match=r"ends in \.npz, \.safetensors, \.h5 or \.onnx"):
        export(path, tmp_path / "out.pt")
    with pytest.raises(UserError, match="cannot be written: No such file"):
        export(path, tmp_path / "missing" / "out.npz")
    with pytest.raises(UserError, match="names = 'pytorch': expected 'dbmpi' or 'torch'"):
        export(path, tmp_path / "out.npz", names="pytorch")
    assert not list(tmp_path.glob("*out*"))
    (tmp_path / "beside.onnx.data").write_bytes(b"of another model")
    with pytest.raises(UserError, match=r"beside\.onnx\.data: exists and is not overwritten"):
        export(path, tmp_path / "beside.onnx")
    assert main(["export", str(path), "--out", str(tmp_path / "out.npz")]) == 0
    assert main(["export", str(path), "--out", str(tmp_path / "out.npz")]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_a_class_of_ones_own_is_not_taken_for_the_one_it_inherits_from(tmp_path: Path) -> None:
    _, network, _ = write(tmp_path, "dense")
    first = network.layers[0]
    first.__class__ = type("Squared", (type(first),), {})
    with pytest.raises(UserError, match=f"{first.name}/.*PyTorch has no module with such a parameter"):
        torch_names(network)
    with pytest.raises(UserError, match=f"layer {first.name!r} is a Squared of your own"):
        onnx_graph.graph(network, np.zeros, stored_bytes=False, scale=1.0)


def test_a_disk_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, *_ = write(tmp_path, "dense")
    for suffix in ("npz", "safetensors", "onnx"):
        file = export(path, tmp_path / f"out.{suffix}")
        before = file.read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            with pytest.raises(DiskFailed, match="cannot be written: No space left on device"):
                export(path, file, force=True)
        assert file.read_bytes() == before
        assert [one.name for one in tmp_path.glob("*out*")] == [file.name]
        file.unlink()


def test_damage_is_found_while_exporting(tmp_path: Path) -> None:
    path, _, values = write(tmp_path, "dense")
    data, some = path.read_bytes(), values[5:25].tobytes()
    assert data.count(some) == 1
    path.write_bytes(data.replace(some, some[::-1]))
    with pytest.raises(UserError, match="/parameters/dense1/weights is damaged"):
        export(path, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()
