"""One provider of matrix products for all ranks of a run, so that results do not depend on who measured what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.kernels import matmul
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together
from dbmpi.network.dense import DenseLayer

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.network.layer import Layer

_PROBE_SECONDS = 600.0


def agree_on_products(comm: MPI.Intracomm, layers: Sequence[Layer], samples: int) -> str | None:
    """Let all ranks use the provider that the first one has chosen (collective).

    Where one of them does not have it, all take the one that is always there.

    Parameters
    ----------
    comm
        The ranks.
    layers
        Of the network; none of whose products may be large enough for there to be a choice.
    samples
        Samples of a batch.

    Returns
    -------
    str or None
        The provider; None where there is no choice to make, which saves the measurement.

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
