"""How many of a rank's threads are worth waking for a network: few, where a layer takes less than a millisecond.

A parallel loop or product costs some ten microseconds to wake each thread, and far more on cores that others use, too:
a thread that does not run lets all others wait at the end of each loop.  The number follows from the network alone, not
from a measurement, so that the same run uses as many threads every time and rounds alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dbmpi.index.boxes import Box
from dbmpi.kernels import compile as compiling
from dbmpi.machine import openblas, threads

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer

GRAIN = 3e7
"""Operations of a layer, forwards and backwards over a batch, that are worth a thread: 0.3 ms of a core."""
VECTOR_GRAIN = 4_000_000
"""Parameters of a rank that are worth a thread, whatever the layers: vectors are limited by memory."""


def worthwhile(layers: Sequence[Layer], partitions: int, samples: int) -> int:
    """Return the number of threads that a worker can use well.

    Parameters
    ----------
    layers
        Of the network.
    partitions
        Workers that share each layer.
    samples
        Samples that are computed together.
    """
    work = sum(layer.flops(Box.whole(layer.output_shape), samples) for layer in layers)
    size = sum(tensor.size for layer in layers for tensor in layer.tensors.values())
    return max(1, int(work / len(layers) / partitions / GRAIN), size // partitions // VECTOR_GRAIN)


@contextmanager
def fitted(layers: Sequence[Layer], partitions: int, samples: int) -> Iterator[str]:
    """Use no more threads in the block than are worthwhile, unless the user has chosen a number; give a remark on it.

    Parameters
    ----------
    layers, partitions, samples
        As for `worthwhile`.

    Yields
    ------
    str
        For the line on threads; empty where all of them are used.
    """
    prepared = threads.prepare()
    number = worthwhile(layers, partitions, samples)
    if prepared.given or number >= prepared.threads:
        compiling.limit_threads(prepared.kernels)
        yield ""
        return
    # A number that dbmpi has not set is a user's choice.
    changed = [library for library in openblas.loaded() if library.threads == prepared.threads]
    try:
        compiling.limit_threads(number)
        for library in changed:
            library.set_threads(number)
        yield (
            f"{number} of them used, as the layers are small for batches of {samples}; OMP_NUM_THREADS="
            f"{prepared.threads} forces all"
        )
    finally:
        compiling.limit_threads(prepared.kernels)
        for library in changed:
            library.set_threads(prepared.threads)
