"""Where samples are while they are learned from: in memory, or in their file, and how they are read there."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from dbmpi.data.given import GivenRows
from dbmpi.machine import capacity

if TYPE_CHECKING:
    from dbmpi.data.description import Description
    from dbmpi.data.in_place import InPlace
    from dbmpi.data.reading import Reading
    from dbmpi.data.rows import Stored
    from dbmpi.data.unpacked import Unpacked

SMALL = 64 << 20
"""Bytes of samples, or of their targets, that are kept in memory, though the file could be read in place."""


class BlockLayout(NamedTuple):
    """How the samples of a file lie together."""

    length: int = 0
    """Samples of a block that can only be read together; 0: each can be read alone."""
    features: int = 1
    """Numbers of a sample."""


class Storage:
    """Where the samples of a source are.

    Parameters
    ----------
    description
        What the data hold.
    memory_bytes
        A file up to this size, as float32, may be kept in memory.
    reading
        How they are read.
    in_file
        Whether they are in a file, and not arrays of a program.
    """

    def __init__(self, description: Description, memory_bytes: int, reading: Reading, *, in_file: bool) -> None:
        self._description, self._inputs = description, description.inputs
        self._memory_bytes, self._in_file, self._own, self._keep = memory_bytes, in_file, reading.own, reading.keep

    @cached_property
    def resident(self) -> bool:
        """Whether the samples are in memory: a file that is small, or must be, or arrays of NumPy."""
        nbytes = self._description.float32_bytes
        if not self._in_file:
            return all(stored.dataset.at_hand for stored in self._inputs)
        if self._keep != "auto":
            return self._keep == "memory"
        return nbytes <= self._memory_bytes and (nbytes <= SMALL or not self._stays)

    @property
    def _stays(self) -> bool:
        """Whether the samples can be read one by one, or in chunks that are unpacked once."""
        answer = self._description.targets
        large = answer is not None and (answer.size or 1) * answer.kept.itemsize * self._description.samples > SMALL
        if answer is not None and large and not _lies_open(answer.stored):
            return False
        one = self._inputs[0]
        packed = len(self._inputs) == 1 and one.any_order and one.dataset.unpacked is not None
        return packed or all(map(_lies_open, self._inputs))

    @property
    def in_advance(self) -> bool:
        """Whether a thread may read batches in advance: from files, but not by a user's own code."""
        others = (self._description.targets, self._description.weights)
        read = [*self._inputs, *(other.stored for other in others if other is not None and other.stored is not None)]
        if self.resident or any(isinstance(stored.dataset.values, GivenRows) for stored in read):
            return False
        # What is in the system's cache is there at once; what is larger than the memory is not.
        larger = self._description.samples * self.row_bytes > capacity.available() / 2
        at_once = all(stored.any_order and stored.dataset.unpacked is None for stored in self._inputs)
        return larger or not at_once

    @property
    def resident_bytes(self) -> int:
        """What the samples take in memory once they are loaded; 0 where they are not kept there."""
        if not (self.resident and self._in_file):
            return 0
        answer = self._description.targets
        each = sum(math.prod(stored.shape[1:]) * stored.kept.itemsize for stored in self._inputs)
        answers = 4 if answer is None else (answer.size or 1) * answer.kept.itemsize
        return self._description.samples * (each + answers)

    @property
    def spare_bytes(self) -> int:
        """What the file, as float32, leaves of the memory budget for batches that are kept, in bytes.

        0 where it is not kept in memory, and where code of the user's own gets the batches, which may change them.
        """
        left = self._memory_bytes - self._description.float32_bytes
        return max(left, 0) if self.resident and self._in_file and not self._own else 0

    @property
    def _by_rows(self) -> Stored | None:
        """The inputs, if there is one kind of them and its rows are read from the file one by one."""
        one = self._inputs[0]
        return one if self._in_file and not self.resident and len(self._inputs) == 1 and one.scattered else None

    @property
    def in_place(self) -> InPlace | None:
        """Reads the inputs where they lie; None where they do not, or are kept in memory."""
        return None if self._by_rows is None else self._by_rows.dataset.in_place

    @property
    def unpacked(self) -> Unpacked | None:
        """Reads compressed inputs chunk by chunk; None where there are none, or they are kept in memory."""
        return None if self._by_rows is None else self._by_rows.dataset.unpacked

    @property
    def blocks(self) -> BlockLayout:
        """How the samples lie together."""
        return BlockLayout(0 if self.unpacked is None else self.unpacked.length, self._description.features)

    @property
    def row_bytes(self) -> int:
        """Bytes of the inputs of one sample as they are stored."""
        return sum(math.prod(stored.shape[1:]) * stored.kind.itemsize for stored in self._inputs)

    @property
    def way(self) -> str:
        """How the samples of a file are read, for the user; empty where they are kept in memory, or given."""
        if not self._in_file or self.resident:
            return ""
        first = self._inputs[0]
        size = f"{first.path}: inputs of {capacity.shown(self._description.samples * self.row_bytes)} are"
        if self.unpacked is not None:
            return f"{size} unpacked chunk by chunk, each once on a host, and learned in an order of chunks"
        if self._scattered:
            return f"{size} read where they are, through the system's cache, which all ranks of a host share"
        return f"{size} read by HDF5 batch by batch, which is slow"

    @property
    def _scattered(self) -> bool:
        """Whether all inputs of a file can be read one by one."""
        return all(stored.scattered for stored in self._inputs)


def _lies_open(stored: Stored) -> bool:
    """Whether each row can be read alone, without unpacking others."""
    return stored.scattered and all(part.unpacked is None for part in stored.dataset.parts)
