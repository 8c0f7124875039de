"""What other programs show beside the arrays of a checkpoint: descriptions, units, and named dimensions.

h5ls, netCDF, xarray and the like read them; dbmpi never does, and loses nothing where they are missing or wrong.  A
dimension is an HDF5 dimension scale beside its arrays, as netCDF writes it: without storage, unless it has labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np
from pydantic import ValidationError

from dbmpi import config
from dbmpi.checkpoint import schema
from dbmpi.checkpoint.meaning import Meaning
from dbmpi.errors import UserError
from dbmpi.index.layout import Layout

_WITHOUT_LABELS = "This is a netCDF dimension but not a netCDF variable."
"""Name of a dimension scale that has no values, by the convention of netCDF (with the length in 10 characters)."""
_FILTERS = ("map", "input_map", "field_row", "field_column")
_POSITIONS = ("row", "column", "map")
_AXES: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "dense": {
        "weights": (("unit", "input"), "weights, output units by inputs"),
        "bias": (("unit",), "biases of the output units"),
    },
    "convolution": {
        "weights": (_FILTERS, "filters, output maps by input maps by rows and columns of the field"),
        "decoder": (_FILTERS, "filters that estimate the inputs, axes as those of the weights"),
        "bias": (("map",), "biases of the output maps"),
    },
    "local": {
        "weights": (
            (*_POSITIONS, "field_row", "field_column", "input_map"),
            "filters of each position, output rows, columns and maps by rows and columns of the field and input maps",
        ),
        "decoder": (
            (*_POSITIONS, "field_row", "field_column", "input_map"),
            "filters that estimate the inputs, axes as those of the weights",
        ),
        "bias": (_POSITIONS, "biases of output rows, columns and maps"),
    },
}
"""Names of the axes of each tensor of each type of layer, and what the tensor is."""
_VECTORS = {
    "velocity": "running sum of gradients (momentum)",
    "accumulator": "sum of squared gradients (Adagrad)",
    "mean_square": "running mean of squared gradients (RMSProp)",
    "delay_mean_square": "running mean of squared gradients (delay compensation)",
    "first_moment": "running mean of gradients (Adam)",
    "second_moment": "running mean of squared gradients (Adam)",
    "gradient": "gradient at the current point (L-BFGS)",
    "other gradient": "gradient at the current point (L-BFGS)",
}
"""What a vector of the state is."""
_GROUPS = {
    "parameters": "What has been learned",
    "state": "State of the optimizer, one group for each of its vectors, divided as the parameters are",
    "objective_state": "What the objective has beside its parameters",
    "run": "How the run is described, and what it has done",
    "run/test": "Last evaluation on held-out samples",
    "data": "Training data, and the position in the stream of batches",
    "meaning": "What the numbers of a sample stand for",
    "shards": "In which files the arrays are",
}


class _Described(NamedTuple):
    """One tensor as it is described to other programs."""

    axes: tuple[str, ...]
    text: str


def annotate(file: Any, layout: Layout, info: schema.CheckpointInfo) -> None:
    """Describe the contents of a checkpoint to other programs, by attributes and dimension scales.

    Parameters
    ----------
    file : h5py.File
        Open for writing, with all arrays and datasets; what an earlier call has written is replaced.
    layout
        Of the parameters.
    info
        All but the arrays.
    """
    text_of = {"description": _summary(layout, info), "source": f"dbmpi {info.libraries.get('dbmpi', '')}".strip()}
    for name, text in {**text_of, "created": info.created}.items():
        _set(file.id, name, text)
    numbers = {"step": info.step, "loss": info.loss, "accuracy": info.accuracy}
    for name, number in {**numbers, "test_loss": info.test_loss, "test_accuracy": info.test_accuracy}.items():
        if number is not None:
            _set(file.id, name, number)
    for path, text in _GROUPS.items():
        if path in file:
            _set(file[path].id, "description", text)
    if schema.OPTIONAL_NUMBERS["seconds"] in file:
        _set(file[schema.OPTIONAL_NUMBERS["seconds"]].id, "units", "s")
    layers = _layers(info)
    tensors = _describe(layout, layers)
    for name, layer in layers.items():
        path = f"{schema.PARAMETERS}/{name}"
        if path in file and isinstance(file[path], h5py.Group):
            for key in ("type", "activation"):
                if hasattr(layer, key):
                    _set(file[path].id, key, getattr(layer, key))
    labels = _labels(layout, layers, info.meaning)
    vectors = (schema.PARAMETERS, *file["state"]) if "state" in file else (schema.PARAMETERS,)
    for vector in vectors:
        prefix, group = "" if vector == schema.PARAMETERS else f"{_of_state(vector)}: ", schema.group_of(vector)
        _annotate(file, group, tensors, prefix, {} if prefix else labels)
    if schema.OBJECTIVE_STATE in file:
        arrays = {name: file[f"{schema.OBJECTIVE_STATE}/{name}"].shape for name in _objective_state(file)}
        generic = _generic(arrays)
        state = {name: _Described(generic[name], f"array {name!r} of the objective's state") for name in arrays}
        _annotate(file, schema.OBJECTIVE_STATE, state, "", {})


def _annotate(
    file: Any,
    group: str,
    tensors: Mapping[str, _Described],
    prefix: str,
    labels: Mapping[tuple[str, str], Sequence[str] | Sequence[int]],
) -> None:
    """Describe the arrays in a group, and attach their dimensions to them.

    Parameters
    ----------
    file, group
        Where they are.
    tensors
        By name.
    prefix
        Of their descriptions.
    labels
        By the group in `group`, and the name of a dimension.
    """
    scales: dict[str, Any] = {}
    for name, (axes, text) in tensors.items():
        array = h5py.h5o.open(file.id, f"{group}/{name}".encode())
        if array.get_type().get_class() not in (h5py.h5t.FLOAT, h5py.h5t.INTEGER):
            continue
        _set(array, "description", prefix + text)
        if h5py.h5a.exists(array, b"DIMENSION_LIST"):
            continue
        _set(array, "units", "1")
        within = name.rpartition("/")[0]
        folder = f"{group}/{within}" if within else group
        for number, (axis, length) in enumerate(zip(axes, array.shape, strict=True)):
            path = f"{folder}/{axis}"
            if path not in scales:
                scales[path] = _scale(file, path, length, labels.get((within, axis), ()))
            h5py.h5ds.attach_scale(array, scales[path], number)


def _scale(file: Any, path: str, length: int, labels: Sequence[str] | Sequence[int]) -> Any:
    """Return a new dimension scale, with labels if there is one for each position."""
    space = h5py.h5s.create_simple((length,))
    if len(labels) != length or not length:
        scale = h5py.h5d.create(file.id, path.encode(), h5py.h5t.IEEE_F32BE, space)
        h5py.h5ds.set_scale(scale, f"{_WITHOUT_LABELS}{length:10d}".encode())
        return scale
    # As netCDF has them: texts of fixed length are bytes to h5netcdf.
    kind = h5py.string_dtype() if isinstance(labels[0], str) else np.dtype(np.int64)
    file.create_dataset(path, data=np.array(labels, kind), dtype=kind)
    scale = file[path].id
    h5py.h5ds.set_scale(scale, path.rpartition("/")[2].encode())
    return scale


def _set(node: Any, name: str, value: str | float) -> None:
    """Set an attribute of a node of the low-level interface, which is several times as fast as the other one."""
    if h5py.h5a.exists(node, name.encode()):
        h5py.h5a.delete(node, name.encode())
    data = value.encode() if isinstance(value, str) else value
    kind = h5py.string_dtype("utf-8", max(1, len(data))) if isinstance(data, bytes) else np.array(data).dtype
    space = h5py.h5s.create(h5py.h5s.SCALAR)
    h5py.h5a.create(node, name.encode(), h5py.h5t.py_create(kind, logical=True), space).write(np.array(data, kind))


def _layers(info: schema.CheckpointInfo) -> dict[str, Any]:
    """Return the sections of a network's layers by name; none where no network was learned, or it is not known."""
    try:
        run = config.Run.from_json(info.configuration)
    except (ValueError, UserError, ValidationError, RecursionError):  # as that of a loop of a user's own
        return {}
    network = run.network
    return {} if run.objective is not None else dict(zip(network.layer_names, network.layers, strict=True))


def _describe(layout: Layout, layers: Mapping[str, Any]) -> dict[str, _Described]:
    """Return the description of each tensor by name."""
    found: dict[str, _Described] = {}
    generic = _generic({tensor.name: tensor.shape for tensor in layout.tensors})
    for tensor in layout.tensors:
        layer, _, short = tensor.name.partition("/")
        section = layers.get(layer)
        kind = getattr(section, "type", "")
        axes, text = _AXES.get(kind, {}).get(short, ((), ""))
        free = all(f"{layer}/{axis}" not in layout.offsets for axis in axes)
        if len(axes) == len(tensor.shape) and axes and free:
            found[tensor.name] = _Described(axes, f"{text}, of the {kind} layer {layer}")
        else:
            whose = f"{short!r} of the layer {layer} of type {kind}" if section is not None else repr(tensor.name)
            found[tensor.name] = _Described(generic[tensor.name], f"array {whose}")
    return found


def _generic(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Return names for the axes of arrays of which nothing is known: one for each length, and never twice in an array.

    A name stands for the same length in all groups, because those of a group are known in the groups within it.
    """
    taken = {part for name in shapes for part in name.split("/")}
    names: dict[tuple[int, int], str] = {}
    found: dict[str, tuple[str, ...]] = {}
    for array, shape in shapes.items():
        axes: list[str] = []
        for number, length in enumerate(shape):
            key = length, shape[:number].count(length)
            if key not in names:
                name = f"dim_{len(names)}"
                while name in taken:
                    name += "_"
                names[key] = name
            axes.append(names[key])
        found[array] = tuple(axes)
    return found


def _labels(
    layout: Layout, layers: Mapping[str, Any], meaning: Meaning | None
) -> dict[tuple[str, str], Sequence[str] | Sequence[int]]:
    """Return names of the inputs of the first layer and of the outputs of the last one, if these are dense."""
    if meaning is None or not layers:
        return {}
    named = [name for name, section in layers.items() if isinstance(section, config.Dense)]
    found: dict[tuple[str, str], Sequence[str] | Sequence[int]] = {}
    # Nothing but dropout, which leaves the order of its inputs, may come before or after.
    others = {name for name, section in layers.items() if not isinstance(section, config.Dropout)}
    order = [name for name in layers if name in others]
    if named and order[0] == named[0]:
        found[named[0], "input"] = meaning.input_names
    if named and order[-1] == named[-1]:
        found[named[-1], "unit"] = meaning.labels or meaning.target_names
    return found


def _objective_state(file: Any) -> list[str]:
    """Return the names of the arrays of an objective's state."""
    names: list[str] = []
    file[schema.OBJECTIVE_STATE].visititems(
        lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) and not node.is_scale else None
    )
    return names


def _of_state(vector: str) -> str:
    """Say what a vector of the state is."""
    if vector[:1] in ("s", "y") and vector[1:].isdecimal():
        what = "step" if vector[0] == "s" else "difference of gradients"
        return f"{what} in slot {vector[1:]} of the history (L-BFGS)"
    return _VECTORS.get(vector, f"state {vector!r} of the optimizer")


def _summary(layout: Layout, info: schema.CheckpointInfo) -> str:
    """Return a line on the whole file."""
    parts = [f"Checkpoint of dbmpi: {layout.size:,} parameters after {info.step:,} steps, {info.samples:,} samples"]
    if info.data_name:
        parts.append(f"learned from {info.data_name}")
    for called, loss, accuracy in (
        ("loss", info.loss, info.accuracy),
        (f"test loss at step {info.test_step:,}", info.test_loss, info.test_accuracy),
    ):
        if loss is not None and math.isfinite(loss):
            right = "" if accuracy is None else f" ({accuracy:.2%} correct)"
            parts.append(f"{called} {loss:.4g}{right}")
    return "; ".join(parts)
