"""The common base of the layers that are part of dbmpi: each keeps its section of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.index.layout import Tensor
from dbmpi.network.initial import fill_uniform, weight_deviation
from dbmpi.network.layer import Computation

S = TypeVar("S", bound=config.BuiltInLayer)
W = TypeVar("W", bound=config.Dense | config.Local | config.Convolution)


@dataclass(frozen=True)
class BuiltIn(Computation, Generic[S]):
    """A layer that a section describes; by default it has no parameters, and outputs of the shape of its inputs.

    Parameters
    ----------
    name : str
        Unique in the network.
    input_shape : tuple[int, ...]
        Of one sample.
    section
        The layer's settings.

    Raises
    ------
    UserError
        If the layer does not fit the inputs.
    """

    name: str
    input_shape: tuple[int, ...]
    section: S

    def __post_init__(self) -> None:
        """Raise UserError where the layer does not fit the inputs."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample."""
        return self.input_shape

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The parameters: short name -> tensor of the layout."""
        return {}

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Refuse: there are no parameters."""
        raise KeyError(tensor)

    def initial(self, tensor: str, out: np.ndarray, seed: int, number: int, start: int) -> None:
        """Refuse: there are no parameters."""
        raise KeyError(tensor)


class Weighted(BuiltIn[W]):
    """A layer of units that each sum up weighted inputs, add a bias and apply an activation."""

    @property
    def inputs(self) -> int:
        """Number of inputs of one output."""
        raise NotImplementedError

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by its short name."""
        raise NotImplementedError

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The parameters: short name -> tensor of the layout."""
        return {short: Tensor(f"{self.name}/{short}", shape) for short, shape in self._shapes.items()}

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the floating-point operations of the products for the box `output`, forward and backward."""
        return (6 if input_gradient else 4) * output.size * self.inputs * samples

    def initial(self, tensor: str, out: np.ndarray, seed: int, number: int, start: int) -> None:
        """Fill `out` with zeros for biases, and with weights that keep the size of activations."""
        if tensor == "bias":
            out[:] = 0
        else:
            deviation = self.section.initial_scale * weight_deviation(self.inputs, self.section.activation)
            fill_uniform(out, seed, number, start, deviation)
