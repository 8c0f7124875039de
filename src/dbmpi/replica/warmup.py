"""Calling what a network's layers compile, before a clock runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.mpi import blocking, waiting
from dbmpi.network.layer import Backward, Context, Forward

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.network.layer import Layer

_UNITS = 64
_COMPILING_SECONDS = 3600.0
"""How long the ranks of a node wait for the one that compiles the kernels."""


def first_on_each_node(comm: MPI.Intracomm, use_kernels: Callable[[], object]) -> None:
    """Compile on one rank of each node; the others then find the kernels in the cache (collective)."""
    node = blocking.on_this_host(comm, "the other ranks to compile the kernels")
    for turn in (0, 1):
        if (node.rank != 0) == bool(turn):
            use_kernels()
        waiting.complete(node.Ibarrier(), "the kernels to be compiled", seconds=_COMPILING_SECONDS)
    blocking.free(node)


def use_layers(layers: Sequence[Layer], samples: int, dtype: np.dtype[np.floating], *, backward: bool = True) -> None:
    """Compute a few outputs of every layer, and their gradients, on zeros."""
    context = Context(training=backward)
    for layer in layers:
        # A small box of outputs, so that a large network costs no more than a small one, but a whole batch: which
        # product is taken depends on the shapes.
        first, *others = layer.output_shape
        output = Box((0,) * (1 + len(others)), (min(first, _UNITS), *(1 for _ in others)))
        tensors = {name: np.zeros(layer.tensor_box(name, output).shape, dtype) for name in layer.tensors}
        inputs = np.zeros((*layer.input_box(output).shape, samples), dtype)
        outputs = np.zeros((*output.shape, samples), dtype)
        layer.forward(Forward(output, tensors, inputs, outputs, context))
        if backward:
            gradients = {name: np.zeros_like(values) for name, values in tensors.items()}
            below = np.empty_like(inputs)
            layer.backward(Backward(output, tensors, inputs, outputs, context, outputs.copy(), gradients, below))
