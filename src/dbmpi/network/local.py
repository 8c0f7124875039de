"""The locally connected layer: filters of its own at every place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dbmpi.index.boxes import Box
from dbmpi.kernels.filters import Filters
from dbmpi.kernels.local import Untied
from dbmpi.network.field import FieldLayer


@dataclass(frozen=True)
class LocalLayer(FieldLayer):
    """A locally connected layer, whose filters are not shared (Le et al., ICML 2012; the image networks of the paper).

    Weights are ``(rows, columns, maps, field rows, field columns, channels)`` and biases ``(rows, columns, maps)``: the
    parameters of a row of places lie together, so that those of a box are a few long runs.
    """

    takes_parts: ClassVar[bool] = True
    _kernels: ClassVar[Filters] = Untied()

    @property
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        maps, *places = self.output_shape
        return (*places, maps, *self.field, self.input_shape[0]), (*places, maps)

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return the filters of the places and maps in the box."""
        whole = Box.whole(self.tensors[tensor].shape)
        return Box(
            (*output.starts[1:], output.starts[0], *whole.starts[3:]),
            (*output.stops[1:], output.stops[0], *whole.stops[3:]),
        )
