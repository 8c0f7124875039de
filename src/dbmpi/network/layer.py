"""The contract of a layer: it answers which input box an output box needs, and computes any output box of its own.

No layer contains communication.  From :meth:`Layer.input_box` alone an exchange between ranks is planned, so that any
layer can be cut in any way, and a new layer is parallel for free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.index.layout import Tensor

Arrays = Mapping[str, np.ndarray]
"""A layer's tensors by their short names, e.g. ``weights`` and ``bias``: the boxes that an output box needs."""


@dataclass(frozen=True)
class Context:
    """The step that a pass of a layer is part of."""

    training: bool = True
    """False while evaluating: dropout is off."""
    seed: int = 0
    """Seed of the run."""
    step: int = 0
    """A number that differs from step to step and from replica to replica, for masks that are drawn anew."""


@dataclass(slots=True)
class Forward:
    """A forward pass of a layer for the outputs in a box.

    Arrays of activations are ``(*box shape, samples)``, C-contiguous, float32 or float64; but see :func:`takes_parts`.
    """

    output: Box
    """The outputs to compute; never empty."""
    parameters: Arrays
    """Of each tensor the part in ``tensor_box(name, output)``."""
    inputs: np.ndarray
    """The inputs in ``input_box(output)``."""
    outputs: np.ndarray
    """Of the box; a forward pass writes them, a backward pass may read them."""
    context: Context


def _nothing() -> None:
    """Do nothing."""


@dataclass(slots=True)
class Backward(Forward):
    """A backward pass of a layer for the outputs in a box, after the forward pass of the same box."""

    gradient: np.ndarray
    """For the outputs in the box; may be overwritten."""
    parameter_gradient: Arrays
    """Overwritten with the gradient for `parameters`: the part that comes from this box."""
    input_gradient: np.ndarray | None
    """Overwritten with the gradient for `inputs`, the part that comes from this box; the parts of several boxes add up.
    None where no other layer needs it."""
    add: bool = False
    """Whether a layer that :func:`accrues` adds to `parameter_gradient`, instead of overwriting it."""
    rounded_gradient: np.ndarray | None = None
    """Memory like `gradient`, uint16, where a layer that :func:`takes_bfloat16` may round it; None in float32."""
    inputs_done: Callable[[], None] = _nothing
    """May be called as soon as `input_gradient` is complete, if there is more to do: other ranks wait for it."""


class Computation(Protocol):
    """What a layer can be asked: everything but its shapes."""

    def input_box(self, output: Box) -> Box:
        """Return the inputs that the outputs in the box `output` need."""
        ...

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return the part of a tensor, by its short name, that the outputs in the box `output` need."""
        ...

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the floating-point operations of a forward and a backward pass for the outputs in the box `output`.

        `samples` is the size of the batch; `input_gradient` says whether the gradient for the inputs is computed, too.
        """
        ...

    def initial(self, tensor: str, out: np.ndarray, seed: int, number: int, start: int) -> None:
        """Fill `out` with the initial values of a flattened tensor: the same values for any part.

        Parameters
        ----------
        tensor : str
            Short name of the tensor.
        out : 1-D array
        seed, number : int
            Seed of the run; number of the tensor in the layout.
        start : int
            Position in the flattened tensor of the first value.
        """
        ...

    def forward(self, task: Forward) -> None:
        """Write ``task.outputs``."""
        ...

    def backward(self, task: Backward) -> None:
        """Write ``task.parameter_gradient`` and, where there is one, ``task.input_gradient``."""
        ...


class Layer(Computation, Protocol):
    """A description of a layer; frozen, holds no arrays.

    It is never asked for an empty box: a worker that owns none of its outputs needs and computes nothing.
    """

    @property
    def name(self) -> str:
        """Name of the layer, unique in its network."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample's inputs, e.g. ``(channels, height, width)``."""
        ...

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one sample's outputs, e.g. ``(units,)`` or ``(maps, height, width)``."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The whole parameters: short name -> tensor of the layout."""
        ...


@runtime_checkable
class InParts(Protocol):
    """Offered by a layer of maps, beyond `Layer`, if it can compute some outputs before all inputs have arrived."""

    def forward_part(self, task: Forward, part: Box) -> None:
        """Write the outputs in `part`, a box within ``task.output``: all of its maps at some rows and columns."""
        ...


@runtime_checkable
class SplitByInputs(Protocol):
    """Offered by a layer with one axis of inputs, beyond `Layer`, if its work can be split by inputs, too.

    A worker then makes of the inputs that it owns a part of the sums behind *all* outputs; added up, they become the
    outputs of the workers that own them.
    """

    def partial_tensor_box(self, tensor: str, inputs: Box, output: Box) -> Box:
        """Return the part of a tensor that a worker needs to multiply the inputs in a box if it owns `output`."""
        ...

    def partial_forward(self, parameters: Arrays, inputs: np.ndarray, sums: np.ndarray) -> None:
        """Compute what some inputs (inputs, samples) contribute to the sums (all outputs, samples).

        `parameters` are the parts in ``partial_tensor_box`` of these inputs.
        """
        ...

    def finish_forward(self, parameters: Arrays, outputs: np.ndarray) -> None:
        """Turn the complete sums of the outputs that a worker owns into outputs, in place, with its `parameters`."""
        ...

    def begin_backward(self, task: Backward) -> None:
        """Turn ``task.gradient`` for owned outputs into that for their sums, in place; write the bias' gradient."""
        ...

    def partial_backward(self, task: Backward) -> None:
        """Compute the gradients for some inputs and their parameters from ``task.gradient``, that for all sums."""
        ...


@runtime_checkable
class Reconstructing(Protocol):
    """Offered by a layer, beyond `Layer`, if its inputs can be estimated from its outputs: an autoencoder's decoder.

    Then ``reconstruction * sum (estimate - input)^2`` may be a part of the loss.
    """

    @property
    def reconstruction(self) -> float:
        """Weight of the squared error; 0 where nothing is reconstructed."""
        ...

    def reconstruct(self, output: Box, parameters: Arrays, outputs: np.ndarray, estimate: np.ndarray) -> None:
        """Compute what the outputs in a box contribute to the estimate of the inputs in ``input_box(output)``.

        Parameters
        ----------
        output : Box
            The outputs.
        parameters
            Of each tensor the part in ``tensor_box(name, output)``.
        outputs : (*box shape, samples) array
        estimate : (*input box shape, samples) array
            Overwritten.
        """
        ...

    def reconstruct_backward(
        self,
        output: Box,
        parameters: Arrays,
        outputs: np.ndarray,
        estimate_gradient: np.ndarray,
        parameter_gradient: Arrays,
        gradient: np.ndarray,
    ) -> None:
        """Compute gradients from that for the estimate.

        Parameters
        ----------
        output, parameters, outputs
            As in `reconstruct`, after it.
        estimate_gradient
            For the complete estimate of the inputs in ``input_box(output)``.
        parameter_gradient
            Overwritten for the tensors of the decoder; `Layer.backward` leaves these alone.
        gradient
            For the outputs in the box; the part that comes from the estimate is added.
        """
        ...


def accrues(layer: Layer) -> bool:
    """Whether a layer's class says ``accruing = True``: it adds to the gradient of its parameters if a task says so.

    That saves a pass over memory where the gradients of several steps are added up.  It holds for this class alone: one
    that is derived from it may compute otherwise.
    """
    return bool(vars(type(layer)).get("accruing", False))


def takes_parts(layer: Layer) -> bool:
    """Whether a layer's class says ``takes_parts = True``: its `outputs` and `gradient` need not be C-contiguous.

    They may then be parts of larger arrays, the inputs of the next layer and their gradient, which saves copying them
    there and back; only the last two axes, columns and samples, are sure to be in one piece.  It holds
    for this class alone.
    """
    return bool(vars(type(layer)).get("takes_parts", False))


BIAS = "bias"
"""Short name of the tensor that is added, and not multiplied."""


def takes_bfloat16(layer: Layer) -> bool:
    """Whether a layer's class says ``takes_bfloat16 = True``: it can multiply numbers that are rounded to bfloat16.

    In a network of that precision it is then given its inputs, and all tensors but the `BIAS`, as arrays of uint16: see
    :mod:`dbmpi.kernels.bfloat16`.  All other arrays are float32 as ever.  It holds for this class alone.
    """
    return bool(vars(type(layer)).get("takes_bfloat16", False))
