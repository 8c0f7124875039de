"""Minimum, mean, maximum and standard deviation of arrays of any size, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.paramserver.layout import Tensor

BLOCK = 2**18
"""Elements looked at together: their float64 copies stay in the caches."""
LARGEST_CHUNK = 2**28
"""Bytes; a larger chunk of a data file is not read."""


class Statistics:
    """Of the finite values added so far; the others are counted.

    Attributes
    ----------
    count, non_finite : int
        Values added, and how many of them are NaN or infinite.
    minimum, maximum, mean : float
        Of the finite values; NaN if there are none.
    """

    def __init__(self) -> None:
        self.count = 0
        self.non_finite = 0
        self.minimum = math.nan
        self.maximum = math.nan
        self.mean = math.nan
        self._squares = 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of the finite values (divided by their number); NaN if there are none."""
        return math.sqrt(self._squares / self._finite) if self._finite else math.nan

    def add(self, values: np.ndarray) -> None:
        """Add numbers of any shape; sums are float64."""
        flat = values.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(flat), BLOCK):
                self._add_block(flat[start : start + BLOCK])

    @property
    def _finite(self) -> int:
        return self.count - self.non_finite

    def _add_block(self, block: np.ndarray) -> None:
        before = self._finite
        self.count += len(block)
        if block.dtype.kind == "f":
            finite = np.isfinite(block)
            if not finite.all():
                block = block[finite]
                self.non_finite += len(finite) - len(block)
        if len(block) == 0:
            return
        values = block.astype(np.float64)
        mean = float(values.mean())
        values -= mean
        squares = float(values @ values)
        if before == 0:
            self.minimum, self.maximum = float(block.min()), float(block.max())
            self.mean, self._squares = mean, squares
            return
        self.minimum = min(self.minimum, float(block.min()))
        self.maximum = max(self.maximum, float(block.max()))
        # Two sets of values together (Chan, Golub, LeVeque: Updating formulae, 1979):
        # S = S1 + S2 + (m2 - m1)^2 n1 n2 / (n1 + n2),  m = m1 + (m2 - m1) n2 / (n1 + n2)
        difference = mean - self.mean
        share = len(block) / self._finite
        self._squares += squares + difference * difference * before * share
        self.mean += difference * share


def of_tensor(checkpoint: Checkpoint, vector: str, tensor: Tensor) -> Statistics:
    """Return the statistics of one tensor of a checkpoint."""
    statistics = Statistics()
    start = checkpoint.layout.offsets[tensor.name]
    buffer = np.empty(min(tensor.size, 16 * BLOCK), checkpoint.dtype)
    for first in range(0, tensor.size, max(len(buffer), 1)):
        part = buffer[: tensor.size - first]
        checkpoint.read(vector, start + first, part)
        statistics.add(part)
    return statistics


def of_dataset(dataset: h5py.Dataset) -> Statistics | str:
    """Return the statistics of a dataset of numbers, or why there are none."""
    if dataset.dtype.kind not in "iufb" or dataset.shape is None:
        return "no numbers"
    if dataset.is_virtual or dataset.external:
        return "the values lie in other files, which are not followed"
    if dataset.chunks is None:
        complete = dataset.id.get_storage_size() == dataset.nbytes
        places = _boxes(dataset.shape, 16 * BLOCK)
    else:
        if math.prod(dataset.chunks) * dataset.dtype.itemsize > LARGEST_CHUNK:
            return f"its chunks are larger than {LARGEST_CHUNK // 2**20} MiB"
        chunks = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        complete = dataset.id.get_num_chunks() == chunks
        places = dataset.iter_chunks() if chunks else iter(())
    if not complete:
        return "not all of it was written"
    statistics = Statistics()
    for place in places:
        statistics.add(np.asarray(dataset[place]))
    return statistics


def _boxes(shape: tuple[int, ...], elements: int) -> Iterator[tuple[slice, ...]]:
    """Cut an array into boxes of at most so many elements, in the order in which it is stored."""
    if math.prod(shape) <= elements:
        yield tuple(slice(0, length) for length in shape)
        return
    row = math.prod(shape[1:])
    if row > elements:
        for index in range(shape[0]):
            for below in _boxes(shape[1:], elements):
                yield slice(index, index + 1), *below
        return
    rows = elements // row
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0])), *(slice(0, length) for length in shape[1:])


def as_dict(found: Statistics | str) -> dict[str, Any]:
    """Return the statistics for JSON, which has no NaN; or the reason under ``"not_read"``."""
    if isinstance(found, str):
        return {"not_read": found}
    numbers = {"min": found.minimum, "mean": found.mean, "max": found.maximum, "std": found.deviation}
    return {
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "non_finite": found.non_finite,
    }
