"""Before a clock runs: compile what a network needs, and let all ranks multiply matrices by the same provider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.kernels import matmul
from dbmpi.kernels.bfloat16_filters import rounded_copy
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together
from dbmpi.network.dense import DenseLayer
from dbmpi.network.layer import Backward, Context, Forward
from dbmpi.replica.operands import Operands

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.network.description import Network
    from dbmpi.network.layer import Layer

_UNITS = 64
_PROBE_SECONDS = 600.0
"""How long the ranks wait for the first one to measure the providers of matrix products."""


def use_layers(network: Network, samples: int, *, backward: bool = True) -> None:
    """Compute a few outputs of every layer, and their gradients, on zeros.

    Parameters
    ----------
    network
        Its layers, their precision, and the dtype of parameters and activations.
    samples
        Samples of a batch.
    backward
        Whether gradients will be computed, too.
    """
    context, dtype = Context(training=backward), network.dtype
    for layer, rounded in zip(network.layers, network.rounded, strict=True):
        # A small box of outputs, so that a large network costs no more than a small one, but a whole batch: which
        # product is taken depends on the shapes.
        first, *others = layer.output_shape
        output = Box((0,) * (1 + len(others)), (min(first, _UNITS), *(1 for _ in others)))
        tensors = {name: np.zeros(layer.tensor_box(name, output).shape, dtype) for name in layer.tensors}
        inputs = np.zeros((*layer.input_box(output).shape, samples), dtype)
        given, below = Operands((rounded,)).of(0, tensors), np.empty_like(inputs)
        inputs = rounded_copy(inputs) if rounded else inputs
        outputs = np.zeros((*output.shape, samples), dtype)
        layer.forward(Forward(output, given, inputs, outputs, context))
        if backward:
            gradients = {name: np.zeros_like(values) for name, values in tensors.items()}
            task = Backward(output, given, inputs, outputs, context, outputs.copy(), gradients, below)
            task.rounded_gradient = rounded_copy(outputs) if rounded else None
            layer.backward(task)


def agree_on_products(comm: MPI.Intracomm, layers: Sequence[Layer], samples: int) -> tuple[str, ...]:
    """Let all ranks use the providers that the first one has chosen (collective).

    Parameters
    ----------
    comm
        The ranks.
    layers
        Of the network; the largest product is timed, and without a large one there is no choice.
    samples
        Samples of a batch.

    Returns
    -------
    tuple[str, ...]
        The provider of each kind of product; empty where there is no choice, which saves the measurement.

    Raises
    ------
    UserError
        On every rank, if the environment of the first one names a provider that is not there.
    """
    sizes = [_products(layer, samples) for layer in layers]  # none, for an objective of the user's own
    largest = max(sizes, default=0)
    if largest < matmul.LARGE:
        return ()
    units = layers[sizes.index(largest)].output_shape[0]
    chosen = np.zeros(len(matmul.KINDS), np.int64)
    with together(comm, "choosing the providers of matrix products", seconds=_PROBE_SECONDS):
        if comm.rank == 0:
            names = matmul.providers((units, largest // (units * samples), samples))
            chosen[:] = [matmul.PROVIDERS.index(name) for name in names]
    waiting.broadcast(comm, chosen, 0, "the providers of matrix products")
    matmul.use([matmul.PROVIDERS[number] for number in chosen])
    return matmul.providers()


def _products(layer: Layer, samples: int) -> int:
    """Return the multiplications of a layer's largest matrix product."""
    if not isinstance(layer, DenseLayer):
        return 0
    return layer.flops(Box.whole(layer.output_shape), samples, input_gradient=False) // 4
