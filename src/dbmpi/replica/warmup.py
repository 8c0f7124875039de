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


def agree_on_products(comm: MPI.Intracomm, layers: Sequence[Layer], samples: int) -> str | None:
    """Let all ranks use the provider that the first one has chosen (collective).

    Where one of them does not have it, all use the one that is always available.

    Parameters
    ----------
    comm
        The ranks.
    layers
        Of the network; without a large product there is no choice.
    samples
        Samples of a batch.

    Returns
    -------
    str or None
        The provider; None where there is no choice, which saves the measurement.

    Raises
    ------
    UserError
        On every rank, if the environment of the first one names a provider that is not there.
    """
    from mpi4py import MPI

    if not any(_products(layer, samples) >= matmul.LARGE for layer in layers):
        return None
    usable = np.array([name in matmul.available() for name in matmul.PROVIDERS], np.int64)
    usable = waiting.allreduce(comm, usable, MPI.MIN, "the providers of matrix products of the other ranks")
    chosen = np.zeros(1, np.int64)
    with together(comm, "choosing the provider of matrix products", seconds=_PROBE_SECONDS):
        if comm.rank == 0:
            chosen[0] = matmul.PROVIDERS.index(matmul.provider())
    waiting.broadcast(comm, chosen, 0, "the provider of matrix products")
    name = matmul.PROVIDERS[int(chosen[0]) if usable[chosen[0]] else 0]
    matmul.use(name)
    return name


def _products(layer: Layer, samples: int) -> int:
    """Return the multiplications of a layer's largest matrix product."""
    if not isinstance(layer, DenseLayer):
        return 0
    return layer.flops(Box.whole(layer.output_shape), samples, input_gradient=False) // 4
