"""A worker's arrays for one batch size, kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dbmpi.kernels.memory import aligned_empty
from dbmpi.partition.boxes import Box


class Workspace:
    """Activations of every layer, and room for gradients.

    Gradients take turns in buffers: that for the outputs of a layer, that for its inputs, where an exchange lies
    between, that for the outputs of the layer below (in turn, too: it arrives while the one above is in use), and that
    for sums over the inputs of several workers.

    Parameters
    ----------
    owned
        Of each layer, the outputs that this worker computes.
    needed
        Of each layer, the inputs that it needs.
    in_place
        Of each layer, whether its inputs are just the owned outputs of the layer below.
    summed
        Of each layer split by inputs, the outputs to which this worker contributes; otherwise empty.
    linear
        Whether the last layer needs its outputs no more once the loss has seen them.

    Attributes
    ----------
    outputs, inputs
        Arrays ``(*box shape, samples)``, one a layer.
    """

    def __init__(
        self,
        owned: Sequence[Box],
        needed: Sequence[Box],
        in_place: Sequence[bool],
        summed: Sequence[Box],
        samples: int,
        dtype: np.dtype[np.floating],
        linear: bool,
    ) -> None:
        self._owned, self._needed, self._in_place, self._summed = owned, needed, in_place, summed
        self._samples, self._dtype, self._linear = samples, dtype, linear
        self.outputs = [aligned_empty((*box.shape, samples), dtype) for box in owned]
        self.inputs = [np.empty(0, dtype)]
        for place, box in enumerate(needed[1:], 1):
            below = self.outputs[place - 1]
            self.inputs.append(below if in_place[place] else aligned_empty((*box.shape, samples), dtype))
        self._copied_inputs: np.ndarray | None = None
        self._largest = max((box.size for box in (*owned, *needed[1:], *summed)), default=0) * samples
        self._buffers: dict[int, np.ndarray] = {}

    def take(self, inputs: np.ndarray) -> None:
        """Use the needed part of a batch as the first layer's inputs; the batch itself where that is all of it."""
        part = inputs[self._needed[0].slices()]
        if part.flags.c_contiguous and part.dtype == self._dtype:
            self.inputs[0] = part
            return
        if self._copied_inputs is None:
            self._copied_inputs = aligned_empty(part.shape, self._dtype)
        np.copyto(self._copied_inputs, part)
        self.inputs[0] = self._copied_inputs

    def gradient(self, place: int) -> np.ndarray:
        """Return room for the gradient for the outputs of layer number ``place - 1``."""
        if place == len(self._owned) and self._linear:
            return self.outputs[-1]
        # With nothing between, the gradient for the inputs of the layer above is the same array.
        apart = place < len(self._owned) and not self._in_place[place]
        return self._room(place % 2 + (2 if apart else 0), self._owned[place - 1])

    def input_gradient(self, place: int) -> np.ndarray:
        """Return room for the gradient for the inputs of layer number `place`."""
        return self._room(place % 2, self._needed[place])

    def sums(self, place: int) -> np.ndarray:
        """Return room for the sums of layer number `place`, or the gradient for them."""
        return self._room(4, self._summed[place])

    def _room(self, which: int, box: Box) -> np.ndarray:
        if which not in self._buffers:
            self._buffers[which] = aligned_empty(self._largest, self._dtype)
        return self._buffers[which][: box.size * self._samples].reshape(*box.shape, self._samples)
