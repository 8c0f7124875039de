"""What other programs show of a checkpoint: named dimensions, labels, descriptions; and that dbmpi needs none of it."""

import json

import h5py
import numpy as np
import pytest
from unit.checkpoint_files import make_info

from dbmpi.checkpoint.annotations import annotate
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.meaning import Meaning
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.config import Run
from dbmpi.index.layout import Layout, Tensor
from dbmpi.network.description import Network

MAPS = ("map", "input_map", "field_row", "field_column")
POSITIONS = ("row", "column", "map")
NETWORKS = {
    "dense": (
        (6,),
        [{"type": "dropout", "rate": 0.1}, {"units": 5, "activation": "tanh"}, {"units": 3, "name": "top"}],
        {
            "dense2/weights": ("unit", "input"),
            "dense2/bias": ("unit",),
            "top/weights": ("unit", "input"),
            "top/bias": ("unit",),
        },
    ),
    "maps": (
        (2, 9, 9),
        [
            {"type": "convolution", "maps": 3, "field": [2, 3]},
            {"type": "pooling", "size": 2},
            {"type": "local", "maps": 4, "field": 2, "reconstruction": 0.5},
            {"type": "normalisation"},
        ],
        {
            "convolution1/weights": MAPS,
            "convolution1/bias": ("map",),
            "local3/weights": (*POSITIONS, "field_row", "field_column", "input_map"),
            "local3/decoder": (*POSITIONS, "field_row", "field_column", "input_map"),
            "local3/bias": POSITIONS,
        },
    ),
}


def write(run, layout, state=None, **fields):
    values = np.random.default_rng(0).random(layout.size, np.float32)
    path = checkpoint_path(run, 1)
    with CheckpointWriter(path, layout, ("parameters", "accumulator", "s3"), objective_state=state or {}) as writer:
        for vector in ("parameters", "accumulator", "s3"):
            writer.write(vector, 0, values)
        return writer.commit(make_info(step=1, **fields))


def text(node, name):
    return node.attrs[name].decode()


def axes(dataset):
    """Return the names of the scales of a dataset, after a look at their lengths."""
    for dimension, length in zip(dataset.dims, dataset.shape, strict=True):
        assert dimension[0].shape == (length,)
        assert dimension[0].parent == dataset.parent
    return tuple(dimension[0].name.rpartition("/")[2] for dimension in dataset.dims)


@pytest.mark.filterwarnings("ignore")  # PyTables reads no references, and says so
@pytest.mark.parametrize("kind", NETWORKS)
def test_dimensions_have_names(tmp_path, kind):
    shape, layers, expected = NETWORKS[kind]
    run = Run.model_validate(
        {"network": {"layers": layers, "loss": "softmax" if kind == "dense" else "reconstruction"}}
    )
    network = Network(run.network, shape, 1)
    assert {tensor.name for tensor in network.layout.tensors} == set(expected)
    path = write(tmp_path, network.layout, configuration=run.to_json())
    with Checkpoint.open(path) as checkpoint:
        arrays = checkpoint.layout.views(checkpoint.parameters())
    with h5py.File(path) as file:
        for vector in ("parameters", "state/accumulator", "state/s3"):
            for name, names in expected.items():
                dataset = file[vector][name]
                assert axes(dataset) == names
                layer = name.partition("/")[0]
                kind_of = "dense" if layer == "top" else layer.rstrip("1234")
                assert text(dataset, "description").endswith(f"of the {kind_of} layer {layer}")
                assert all(dimension[0].id.get_storage_size() == 0 for dimension in dataset.dims)
        assert text(file["state/s3"][name], "description").startswith("step in slot 3 of the history (L-BFGS): biases")
        last = file["parameters"][name.partition("/")[0]]
        assert (text(last, "type"), text(last, "activation")) == (kind_of, "linear")
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(path) as file:
        for name, names in expected.items():
            group, short = name.split("/")
            assert file["parameters"][group][short].dimensions == names
            assert set(file["parameters"][group].variables) == {n[len(group) + 1 :] for n in expected if group in n}
    tables = pytest.importorskip("tables")
    with tables.open_file(path) as file:
        for tensor in network.layout.tensors:
            np.testing.assert_array_equal(file.get_node(f"/parameters/{tensor.name}").read(), arrays[tensor.name])


LABELS = {
    "texts": {"labels": ("cat", "dog", "müsli")},
    "numbers": {"labels": (7, 8, 9)},
    "values": {"target_names": ("x", "y", "z")},
    "too few": {"labels": (1, 2), "input_names": ("a", "b")},
}


@pytest.mark.parametrize("labels", LABELS)
def test_dimensions_have_labels_where_they_fit(tmp_path, labels):
    shape, layers, _ = NETWORKS["dense"]
    run = Run.model_validate({"network": {"layers": layers}})
    fit, given = labels != "too few", {"input_names": tuple("abcdef")} | LABELS[labels]
    network = Network(run.network, shape, 1)
    path = write(tmp_path, network.layout, configuration=run.to_json(), meaning=Meaning(**given))
    outputs = given.get("labels") or given["target_names"]
    with h5py.File(path) as file:
        group = file["parameters"]
        found = {name: group[name][()].tolist() for name in ("top/unit", "dense2/input") if group[name].dtype != ">f4"}
        names = [name.encode() if isinstance(name, str) else name for name in outputs]
        assert found == ({"top/unit": names, "dense2/input": [b"a", b"b", b"c", b"d", b"e", b"f"]} if fit else {})
        assert group["dense2/unit"].dtype == group["top/input"].dtype == file["state/s3/top/unit"].dtype == ">f4"
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(path) as file:
        assert ("unit" in file["parameters/top"].variables) == fit
        if fit:
            assert tuple(file["parameters/top"]["unit"][:].tolist()) == outputs


GENERIC = Layout(
    (
        Tensor("dim_0", (3, 3)),
        Tensor("inner/w", (4, 3)),
        Tensor("inner/dim_1/b", (2,)),
        Tensor("inner/none", (0, 3)),
        Tensor("scalar", ()),
    )
)


def test_what_nothing_is_known_of_has_generic_names_that_do_not_collide(tmp_path):
    """As the arrays of an objective of a user's own: a name stands for one length, in all groups."""
    state = {"seen": np.array(7), "mean": np.zeros((2, 3)), "deep/dim_0": np.zeros((2, 2), np.uint8)}
    path = write(tmp_path, GENERIC, state, configuration=json.dumps({"loop": {"rule": "sgd"}}))
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()
        assert checkpoint.layout == GENERIC
        assert [*checkpoint.state_arrays] == [*state]
    with h5py.File(path) as file:
        found = {tensor.name: axes(file["parameters"][tensor.name]) for tensor in GENERIC.tensors}
        assert found == {
            "dim_0": ("dim_0_", "dim_1_"),
            "inner/w": ("dim_2", "dim_0_"),
            "inner/dim_1/b": ("dim_3",),
            "inner/none": ("dim_4", "dim_0_"),
            "scalar": (),
        }
        assert axes(file["objective_state/mean"]) == ("dim_0_", "dim_2")
        assert axes(file["objective_state/deep/dim_0"]) == ("dim_0_", "dim_1")
        assert text(file["parameters/inner/w"], "description") == "array 'inner/w'"
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(path) as file:
        assert file["parameters/inner"]["w"].dimensions == ("dim_2", "dim_0_")


def test_nothing_of_it_is_needed_or_believed(tmp_path):
    """Neither when it is missing nor when it leads out of the file."""
    shape, layers, _ = NETWORKS["dense"]
    run = Run.model_validate({"network": {"layers": layers}})
    network = Network(run.network, shape, 1)
    path = write(tmp_path, network.layout, configuration=run.to_json())
    with Checkpoint.open(path) as checkpoint:
        before = checkpoint.parameters()
    with h5py.File(path, "r+") as file:
        del file["parameters/top/unit"]
        file["parameters/top/unit"] = h5py.ExternalLink("/etc/passwd", "/")
        del file["parameters/top/weights"].attrs["DIMENSION_LIST"]
        file["parameters/top/weights"].attrs["DIMENSION_LIST"] = ["x" * 1000] * 50
        file["parameters/top/bias"].attrs["description"] = np.zeros(10**5)
        file["state/s3/top"].move("input", "elsewhere")
        file.attrs["test_loss"] = -1.0
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()
        np.testing.assert_array_equal(checkpoint.parameters(), before)
        assert checkpoint.info.test_loss is None


def test_annotating_again_replaces_what_was_said(tmp_path):
    shape, layers, expected = NETWORKS["dense"]
    run = Run.model_validate({"network": {"layers": layers}})
    network = Network(run.network, shape, 1)
    path = write(tmp_path, network.layout, configuration=run.to_json())
    better = make_info(step=1, configuration=run.to_json(), test_loss=0.25, test_accuracy=0.5, test_step=1)
    with h5py.File(path, "r+") as file:
        assert "test_loss" not in file.attrs
        annotate(file, network.layout, better)
        assert file.attrs["test_loss"] == 0.25
        assert text(file, "description").endswith("; test loss at step 1 0.25 (50.00% correct)")
        assert {name: axes(file["parameters"][name]) for name in expected} == expected
