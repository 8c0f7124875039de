"""What locally connected layers and convolutions have in common: filters that see a field of all maps below."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.network.initial import fill_uniform, weight_deviation
from dbmpi.partition.boxes import Box


@dataclass(frozen=True)
class FieldLayer:
    """A layer of filters, valid borders.

    Inputs are ``(channels, height, width)``, outputs ``(maps, (height - rows) // stride + 1, (width - columns) //
    stride + 1)`` for a field of ``(rows, columns)``.

    Raises
    ------
    UserError
        If the inputs have no rows and columns, or the field is larger than they are.
    """

    name: str
    input_shape: tuple[int, ...]
    maps: int
    field: tuple[int, int]
    stride: int = 1
    activation: str = "linear"
    initial_scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.input_shape) != 3:
            raise UserError(
                f"layer {self.name!r}: a field needs inputs of shape (channels, height, width), and those are of shape "
                f"{self.input_shape}: it can follow a layer with maps, or images"
            )
        if any(window > length for window, length in zip(self.field, self.input_shape[1:], strict=True)):
            raise UserError(
                f"layer {self.name!r}: a field of shape {self.field} does not fit into inputs of shape "
                f"{self.input_shape} (channels, height, width): make the field smaller, or the strides below it"
            )

    @classmethod
    def described(cls, section: config.Local | config.Convolution, name: str, input_shape: tuple[int, ...]) -> Self:
        """Make the layer that a configuration describes."""
        field = section.field if isinstance(section.field, tuple) else (section.field, section.field)
        return cls(name, input_shape, section.maps, field, section.stride, section.activation, section.initial_scale)

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample."""
        space = zip(self.input_shape[1:], self.field, strict=True)
        return (self.maps, *((length - window) // self.stride + 1 for length, window in space))

    @property
    def inputs(self) -> int:
        """Number of inputs of one output."""
        return self.input_shape[0] * self.field[0] * self.field[1]

    def input_box(self, output: Box) -> Box:
        """Return the rows and columns of the fields, of all channels."""
        if output.empty:
            return Box((0, 0, 0), (0, 0, 0))
        stops = ((stop - 1) * self.stride + window for stop, window in zip(output.stops[1:], self.field, strict=True))
        return Box((0, *(start * self.stride for start in output.starts[1:])), (self.input_shape[0], *stops))

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the floating-point operations of the filters in a forward and a backward pass."""
        return (6 if input_gradient else 4) * output.size * self.inputs * samples

    def initial(self, tensor: str, out: np.ndarray, seed: int, number: int, start: int) -> None:
        """Fill `out` with the initial values of a flattened tensor from position `start` on.

        Parameters
        ----------
        tensor : str
            Short name of the tensor.
        out : 1-D array
        seed, number : int
            Seed of the run and number of the tensor in the layout.
        start : int
        """
        if tensor == "bias":
            out[:] = 0
        else:
            deviation = self.initial_scale * weight_deviation(self.inputs, self.activation)
            fill_uniform(out, seed, number, start, deviation)
