"""All arrays of a checkpoint alike, whatever they are: under a name, and read in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import PARAMETERS

BLOCK = 2**20
"""Elements read at a time."""


@dataclass(frozen=True)
class StoredNumbers:
    """An array of a checkpoint.

    Attributes
    ----------
    name : str
        As it is shown: a parameter as ``dense1/weights``, state of the rule as ``accumulator: dense1/weights``, and
        that of an objective as ``objective state: running_mean``.
    shape, dtype
        Of the array.
    read : callable
        ``read(start, stop)`` returns these elements in C order, or raises Damaged; the array is overwritten by the next
        call.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int, int], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def layer(self) -> str:
        """The part of the name before the last slash, or dot as in PyTorch; the name itself where there is none."""
        end = max(self.name.rfind("/"), self.name.rfind("."))
        return self.name[:end] if end > 0 else self.name

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the positions at which blocks of elements begin, and these."""
        for start in range(0, self.size, BLOCK):
            yield start, self.read(start, min(start + BLOCK, self.size))


def parameters(checkpoint: Checkpoint) -> list[StoredNumbers]:
    """Return the parameters of a `checkpoint`, in its order."""
    return _vector(checkpoint, PARAMETERS)


def everything(checkpoint: Checkpoint) -> list[StoredNumbers]:
    """Return all arrays of a `checkpoint`: parameters, state of the rule, state of an objective."""
    found = [array for vector in checkpoint.vectors for array in _vector(checkpoint, vector)]
    return found + objective_state(checkpoint)


def objective_state(checkpoint: Checkpoint) -> list[StoredNumbers]:
    """Return what an objective of the user's own has beside its parameters in a `checkpoint`."""
    return [
        StoredNumbers(f"objective state: {name}", array.shape, array.dtype, partial(checkpoint.read_state, name))
        for name, array in checkpoint.state_arrays.items()
    ]


def _vector(checkpoint: Checkpoint, vector: str) -> list[StoredNumbers]:
    offsets = checkpoint.layout.offsets
    before = "" if vector == PARAMETERS else f"{vector}: "
    buffer = np.empty(
        min(max((tensor.size for tensor in checkpoint.layout.tensors), default=0), BLOCK), checkpoint.dtype
    )
    return [
        StoredNumbers(
            before + tensor.name,
            tensor.shape,
            checkpoint.dtype,
            partial(_read, checkpoint, vector, offsets[tensor.name], buffer),
        )
        for tensor in checkpoint.layout.tensors
    ]


def _read(checkpoint: Checkpoint, vector: str, offset: int, buffer: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return elements of a tensor that begins at `offset` of a vector; in the `buffer`, where they fit into it."""
    part = buffer[: stop - start] if stop - start <= len(buffer) else np.empty(stop - start, buffer.dtype)
    checkpoint.read(vector, offset + start, part)
    return part
