"""A network: layers and a loss, from their description; :mod:`dbmpi.replica.replica` computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.index.layout import Layout
from dbmpi.network import own
from dbmpi.network.dense import DenseLayer
from dbmpi.network.dropout import DropoutLayer
from dbmpi.network.field import ConvolutionLayer, LocalLayer
from dbmpi.network.layer import Layer, takes_bfloat16
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
        float32, or float64 for tests, but not with products of bfloat16.
    targets : "classes" or "values"
        Kind of the targets of the loss.
    load : own.Loader
        Where classes of a user's own layers may come from; by default none is loaded.

    Raises
    ------
    UserError
        If the layers do not fit one another or the inputs, or the loss is not defined for such targets, or the dtype
        not for the precision.

    Attributes
    ----------
    precision : str
        Of the products: "float32", which is that of the dtype, or "bfloat16".
    rounded : tuple of bool
        For each layer, whether it multiplies numbers that are rounded to bfloat16.
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
        if not section.layers:
            raise UserError(
                "there is no network: the configuration has no [[network.layers]]; an [objective] of your own has no "
                "layers that could be cut or timed"
            )
        self.input_shape = tuple(input_shape)
        self.seed = seed
        self.dtype = np.dtype(dtype)
        self.precision = section.precision
        if self.precision != "float32" and self.dtype != np.float32:
            raise UserError(
                f"network.precision = {self.precision!r} rounds float32 parameters, and these are {self.dtype}: "
                'set precision = "float32", which keeps the dtype of the parameters'
            )
        self.loss = None if section.loss == "reconstruction" else Loss(section.loss, targets)
        """On top of the last layer; None where the layers have objectives of their own."""
        layers: list[Layer] = []
        shape = _with_maps(section, self.input_shape)
        for name, described in zip(section.layer_names, section.layers, strict=True):
            layers.append(layer_of(described, name, shape, load))
            shape = layers[-1].output_shape
        if len(shape) != 1 and self.loss is not None:
            raise UserError(
                f"network: the last layer, {layers[-1].name!r}, has outputs of shape {shape}, but a loss needs one "
                "axis; end with a dense layer, or one of your own with outputs of shape (units,)"
            )
        self.layers = tuple(layers)
        self.rounded = tuple(map(self.rounds, layers))
        sections = zip(layers, section.layers, strict=True)
        self.own_layers = tuple(layer for layer, described in sections if isinstance(described, config.OwnLayer))

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

    def rounds(self, layer: Layer) -> bool:
        """Return whether a `layer` of this network multiplies numbers that are rounded to bfloat16."""
        return self.precision == "bfloat16" and takes_bfloat16(layer)

    def flops(self, samples: int) -> int:
        """Return the floating-point operations of one gradient of a batch of `samples`, without loss and update."""
        return sum(
            layer.flops(Box.whole(layer.output_shape), samples, input_gradient=number > 0)
            for number, layer in enumerate(self.layers)
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


def layer_of(section: config.Section, name: str, input_shape: tuple[int, ...], load: own.Loader = own.refuse) -> Layer:
    """Return the layer that a section describes: the one function that turns sections into layers.

    Parameters
    ----------
    section
        Its settings.
    name : str
        Unique in the network.
    input_shape : tuple[int, ...]
        Of one sample.
    load
        Where the class of a layer of the user's own may come from.

    Raises
    ------
    UserError
        If the layer does not fit the inputs, or its class may not be loaded or is no layer.
    """
    if isinstance(section, config.OwnLayer):
        return own.make(section, name, input_shape, load)
    return _LAYERS[type(section)](name, input_shape, section)


_LAYERS: dict[type[config.Section], Callable[[str, tuple[int, ...], Any], Layer]] = {
    config.Dense: DenseLayer,
    config.Local: LocalLayer,
    config.Convolution: ConvolutionLayer,
    config.Pooling: PoolingLayer,
    config.Normalisation: NormalisationLayer,
    config.Dropout: DropoutLayer,
}


def _with_maps(section: config.NetworkSection, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the first layer's inputs: an image without maps is an image of one map."""
    first = next(layer for layer in section.layers if not isinstance(layer, config.Dropout))
    return (1, *shape) if len(shape) == 2 and not isinstance(first, config.Dense) else shape
