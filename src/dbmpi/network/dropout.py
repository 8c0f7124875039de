"""Dropout: while training, values are dropped at random."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.kernels.dropout import drop
from dbmpi.network.builtin import BuiltIn
from dbmpi.network.layer import Backward, Context, Forward


class DropoutLayer(BuiltIn[config.Dropout]):
    """Each value is zero with probability `rate`, and otherwise divided by ``1 - rate``; off while evaluating.

    After Hinton et al., "Improving neural networks by preventing co-adaptation of feature detectors", 2012; scaled
    while training, so that evaluation needs no change.  Whether a value is dropped depends only on the seed of the run,
    the step, the layer's name, the value's position in the whole layer and the sample's number in the batch: it is the
    same however the layer is cut.
    """

    def input_box(self, output: Box) -> Box:
        """Each output needs its own input."""
        return output

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the operations for the box `output`: one product for each value, forward and backward."""
        return (2 if input_gradient else 1) * output.size * samples

    def forward(self, task: Forward) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        self._apply(task.output, task.inputs, task.outputs, task.context)

    def backward(self, task: Backward) -> None:
        """Compute the inputs' gradient with the mask of the forward pass (see the contract of a layer)."""
        if task.input_gradient is not None:
            self._apply(task.output, task.gradient, task.input_gradient, task.context)

    def _apply(self, output: Box, values: np.ndarray, result: np.ndarray, context: Context) -> None:
        threshold = round(self.section.rate * 2**32)
        if not context.training or threshold == 0:
            np.copyto(result, values)
            return
        samples = values.shape[-1]
        drop(
            values.reshape(-1, samples),
            _numbers(output, self.output_shape),
            _stream(context.seed, context.step, self.name),
            min(threshold, 2**32 - 1),
            1 / (1 - self.section.rate),
            result.reshape(-1, samples),
        )


def _numbers(box: Box, shape: tuple[int, ...]) -> np.ndarray:
    """Return the positions of a box's elements in the flattened layer, int64, in the order of the box."""
    numbers = np.zeros(1, np.int64)
    for axis, (start, stop) in enumerate(zip(box.starts, box.stops, strict=True)):
        positions = np.arange(start, stop, dtype=np.int64) * math.prod(shape[axis + 1 :])
        numbers = (numbers[:, np.newaxis] + positions).reshape(-1)
    return numbers


def _stream(seed: int, step: int, name: str) -> np.uint64:
    """Return the generator's key: 64 bits that differ wherever one of these does."""
    digest = hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
