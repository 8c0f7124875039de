"""A network: layers and a loss, from their description; what computes it is :mod:`dbmpi.replica.replica`."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.index.layout import Layout
from dbmpi.network import own
from dbmpi.network.convolution import ConvolutionLayer
from dbmpi.network.dense import DenseLayer
from dbmpi.network.dropout import DropoutLayer
from dbmpi.network.layer import Layer
from dbmpi.network.local import LocalLayer
from dbmpi.network.losses import Loss, Targets
from dbmpi.network.normalisation import NormalisationLayer
from dbmpi.network.pooling import PoolingLayer


class Network:
    """The network that a configuration describes, for inputs of one shape.

    Parameters
    ----------
    section : config.NetworkSection
        Layers and loss.
    input_shape : tuple[int, ...]
        Shape of one sample.
    seed : int
        Seed of the initial weights, 0 <= seed < 2**63.
    dtype : dtype
        float32, or float64 for tests.
    targets : "classes" or "values"
        What the loss is computed against.
    load : own.Loader
        Where classes of a user's own layers may come from; by default none is loaded.

    Raises
    ------
    UserError
        If the layers do not fit one another or the inputs, or the loss is not defined for such targets.
    """

    def __init__(
        self,
        section: config.NetworkSection,
        input_shape: tuple[int, ...],
        seed: int,
        dtype: Any = np.float32,
        targets: Targets = "classes",
        load: own.Loader = own.refuse,
    ) -> None:
        self.input_shape = tuple(input_shape)
        self.seed = seed
        self.dtype = np.dtype(dtype)
        self.loss = None if section.loss == "reconstruction" else Loss(section.loss, targets)
        """On top of the last layer; None where the layers have objectives of their own."""
        layers: list[Layer] = []
        shape = _with_maps(section, self.input_shape)
        for name, described in zip(section.layer_names, section.layers, strict=True):
            if isinstance(described, config.OwnLayer):
                layers.append(own.make(described, name, shape, load))
            else:
                layers.append(_layer(described, name, shape))
            shape = layers[-1].output_shape
        if len(shape) != 1 and self.loss is not None:
            raise UserError(
                f"network: the last layer, {layers[-1].name!r}, has outputs of shape {shape}, but a loss needs one "
                "axis; end with a dense layer, or one of your own with outputs of shape (units,)"
            )
        self.layers = tuple(layers)
        self.own_layers = tuple(
            layer
            for layer, described in zip(layers, section.layers, strict=True)
            if isinstance(described, config.OwnLayer)
        )

    @cached_property
    def layout(self) -> Layout:
        """The named tensors that the parameter vector is made of, layer after layer."""
        return Layout(tuple(tensor for layer in self.layers for tensor in layer.tensors.values()))

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.layout.size

    @property
    def outputs(self) -> int:
        """Number of outputs of the last layer."""
        return math.prod(self.layers[-1].output_shape)

    @property
    def activations(self) -> tuple[int, ...]:
        """Numbers in one sample of the inputs, and of each layer's outputs."""
        return math.prod(self.input_shape), *(math.prod(layer.output_shape) for layer in self.layers)

    def flops(self, samples: int) -> int:
        """Return the floating-point operations of the matrix products of one gradient; all else is left out."""
        return sum(
            layer.flops(Box.whole(layer.output_shape), samples, input_gradient=place > 0)
            for place, layer in enumerate(self.layers)
        )

    def initial(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the initial parameters at positions ``start ... start + len(out)``, however they are cut."""
        owners = [(layer, short) for layer in self.layers for short in layer.tensors]
        numbers = {tensor.name: number for number, tensor in enumerate(self.layout.tensors)}
        for tensor, first, last in self.layout.pieces(start, start + out.size):
            number = numbers[tensor.name]
            layer, short = owners[number]
            position = self.layout.offsets[tensor.name] + first - start
            layer.initial(short, out[position : position + last - first], self.seed, number, first)


def _layer(described: config.BuiltInLayer, name: str, input_shape: tuple[int, ...]) -> Layer:
    """Return the layer that a section describes."""
    match described:
        case config.Dense():
            return DenseLayer.from_config(described, name, input_shape)
        case config.Local():
            return LocalLayer.from_config(described, name, input_shape)
        case config.Convolution():
            return ConvolutionLayer.from_config(described, name, input_shape)
        case config.Pooling():
            return PoolingLayer.from_config(described, name, input_shape)
        case config.Normalisation():
            return NormalisationLayer.from_config(described, name, input_shape)
        case config.Dropout():
            return DropoutLayer.from_config(described, name, input_shape)


def _with_maps(section: config.NetworkSection, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that the first layer sees: an image without maps is an image of one map."""
    first = next(layer for layer in section.layers if not isinstance(layer, config.Dropout))
    return (1, *shape) if len(shape) == 2 and not isinstance(first, config.Dense) else shape
