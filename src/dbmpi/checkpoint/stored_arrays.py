"""Where the numbers of each tensor are: in the checkpoint itself, or in the files of its shards."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from dbmpi.checkpoint.checksums import StoredArray
from dbmpi.checkpoint.shard_boxes import ShardBox
from dbmpi.index.layout import Layout, Tensor

_OPEN_FILES = 64
"""Files of shards that are open at a time; a process may have some hundreds."""


class StoredRun(NamedTuple):
    """Consecutive elements of a tensor that are consecutive where they are stored, too."""

    stored: StoredArray
    first: int
    """Position of the first one there, in elements."""
    length: int


class Arrays(ABC):
    """The arrays of a checkpoint."""

    stored: Mapping[str, StoredArray]
    """Everything that is stored, by names for messages."""

    @abstractmethod
    def segments(self, vector: str, tensor: Tensor, first: int, last: int) -> Iterator[StoredRun]:
        """Yield where a part of a tensor is, in order.

        Parameters
        ----------
        vector, tensor
            Which tensor of which vector.
        first, last
            Flat positions of the part's first element, and of the first one after it.
        """


class WholeArrays(Arrays):
    """Each tensor of each vector in one piece.

    Parameters
    ----------
    stored
        By the path in the file.
    paths
        These by (vector, tensor).
    """

    def __init__(self, stored: Mapping[str, StoredArray], paths: Mapping[tuple[str, str], str]) -> None:
        self.stored, self._paths = stored, paths

    def segments(self, vector: str, tensor: Tensor, first: int, last: int) -> Iterator[StoredRun]:
        """Yield where a part of a tensor is: in one piece."""
        yield StoredRun(self.stored[self._paths[vector, tensor.name]], first, last - first)


class ShardedArrays(Arrays):
    """Each vector of each shard in one piece.

    Parameters
    ----------
    stored
        By shard and vector.
    layout, boxes
        The tensors, and where they are.
    """

    def __init__(self, stored: Sequence[Mapping[str, StoredArray]], layout: Layout, boxes: Sequence[ShardBox]) -> None:
        self._of_shards, self._boxes, self._layout = stored, boxes, layout
        self.stored = {
            f"{vector} of shard {shard}": array
            for shard, vectors in enumerate(stored)
            for vector, array in vectors.items()
        }

    def segments(self, vector: str, tensor: Tensor, first: int, last: int) -> Iterator[StoredRun]:
        """Yield where a part of a tensor is: in the files of some shards, each in one piece or several."""
        starts, runs = self._runs[tensor.name]
        number = max(bisect_right(starts, first) - 1, 0)
        while first < last:
            run = runs[number]
            stop = min(starts[number] + run.length, last)
            yield StoredRun(self._of_shards[run.shard][vector], run.local + first - starts[number], stop - first)
            first, number = stop, number + 1

    @cached_property
    def _runs(self) -> dict[str, tuple[list[int], list[_Run]]]:
        """The runs of each tensor in order, and where they start."""
        found: dict[str, list[tuple[int, _Run]]] = {tensor.name: [] for tensor in self._layout.tensors}
        for tensor, box, shard, local in self._boxes:
            position = local
            for run in box.runs(tensor.shape):
                found[tensor.name].append((run.start, _Run(shard, position, len(run))))
                position += len(run)
        return {
            name: ([start for start, _ in runs], [run for _, run in runs])
            for name, runs in ((name, sorted(runs)) for name, runs in found.items())
        }


class _Run(NamedTuple):
    shard: int
    local: int
    length: int


class ShardFiles:
    """The files of shards, opened when they are read, and closed again when many others have been.

    Parameters
    ----------
    folder
        Where they are.
    names, sizes
        Of the files.
    """

    def __init__(self, folder: Path, names: Sequence[str], sizes: Sequence[int]) -> None:
        self._folder, self._names, self._sizes = folder, names, sizes
        self._open: OrderedDict[int, int] = OrderedDict()

    def problem(self) -> str:
        """Say which file is missing or cannot be what it should be; empty if none.

        As many as may be open are opened: what is deleted from then on can still be read.
        """
        for number, (name, size) in enumerate(zip(self._names, self._sizes, strict=True)):
            try:
                found = (self._folder / name).lstat()
                if stat.S_ISREG(found.st_mode) and found.st_size == size and number < _OPEN_FILES:
                    self.descriptor(number)
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    return f"{name}: {error}"
                return (
                    f"its file {name} is missing; a checkpoint needs the files of all shards beside it, in a directory "
                    "that the nodes of all shards see"
                )
            if not stat.S_ISREG(found.st_mode):
                return f"its file {name} is a link, or no file; expected a file in the same directory"
            if found.st_size != size:
                return f"its file {name} has {found.st_size:,} bytes, expected {size:,}"
        return ""

    def descriptor(self, number: int) -> int:
        """Return the descriptor of file `number`, which is opened if it is not; valid until the next call."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not block
        descriptor = os.open(self._folder / self._names[number], flags)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != self._sizes[number]:
            os.close(descriptor)
            raise OSError(f"{self._names[number]} has changed since the checkpoint was opened")
        self._open[number] = descriptor
        return descriptor

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])
