"""A trained network as a graph of ONNX: everything from the stored inputs to what ``dbmpi predict`` writes.

Samples come first, as everywhere outside of dbmpi's kernels: activations are (samples, maps, rows, columns).  Layers
that ONNX lacks are put together from its operators: filters that are not shared gather their fields and multiply, and
the Gaussian windows of local contrast normalisation are products with the matrices of rows and columns.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from dbmpi.errors import DiskFailed, UserError
from dbmpi.network import normalisation, pooling
from dbmpi.network.dense import DenseLayer
from dbmpi.network.description import Network
from dbmpi.network.dropout import DropoutLayer
from dbmpi.network.field import ConvolutionLayer, FieldLayer, LocalLayer
from dbmpi.network.layer import Layer
from dbmpi.network.normalisation import NormalisationLayer
from dbmpi.network.pooling import PoolingLayer

OPSET, IR = 17, 8
"""Versions of the operators and of the format: of 2022, which most programs read."""
INPUTS, OUTPUTS = "inputs", "outputs"
LARGEST = 2**31 - 2**24
"""Bytes of parameters up to which they are in the same file as the graph, which cannot be larger than 2 GiB."""
_ACTIVATIONS = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu"}


def write(path: Path, model: onnx.ModelProto, facts: Mapping[str, str]) -> None:
    """Write a model; parameters that do not fit into the same file are beside it, in one that ends in ``.data``.

    Parameters
    ----------
    path, model
        The file, and what is written.
    facts
        Texts by name, kept in the file.

    Raises
    ------
    DiskFailed
        If it cannot be written; a file that was there before is untouched then.
    """
    helper.set_model_props(model, dict(facts))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            if sum(len(constant.raw_data) for constant in model.graph.initializer) > LARGEST:
                external_data_helper.convert_model_to_external_data(model, location=f"{path.name}.data")
            onnx.save_model(model, str(Path(folder) / path.name))
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the data first
                with file.open("rb") as written:
                    os.fsync(written.fileno())
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise DiskFailed(f"{path}: cannot be written: {error.strerror or error}") from None


def graph(
    network: Network,
    read: Callable[[str], np.ndarray],
    *,
    stored_bytes: bool,
    scale: float,
    moves: Sequence[np.ndarray] = (),
) -> onnx.ModelProto:
    """Return the model of ONNX that predicts as the network does.

    Its input ``inputs`` is (samples, *shape of one sample), of float32, or of uint8 where the data were stored so; its
    output ``outputs`` (samples, outputs) of float32.

    Parameters
    ----------
    network
        The network.
    read
        ``read(name)`` returns the values of a tensor.
    stored_bytes
        Whether inputs are bytes.
    scale
        Factor on bytes; other inputs are those that the network sees.
    moves
        Where inputs are normalised: what is subtracted from each, and what it is multiplied by then.

    Raises
    ------
    UserError
        If the network has layers of the user's own.
    """
    making = _Graph(read)
    value = making.scaled(INPUTS, stored_bytes, scale)
    for operator, numbers in zip(("Sub", "Mul"), moves, strict=False):
        value = making.node(operator, value, making.constant(numbers.reshape(1, *network.input_shape)))
    first = network.layers[0].input_shape
    if first != network.input_shape:  # an image without maps
        value = making.node("Reshape", value, making.shape(0, *first))
    for layer in network.layers:
        value = making.layer(layer, value)
    if len(network.layers[-1].output_shape) > 1:
        value = making.node("Flatten", value, axis=1)
    loss = "" if network.loss is None else network.loss.name
    if loss in ("softmax", "logistic"):
        value = making.node("Softmax", value, axis=1) if loss == "softmax" else making.node("Sigmoid", value)
    making.nodes.append(helper.make_node("Identity", [value], [OUTPUTS]))
    kind = TensorProto.UINT8 if stored_bytes else TensorProto.FLOAT
    made = helper.make_graph(
        making.nodes,
        "network",
        [helper.make_tensor_value_info(INPUTS, kind, ["samples", *network.input_shape])],
        [helper.make_tensor_value_info(OUTPUTS, TensorProto.FLOAT, ["samples", network.outputs])],
        making.constants,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(made, producer_name="dbmpi", opset_imports=opsets, ir_version=IR)


class _Graph:
    """Nodes and constants, as they are made; values are known by their names."""

    def __init__(self, read: Callable[[str], np.ndarray]) -> None:
        self._read = read
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output, and return that."""
        output = f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, values: np.ndarray, name: str = "") -> str:
        """Add a constant, and return its name."""
        name = name or f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def number(self, value: float) -> str:
        """Add a single number."""
        return self.constant(np.array(value, np.float32))

    def shape(self, *lengths: int) -> str:
        """Add a shape; 0 is the length of that axis before."""
        return self.constant(np.array(lengths, np.int64))

    def scaled(self, value: str, stored_bytes: bool, scale: float) -> str:
        """Turn stored inputs into those that the network sees."""
        if not stored_bytes:
            return value
        return self.node("Mul", self.node("Cast", value, to=TensorProto.FLOAT), self.number(scale))

    def layer(self, layer: Layer, value: str) -> str:
        """Add a layer, and return its outputs."""
        add = _LAYERS.get(type(layer))  # a class that inherits from one of these may compute something else
        if add is not None:
            return add(self, layer, value)
        raise UserError(
            f"layer {layer.name!r} is a {type(layer).__name__} of your own, which ONNX cannot express; export the "
            "parameters as .npz or .safetensors"
        )

    def tensor(self, layer: Layer, short: str) -> str:
        """Add a parameter as it is in the checkpoint."""
        name = layer.tensors[short].name
        return self.constant(self._read(name).astype(np.float32, copy=False), name)

    def activated(self, layer: DenseLayer | FieldLayer[Any], value: str) -> str:
        """Apply the activation."""
        operator = _ACTIVATIONS.get(layer.section.activation)
        return value if operator is None else self.node(operator, value)

    def dense(self, layer: DenseLayer, value: str) -> str:
        if len(layer.input_shape) > 1:
            value = self.node("Flatten", value, axis=1)
        weights, bias = self.tensor(layer, "weights"), self.tensor(layer, "bias")
        return self.activated(layer, self.node("Gemm", value, weights, bias, transB=1))

    def convolution(self, layer: ConvolutionLayer, value: str) -> str:
        weights, bias = self.tensor(layer, "weights"), self.tensor(layer, "bias")
        return self.activated(layer, self.node("Conv", value, weights, bias, strides=[layer.section.stride] * 2))

    def local(self, layer: LocalLayer, value: str) -> str:
        fields = _fields(layer.input_shape, layer.output_shape[1:], layer.field, layer.section.stride)
        positions, inputs = fields.shape
        maps = layer.section.maps
        name = layer.tensors["weights"].name
        filters = self._read(name).reshape(positions, maps, inputs).astype(np.float32, copy=False)
        bias = self._read(layer.tensors["bias"].name).reshape(positions, 1, maps).astype(np.float32, copy=False)
        flat = self.node("Flatten", value, axis=1)
        seen = self.node("Gather", flat, self.constant(fields.reshape(-1)), axis=1)
        seen = self.node("Reshape", seen, self.shape(0, positions, inputs))
        seen = self.node("Transpose", seen, perm=[1, 0, 2])
        sums = self.node("MatMul", seen, self.constant(filters.transpose(0, 2, 1), name))
        sums = self.node("Add", sums, self.constant(bias))
        sums = self.node("Transpose", sums, perm=[1, 2, 0])
        return self.activated(layer, self.node("Reshape", sums, self.shape(0, *layer.output_shape)))

    def pooling(self, layer: PoolingLayer, value: str) -> str:
        window = {"kernel_shape": list(layer.size), "strides": [layer.section.stride] * 2}
        if layer.section.kind == "max":
            return self.node("MaxPool", value, **window)
        if layer.section.kind == "average":
            return self.node("AveragePool", value, **window)
        mean = self.node("AveragePool", self.node("Mul", value, value), **window)
        sums = self.node("Mul", mean, self.number(math.prod(layer.size)))
        return self.node("Sqrt", self.node("Add", sums, self.number(pooling.EPSILON)))

    def normalisation(self, layer: NormalisationLayer, value: str) -> str:
        maps, *lengths = layer.input_shape
        rows, columns = (normalisation.smoothing(length, layer.section.window) for length in lengths)
        left = self.constant((rows / maps).astype(np.float32))
        right = self.constant(columns.T.astype(np.float32))
        axis = self.constant(np.array([1], np.int64))

        def smoothed(field: str) -> str:
            total = self.node("ReduceSum", field, axis, keepdims=1)
            return self.node("MatMul", left, self.node("MatMul", total, right))

        centred = self.node("Sub", value, smoothed(value))
        deviation = self.node("Sqrt", smoothed(self.node("Mul", centred, centred)))
        return self.node("Div", centred, self.node("Max", deviation, self.number(layer.section.floor)))

    def dropout(self, layer: DropoutLayer, value: str) -> str:
        return value


_LAYERS: dict[type, Callable[[_Graph, Any, str], str]] = {
    DenseLayer: _Graph.dense,
    ConvolutionLayer: _Graph.convolution,
    LocalLayer: _Graph.local,
    PoolingLayer: _Graph.pooling,
    NormalisationLayer: _Graph.normalisation,
    DropoutLayer: _Graph.dropout,
}


def _fields(input_shape: tuple[int, ...], positions: Sequence[int], field: tuple[int, int], stride: int) -> np.ndarray:
    """Return for each position the numbers of the inputs that its filters see, in the order of their weights.

    int64 (positions, inputs); weights are (field rows, field columns, channels).
    """
    numbers = np.arange(math.prod(input_shape), dtype=np.int64).reshape(input_shape)
    windows = np.lib.stride_tricks.sliding_window_view(numbers, field, axis=(1, 2))[:, ::stride, ::stride]
    return windows.transpose(1, 2, 3, 4, 0).reshape(math.prod(positions), -1)
