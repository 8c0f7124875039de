"""Layers as a placement sees them, without arithmetic, and the networks of the paper made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import ClassVar

from dbmpi.index.boxes import Box
from dbmpi.index.layout import Layout, Tensor


@dataclass(frozen=True)
class Dense:
    """Weights (units, inputs), one bias a unit."""

    name: str
    input_shape: tuple[int, ...]
    units: int

    @property
    def output_shape(self):
        return (self.units,)

    @cached_property
    def tensors(self):
        return {
            "weights": Tensor(f"{self.name}/weights", (self.units, math.prod(self.input_shape))),
            "bias": Tensor(f"{self.name}/bias", (self.units,)),
        }

    def input_box(self, output):
        assert not output.empty
        return Box.whole(self.input_shape)

    def tensor_box(self, tensor, output):
        whole = Box.whole(self.tensors[tensor].shape)
        return Box(output.starts + whole.starts[1:], output.stops + whole.stops[1:])

    def inputs_of(self, output):
        """Yield every input that one output depends on: the definition, against which plans are held."""
        yield from product(*map(range, self.input_shape))


class SplitDense(Dense):
    """One that can be split by inputs."""

    def partial_tensor_box(self, tensor, inputs, output):
        if tensor == "bias":
            return output
        return Box((0, *inputs.starts), (self.units, *inputs.stops))

    partial_forward = finish_forward = begin_backward = partial_backward = partial_tensor_box


@dataclass(frozen=True)
class Filter:
    """(maps, height, width) of fields without borders; untied: a filter at every place; tied: a convolution."""

    name: str
    input_shape: tuple[int, ...]
    maps: int
    field: tuple[int, int]
    stride: int = 1
    tied: bool = False

    @property
    def output_shape(self):
        _, height, width = self.input_shape
        return (self.maps, *((n - f) // self.stride + 1 for n, f in zip((height, width), self.field, strict=True)))

    @cached_property
    def tensors(self):
        place = () if self.tied else self.output_shape[1:]
        return {
            "weights": Tensor(f"{self.name}/weights", (self.maps, *place, self.input_shape[0], *self.field)),
            "bias": Tensor(f"{self.name}/bias", (self.maps, *place)),
        }

    def input_box(self, output):
        assert not output.empty
        (_, *starts), (_, *stops) = output.starts, output.stops
        return Box(
            (0, *(start * self.stride for start in starts)),
            (
                self.input_shape[0],
                *((stop - 1) * self.stride + field for stop, field in zip(stops, self.field, strict=True)),
            ),
        )

    def tensor_box(self, tensor, output):
        whole = Box.whole(self.tensors[tensor].shape)
        axes = 1 if self.tied else 3
        return Box(output.starts[:axes] + whole.starts[axes:], output.stops[:axes] + whole.stops[axes:])

    def inputs_of(self, output):
        _, y, x = output
        for channel in range(self.input_shape[0]):
            for row in range(self.field[0]):
                for column in range(self.field[1]):
                    yield channel, y * self.stride + row, x * self.stride + column


@dataclass(frozen=True)
class Pooling:
    """Every map by itself; fields may overlap."""

    name: str
    input_shape: tuple[int, ...]
    field: int
    stride: int = 1
    tensors: ClassVar = {}

    @property
    def output_shape(self):
        maps, height, width = self.input_shape
        return (maps, (height - self.field) // self.stride + 1, (width - self.field) // self.stride + 1)

    def input_box(self, output):
        assert not output.empty
        (m, *starts), (n, *stops) = output.starts, output.stops
        return Box(
            (m, *(start * self.stride for start in starts)),
            (n, *((stop - 1) * self.stride + self.field for stop in stops)),
        )

    def inputs_of(self, output):
        m, y, x = output
        for row in range(self.field):
            for column in range(self.field):
                yield m, y * self.stride + row, x * self.stride + column


@dataclass(frozen=True)
class Normalisation:
    """All maps in a window of windows, which ends at the borders; the shape stays."""

    name: str
    input_shape: tuple[int, ...]
    window: int
    tensors: ClassVar = {}

    @property
    def output_shape(self):
        return self.input_shape

    def input_box(self, output):
        assert not output.empty
        reach = 2 * (self.window // 2)
        (_, *starts), (_, *stops) = output.starts, output.stops
        return Box(
            (0, *(max(start - reach, 0) for start in starts)),
            (self.input_shape[0], *(min(b + reach, n) for b, n in zip(stops, self.input_shape[1:], strict=True))),
        )

    def inputs_of(self, output):
        _, y, x = output
        reach = 2 * (self.window // 2)
        maps, height, width = self.input_shape
        for m in range(maps):
            for row in range(max(y - reach, 0), min(y + reach + 1, height)):
                for column in range(max(x - reach, 0), min(x + reach + 1, width)):
                    yield m, row, column


@dataclass(frozen=True)
class Elementwise:
    """Every output from its own input, in any shape."""

    name: str
    input_shape: tuple[int, ...]
    tensors: ClassVar = {}

    @property
    def output_shape(self):
        return self.input_shape

    def input_box(self, output):
        assert not output.empty
        return output

    def inputs_of(self, output):
        yield output


def layout_of(layers):
    return Layout(tuple(tensor for layer in layers for tensor in layer.tensors.values()))


def speech_network(dense=SplitDense):
    """440 inputs, four layers of 2560, 8192 states (paper, section 5)."""
    widths = [440, 2560, 2560, 2560, 2560, 8192]
    return [dense(f"dense{i}", (a,), b) for i, (a, b) in enumerate(pairwise(widths), 1)]


def image_network(maps, classes=21_000):
    """100x100x3; three stages of untied 10x10 filters, pooling and 5x5 normalisation, as in examples/images-*."""
    layers, shape = [], (3, 100, 100)
    strides = {8: (1, 3, 1), 16: (1, 1, 6), 36: (1, 1, 3)}[maps]
    for stage, (window, stride) in enumerate(zip((6, 5, 6), strides, strict=True), 1):
        layers.append(Filter(f"local{stage}", shape, maps, (10, 10)))
        layers.append(Pooling(f"pool{stage}", layers[-1].output_shape, window, stride))
        layers.append(Normalisation(f"normalise{stage}", layers[-1].output_shape, 5))
        shape = layers[-1].output_shape
    return [*layers, Dense("classes", shape, classes)]


NETWORKS = {
    "speech": speech_network,
    "images-8": lambda: image_network(8),
    "images-16": lambda: image_network(16),
    "images-36": lambda: image_network(36),
}


def indices(box):
    """Yield every index of a box."""
    yield from product(*(range(start, stop) for start, stop in zip(box.starts, box.stops, strict=True)))
