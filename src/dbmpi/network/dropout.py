"""Dropout: while training, values are dropped at random."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.kernels.dropout import drop
from dbmpi.network.layer import Backward, Context, Forward, Parameterless


@dataclass(frozen=True)
class DropoutLayer(Parameterless):
    """Each value is zero with probability `rate`, and otherwise divided by ``1 - rate``; off while evaluating.

    After Hinton et al., "Improving neural networks by preventing co-adaptation of feature detectors", 2012; scaled
    while training, so that evaluation needs no change.  Whether a value is dropped depends on the seed of the run, the
    step, the layer's name, the value's place in the whole layer and the sample's number in the batch, and on nothing
    else: it is the same however the layer is cut.

    Raises
    ------
    UserError
        If the rate is not in [0, 1).
    """

    name: str
    input_shape: tuple[int, ...]
    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UserError(f"layer {self.name!r}: the rate of dropout is {self.rate}, but must be in 0 <= rate < 1")

    @classmethod
    def from_config(cls, section: config.Dropout, name: str, input_shape: tuple[int, ...]) -> DropoutLayer:
        """Make the layer that a configuration describes."""
        return cls(name, input_shape, section.rate)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample, that of the inputs."""
        return self.input_shape

    def input_box(self, output: Box) -> Box:
        """Each output needs its own input."""
        return output

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the operations: one product for each value, forward and backward."""
        return (2 if input_gradient else 1) * output.size * samples

    def forward(self, task: Forward) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        self._apply(task.output, task.inputs, task.outputs, task.context)

    def backward(self, task: Backward) -> None:
        """Compute the inputs' gradient with the mask of the forward pass (see the contract of a layer)."""
        if task.input_gradient is not None:
            self._apply(task.output, task.gradient, task.input_gradient, task.context)

    def _apply(self, output: Box, values: np.ndarray, result: np.ndarray, context: Context) -> None:
        threshold = round(self.rate * 2**32)
        if not context.training or threshold == 0:
            np.copyto(result, values)
            return
        samples = values.shape[-1]
        drop(
            values.reshape(-1, samples),
            _numbers(output, self.output_shape),
            _stream(context.seed, context.step, self.name),
            min(threshold, 2**32 - 1),
            1 / (1 - self.rate),
            result.reshape(-1, samples),
        )


def _numbers(box: Box, shape: tuple[int, ...]) -> np.ndarray:
    """Return the positions of a box's places in the flattened layer, int64, in the order of the box."""
    numbers = np.zeros(1, np.int64)
    for axis, (start, stop) in enumerate(zip(box.starts, box.stops, strict=True)):
        places = np.arange(start, stop, dtype=np.int64) * math.prod(shape[axis + 1 :])
        numbers = (numbers[:, np.newaxis] + places).reshape(-1)
    return numbers


def _stream(seed: int, step: int, name: str) -> np.uint64:
    """Return the generator's key: 64 bits that differ wherever one of these does."""
    digest = hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
