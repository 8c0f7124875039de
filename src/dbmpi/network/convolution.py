"""The convolution: the same filters at every place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dbmpi.index.boxes import Box
from dbmpi.kernels.convolution import Tied
from dbmpi.kernels.filters import Filters
from dbmpi.network.field import FieldLayer


@dataclass(frozen=True)
class ConvolutionLayer(FieldLayer):
    """A convolution (a correlation, as everywhere in the field); valid borders.

    Weights are ``(maps, channels, field rows, field columns)`` and biases ``(maps,)``.  Boxes of different places share
    the filters of their maps; their gradients for these add up.
    """

    _kernels: ClassVar[Filters] = Tied()

    @property
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.maps, self.input_shape[0], *self.field), (self.maps,)

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return the filters of the maps in the box."""
        whole = Box.whole(self.tensors[tensor].shape)
        return Box((output.starts[0], *whole.starts[1:]), (output.stops[0], *whole.stops[1:]))
