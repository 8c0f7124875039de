"""A worker's arrays for one batch size, kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.kernels import bfloat16
from dbmpi.kernels.memory import aligned_empty


@dataclass(frozen=True)
class Footprint:
    """The boxes of one layer whose values a worker keeps."""

    owned: Box
    """The outputs that it computes."""
    needed: Box
    """The inputs that it needs."""
    summed: Box | None
    """For a layer split by inputs, the outputs to which it contributes."""
    within: bool
    """Whether the owned outputs of the layer below can be a part of the array of the inputs."""
    gaps: bool
    """Whether the layer can write its outputs with gaps: as a part of a larger array that is not one piece."""
    rounded: bool = False
    """Whether the layer multiplies numbers that are rounded to bfloat16."""


class Workspace:
    """Activations of every layer, and buffers for gradients.

    Where a layer's inputs hold all that this worker owns of the outputs below, the layer below writes these there at
    once, and an exchange only adds what others own; the same with their gradients.

    Gradients take turns in buffers: that for the outputs of a layer, that for its inputs, where the two are apart,
    that for the outputs of the layer below (in turn, too: it arrives while the one above is in use), and that
    for sums over the inputs of several workers.

    Parameters
    ----------
    layers
        The boxes of each.
    samples
        Of a batch.
    dtype
        Of all arrays.
    linear
        Whether the last layer needs its outputs no more once the loss has seen them.

    Attributes
    ----------
    inputs, outputs
        Arrays ``(*box shape, samples)``, one a layer; outputs may be parts of inputs.
    batch
        The network's inputs, of which those of the first layer are a part.
    """

    def __init__(
        self, layers: Sequence[Footprint], samples: int, dtype: np.dtype[np.floating], *, linear: bool
    ) -> None:
        self._layers, self._samples, self._dtype, self._linear = layers, samples, dtype, linear
        nothing = np.empty(0, dtype)
        self.batch = nothing
        self.inputs = [nothing, *(self._array(layer.needed) for layer in layers[1:])]
        self.outputs: list[np.ndarray] = []
        self._parts: list[tuple[slice, ...] | None] = []
        """Of each layer, where its outputs are among the inputs of the layer above."""
        for number, layer in enumerate(layers):
            above = layers[number + 1] if number + 1 < len(layers) else None
            part = layer.owned.slices(above.needed) if above is not None and above.within else None
            outputs = self.inputs[number + 1][part] if part is not None else nothing
            if part is None or not (layer.gaps or outputs.flags.c_contiguous):
                part, outputs = None, self._array(layer.owned)
            self.outputs.append(outputs)
            self._parts.append(part)
        self._copied_inputs: np.ndarray | None = None
        kept = [box for layer in layers for box in (layer.owned, layer.summed) if box is not None]
        self._largest = max(box.size for box in (*kept, *(layer.needed for layer in layers[1:]))) * samples
        self._buffers: dict[int, np.ndarray] = {}
        self._rounded = {
            number: aligned_empty((*layer.needed.shape, samples), bfloat16.BFLOAT16)
            for number, layer in enumerate(layers)
            if layer.rounded
        }
        """The inputs of layers that multiply bfloat16."""
        gradients = [(layer.summed or layer.owned).size for layer in layers if layer.rounded]
        self._rounded_gradient = aligned_empty(max(gradients, default=0) * samples, bfloat16.BFLOAT16)

    def take(self, batch: np.ndarray) -> None:
        """Use the needed part of the inputs of a batch, ``(*input shape, samples)``; without copying it if possible."""
        self.batch = batch
        part = batch[self._layers[0].needed.slices()]
        if not part.flags.c_contiguous or part.dtype != self._dtype:
            if self._copied_inputs is None:
                self._copied_inputs = aligned_empty(part.shape, self._dtype)
            np.copyto(self._copied_inputs, part)
            part = self._copied_inputs
        self.inputs[0] = part

    def operands(self, number: int) -> np.ndarray:
        """Return the inputs of layer `number` as it multiplies them: its `inputs`, or what `round_inputs` wrote."""
        return self._rounded.get(number, self.inputs[number])

    def round_inputs(self, number: int) -> None:
        """Round the inputs of layer `number`, as they are now, if it multiplies bfloat16."""
        if number in self._rounded:
            bfloat16.rounded(self.inputs[number], self._rounded[number])

    def rounded_gradient(self, number: int) -> np.ndarray | None:
        """Return memory to round the gradient for layer `number`'s outputs, or sums, if it multiplies bfloat16."""
        layer = self._layers[number]
        if not layer.rounded:
            return None
        box = layer.summed or layer.owned
        return self._rounded_gradient[: box.size * self._samples].reshape(*box.shape, self._samples)

    def output_gradient(self, number: int) -> np.ndarray:
        """Return the buffer for the gradient for the outputs of layer `number`."""
        last = number == len(self._layers) - 1
        if last and self._linear:
            return self.outputs[-1]
        part = self._parts[number]
        if part is not None:
            return self.input_gradient(number + 1)[part]
        return self._buffer((number + 1) % 2 + (0 if last else 2), self._layers[number].owned)

    def input_gradient(self, number: int) -> np.ndarray:
        """Return the buffer for the gradient for the inputs of layer `number`."""
        return self._buffer(number % 2, self._layers[number].needed)

    def sums(self, number: int) -> np.ndarray:
        """Return the buffer for the sums of layer `number`, which is split by inputs, or for their gradient."""
        summed = self._layers[number].summed
        assert summed is not None
        return self._buffer(4, summed)

    def _array(self, box: Box) -> np.ndarray:
        return aligned_empty((*box.shape, self._samples), self._dtype)

    def _buffer(self, which: int, box: Box) -> np.ndarray:
        if which not in self._buffers:
            self._buffers[which] = aligned_empty(self._largest, self._dtype)
        return self._buffers[which][: box.size * self._samples].reshape(*box.shape, self._samples)
