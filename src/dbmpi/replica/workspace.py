"""A worker's arrays for one batch size, kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.kernels.memory import aligned_empty


class Workspace:
    """Activations of every layer, and room for gradients.

    Where a layer's inputs hold all that this worker owns of the outputs below, the layer below writes these there at
    once, and an exchange only adds what others own; the same with their gradients.

    Gradients take turns in buffers: that for the outputs of a layer, that for its inputs, where the two are apart,
    that for the outputs of the layer below (in turn, too: it arrives while the one above is in use), and that
    for sums over the inputs of several workers.

    Parameters
    ----------
    owned
        Of each layer, the outputs that this worker computes.
    needed
        Of each layer, the inputs that it needs.
    within
        Of each layer, whether the owned outputs of the layer below can be a part of the array of its inputs.
    gaps
        Of each layer, whether its outputs may be a part that is not one piece.
    summed
        Of each layer split by inputs, the outputs to which this worker contributes; otherwise empty.
    linear
        Whether the last layer needs its outputs no more once the loss has seen them.

    Attributes
    ----------
    outputs, inputs
        Arrays ``(*box shape, samples)``, one a layer; outputs may be parts of inputs.
    """

    def __init__(
        self,
        owned: Sequence[Box],
        needed: Sequence[Box],
        within: Sequence[bool],
        gaps: Sequence[bool],
        summed: Sequence[Box],
        samples: int,
        dtype: np.dtype[np.floating],
        linear: bool,
    ) -> None:
        self._owned, self._needed, self._summed = owned, needed, summed
        self._samples, self._dtype, self._linear = samples, dtype, linear
        self.inputs = [np.empty(0, dtype), *(aligned_empty((*box.shape, samples), dtype) for box in needed[1:])]
        self.outputs: list[np.ndarray] = []
        self._parts: list[tuple[slice, ...] | None] = [None]
        for place, box in enumerate(owned, 1):
            if place < len(owned) and within[place]:
                part = box.slices(needed[place])
                outputs = self.inputs[place][part]
                if gaps[place - 1] or outputs.flags.c_contiguous:
                    self.outputs.append(outputs)
                    self._parts.append(part)
                    continue
            self.outputs.append(aligned_empty((*box.shape, samples), dtype))
            self._parts.append(None)
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
        if place == len(self._owned):
            return self.outputs[-1] if self._linear else self._room(place % 2, self._owned[-1])
        part = self._parts[place]
        return self._room(place % 2 + 2, self._owned[place - 1]) if part is None else self.input_gradient(place)[part]

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
