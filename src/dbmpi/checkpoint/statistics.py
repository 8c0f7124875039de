"""Minimum, mean, maximum and standard deviation of arrays of any size, in bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.untrusted import chunk_bytes, elsewhere, unwritten
from dbmpi.index.layout import Tensor

BLOCK = 2**16
"""Elements added together: their float64 copies stay in the caches."""
PIECE = 2**22
"""Elements read at a time, in whole chunks: a call of HDF5 costs as much as some thousand elements."""
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
        self._scratch = np.empty(0)

    @property
    def deviation(self) -> float:
        """Standard deviation of the finite values (divided by their number); NaN if there are none."""
        return math.sqrt(self._squares / self._finite) if self._finite else math.nan

    def add(self, values: np.ndarray) -> None:
        """Add `values` of any shape; sums are float64."""
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
        if len(block) == 0:
            return
        least, most = float(block.min()), float(block.max())
        if not (math.isfinite(least) and math.isfinite(most)):  # NaN goes through both
            finite = block[np.isfinite(block)]
            self.non_finite += len(block) - len(finite)
            if len(finite) == 0:
                return
            block, least, most = finite, float(finite.min()), float(finite.max())
        if len(self._scratch) < len(block):
            self._scratch = np.empty(len(block))
        values = self._scratch[: len(block)]
        np.copyto(values, block)
        mean = float(values.mean())
        values -= mean
        squares = float(np.square(values, out=values).sum())  # BLAS would start threads for it, which spin afterwards
        if before == 0:
            self.minimum, self.maximum = least, most
            self.mean, self._squares = mean, squares
            return
        self.minimum = min(self.minimum, least)
        self.maximum = max(self.maximum, most)
        # Two sets of values together (Chan, Golub, LeVeque: Updating formulae, 1979):
        # S = S1 + S2 + (m2 - m1)^2 n1 n2 / (n1 + n2),  m = m1 + (m2 - m1) n2 / (n1 + n2)
        difference = mean - self.mean
        share = len(block) / self._finite
        self._squares += squares + difference * difference * before * share
        self.mean += difference * share


def of_tensor(checkpoint: Checkpoint, vector: str, tensor: Tensor) -> Statistics:
    """Return the statistics of one `tensor` of a `vector` of a checkpoint."""
    statistics = Statistics()
    start = checkpoint.layout.offsets[tensor.name]
    buffer = np.empty(min(tensor.size, PIECE), checkpoint.dtype)
    for first in range(0, tensor.size, max(len(buffer), 1)):
        part = buffer[: tensor.size - first]
        checkpoint.read(vector, start + first, part)
        statistics.add(part)
    return statistics


def of_state(checkpoint: Checkpoint, name: str) -> Statistics:
    """Return the statistics of the array `name` of the objective's state in a `checkpoint`."""
    statistics, size = Statistics(), checkpoint.state_arrays[name].size
    for start in range(0, size, PIECE):
        statistics.add(checkpoint.read_state(name, start, min(start + PIECE, size)))
    return statistics


def of_dataset(dataset: h5py.Dataset) -> Statistics | str:
    """Return the statistics of a `dataset` of numbers, or why there are none."""
    if dataset.dtype.kind not in "iufb" or dataset.shape is None:
        return "no numbers"
    if elsewhere(dataset):
        return "the values lie in other files, which are not followed"
    if chunk_bytes(dataset) > LARGEST_CHUNK:
        return f"its chunks are larger than {LARGEST_CHUNK // 2**20} MiB"
    if unwritten(dataset):
        return "not all of it was written"
    statistics = Statistics()
    buffer = np.empty(0, dataset.dtype)
    for box in boxes_of(dataset.shape, dataset.chunks or (1,) * dataset.ndim, PIECE):
        shape = tuple(part.stop - part.start for part in box)
        size = math.prod(shape)
        if len(buffer) < size:
            buffer = np.empty(size, dataset.dtype)
        dataset.read_direct(buffer[:size].reshape(shape), box)
        statistics.add(buffer[:size])
    return statistics


def boxes_of(shape: tuple[int, ...], chunks: tuple[int, ...], elements: int) -> Iterator[tuple[slice, ...]]:
    """Cut an array of a `shape` into boxes of whole `chunks`, of at most `elements` or one chunk, in C order."""
    if 0 in shape:
        return
    box = list(chunks)
    for axis in reversed(range(len(shape))):
        fitting = max(1, elements // math.prod(box))
        box[axis] = min(-(-shape[axis] // chunks[axis]), fitting) * chunks[axis]
    steps = [range(0, length, step) for length, step in zip(shape, box, strict=True)]
    for corner in itertools.product(*steps):
        yield tuple(
            slice(start, min(start + step, length)) for start, step, length in zip(corner, box, shape, strict=True)
        )


def as_dict(found: Statistics | str) -> dict[str, Any]:
    """Return the statistics `found` for JSON, which has no NaN; or the reason for having none under ``"not_read"``."""
    if isinstance(found, str):
        return {"not_read": found}
    numbers = {"min": found.minimum, "mean": found.mean, "max": found.maximum, "std": found.deviation}
    return {
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "non_finite": found.non_finite,
    }
