"""A layer of your own: maxout units, with kernels of their own.

Put a file like this beside your configuration and name the class in it::

    [[network.layers]]
    type = "own_layer:Maxout"
    units = 100
    pieces = 3

It is made as ``Maxout(name, input_shape, units=100, pieces=3)``, and is then cut over partitions, trained and written
to checkpoints like any other.  It contains no communication.  What makes it parallel is that it can say which inputs
and which parameters a box of its outputs needs, and can compute any box from just those: `dbmpi.network.layer.Layer`
is the whole contract.

Arrays are batch-innermost, ``(*features, samples)``, and float32; tests also run it in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit, prange

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.index.layout import Tensor
from dbmpi.network.initial import fill_uniform
from dbmpi.network.layer import Backward, Forward


@dataclass(frozen=True)
class Maxout:
    """Maxout units: ``y[u] = max over p of (W[u, p] x + b[u, p])``.

    Goodfellow et al., "Maxout networks", ICML 2013.
    """

    name: str
    input_shape: tuple[int, ...]
    units: int
    pieces: int = 2

    def __post_init__(self) -> None:
        if self.units < 1 or self.pieces < 1:
            raise UserError(
                f"layer {self.name!r}: {self.units} units of {self.pieces} pieces were asked for; "
                "both must be at least 1"
            )

    @property
    def output_shape(self) -> tuple[int, ...]:
        """One output a unit."""
        return (self.units,)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The whole parameters; their full names are those in a checkpoint."""
        inputs = math.prod(self.input_shape)
        return {
            "weights": Tensor(f"{self.name}/weights", (self.units, self.pieces, inputs)),
            "bias": Tensor(f"{self.name}/bias", (self.units, self.pieces)),
        }

    def initial(self, tensor: str, out: np.ndarray, seed: int, number: int, start: int) -> None:
        """Fill `out` with the values of a flattened tensor from `start` on: the same for any part that is requested."""
        if tensor == "bias":
            out[:] = 0
        else:
            fill_uniform(out, seed, number, start, deviation=1 / math.sqrt(math.prod(self.input_shape)))

    def input_box(self, output: Box) -> Box:
        """Every unit needs all inputs."""
        return Box.whole(self.input_shape)

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return those parameters that belong to the units in the box."""
        shape = self.tensors[tensor].shape
        return Box((output.starts[0], *(0 for _ in shape[1:])), (output.stops[0], *shape[1:]))

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        """Return the operations: all pieces forward, and backward for each sample the one that was largest."""
        backward = 4 if input_gradient else 2
        return (2 * self.pieces + backward) * output.size * math.prod(self.input_shape) * samples

    def forward(self, task: Forward) -> None:
        """Compute the outputs of the units in the box; ``task.parameters`` are theirs alone."""
        largest_piece(task.parameters["weights"], task.parameters["bias"], _rows(task.inputs), task.outputs)

    def backward(self, task: Backward) -> None:
        """Compute the gradients: overwrite them with the part that comes from the units in the box."""
        weights, bias, inputs = task.parameters["weights"], task.parameters["bias"], _rows(task.inputs)
        share = np.zeros((*bias.shape, inputs.shape[1]), inputs.dtype)  # of each piece in its unit's gradient
        gradient_of_pieces(weights, bias, inputs, task.gradient, share)
        np.sum(share, axis=2, out=task.parameter_gradient["bias"])
        pieces = share.reshape(-1, share.shape[2])
        if task.input_gradient is not None:
            np.matmul(weights.reshape(len(pieces), -1).T, pieces, out=_rows(task.input_gradient))
        np.matmul(pieces, inputs.T, out=task.parameter_gradient["weights"].reshape(len(pieces), -1))


def _rows(activations: np.ndarray) -> np.ndarray:
    """Return activations (*features, samples) as (features, samples), the same memory."""
    return activations.reshape(-1, activations.shape[-1])


# Kernels are compiled once and cached, and release the GIL (nogil), because a run may move parameters in a thread
# while they compute.  Loops over prange are shared by the threads of the process; those over samples, which lie side
# by side, become vector instructions.


@njit(cache=True, nogil=True, parallel=True, fastmath={"contract"})
def largest_piece(weights: np.ndarray, bias: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """Set outputs (units, samples) to the largest piece of each unit."""
    for unit in prange(outputs.shape[0]):
        values, largest = np.empty_like(outputs[unit]), outputs[unit]
        for piece in range(bias.shape[1]):
            compute_piece(weights[unit, piece], bias[unit, piece], inputs, values)
            for sample in range(values.size):
                if piece == 0 or values[sample] > largest[sample]:
                    largest[sample] = values[sample]


@njit(cache=True, nogil=True, parallel=True, fastmath={"contract"})
def gradient_of_pieces(
    weights: np.ndarray, bias: np.ndarray, inputs: np.ndarray, gradient: np.ndarray, share: np.ndarray
) -> None:
    """Give each unit's gradient to its first largest piece; `share` (units, pieces, samples) holds zeros."""
    for unit in prange(gradient.shape[0]):
        values, largest = np.empty_like(gradient[unit]), np.empty_like(gradient[unit])
        winner = np.zeros(largest.size, np.int64)
        for piece in range(bias.shape[1]):
            compute_piece(weights[unit, piece], bias[unit, piece], inputs, values)
            for sample in range(values.size):
                if piece == 0 or values[sample] > largest[sample]:
                    largest[sample], winner[sample] = values[sample], piece
        for sample in range(winner.size):
            share[unit, winner[sample], sample] = gradient[unit, sample]


@njit(cache=True, nogil=True, fastmath={"contract"})
def compute_piece(weights: np.ndarray, bias: float, inputs: np.ndarray, values: np.ndarray) -> None:
    """Set values (samples,) to ``weights inputs + bias``; one weight multiplies all samples."""
    values[:] = bias
    for feature in range(weights.size):
        weight, row = weights[feature], inputs[feature]
        for sample in range(values.size):
            values[sample] += weight * row[sample]
