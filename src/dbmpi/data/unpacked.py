"""Rows of datasets whose chunks are compressed: each chunk is unpacked once on a host, ahead of its use.

Samples are learned window by window (:class:`dbmpi.data.stream.Order`), so that few chunks are in use at a time.  These
lie in slots that all ranks of a host share.  Each rank unpacks its part of the next window while it learns.  A
rank that misses a chunk of another one's part unpacks it for itself.  Nobody waits for anybody: a slot is filled by one
rank alone, and has a tag, which names what is in it and is cleared while it is filled; a reader compares the tag
before and after it has copied.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import h5py
import numpy as np

from dbmpi.data.in_place import is_as_in_memory
from dbmpi.data.packed import Packing, Unknown
from dbmpi.kernels.files import copy_rows
from dbmpi.kernels.mapped import MappedFile

_LARGEST = 32 << 20
"""Bytes of a chunk; HDF5 reads larger ones, row by row."""
WINDOW_BYTES = 32 << 20
"""Of the chunks of a window, about."""
FEWEST = 8
"""Chunks of a window, at least."""
WINDOWS = 3
"""Windows that have slots: replicas are not all in the same one."""
_MOST_CHUNKS = 1 << 26
_TRIED = 3
"""Rows that are compared with what HDF5 reads."""
_fence_lock = threading.Lock()


def _fence() -> None:
    """Let what this process has stored be seen by others before what it stores later."""
    for _ in range(2):
        with _fence_lock:
            pass


def window_of(length: int, features: int) -> int:
    """Return how many blocks of samples are mixed with one another, whatever the type of their numbers.

    Parameters
    ----------
    length
        Samples of a block.
    features
        Numbers of a sample.
    """
    return max(WINDOW_BYTES // (4 * length * max(features, 1)), FEWEST)


def cut_off(values: h5py.Dataset) -> bool:
    """Whether the file of `values`, which is open, has become shorter: HDF5 gives zeros for what is missing."""
    file = values.file.id
    return bool(os.fstat(file.get_vfd_handle()).st_size < file.get_filesize())


class Slots:
    """Memory for unpacked chunks.

    Parameters
    ----------
    memory
        uint8; zeros at first, and the same for all ranks of a host.
    count, nbytes
        Slots, and bytes of each.
    part, parts
        Which part of the chunks this rank unpacks ahead, and of how many.
    """

    def __init__(self, memory: np.ndarray, count: int, nbytes: int, part: int, parts: int) -> None:
        self.count, self.part, self.parts = count, part, parts
        self.tags = memory[: 8 * count].view(np.int64)
        self.memory = memory[-count * nbytes :]
        self.starts = np.arange(count)[:, np.newaxis] * nbytes

    @staticmethod
    def size(count: int, nbytes: int) -> int:
        """Return the bytes of memory that `count` slots of `nbytes` each need."""
        return -(-8 * count // 64) * 64 + count * nbytes


class _Plain(NamedTuple):
    """How chunks are unpacked without HDF5."""

    packing: Packing
    file: MappedFile
    where: np.ndarray
    """Of each chunk: where it begins in the file, its packed bytes, and the mask of filters that are left out."""


class Unpacked:
    """The rows of a dataset with filters, whose chunks hold whole rows.

    Parameters
    ----------
    values
        Open, with its file.
    filters
        Their numbers, where chunks may be unpacked without HDF5; none where they must not.
    """

    def __init__(self, values: h5py.Dataset, filters: tuple[int, ...]) -> None:
        self._values = values
        self.length = int(values.chunks[0])
        self._row_bytes = int(np.prod(values.shape[1:], dtype=np.int64)) * values.dtype.itemsize
        self.nbytes = self.length * self._row_bytes
        self.window = window_of(self.length, self._row_bytes // values.dtype.itemsize)
        self._count = -(-len(values) // self.length)
        self._plain = self._without_hdf5(filters) if filters else None
        self._run = np.array([[0, self._row_bytes, 0, 0, self._row_bytes]])
        self._private: OrderedDict[int, np.ndarray] = OrderedDict()
        self._slots: Slots | None = None
        self._slot = np.full(self._count, -1, np.int64)
        self._tag = np.zeros(self._count, np.int64)
        self._noted, self._prepared = -1, (-1, 0)
        """The last window whose chunks have slots; and behind which window, and up to which place, they are filled."""
        self._lock = threading.Lock()

    @classmethod
    def of(cls, values: h5py.Dataset) -> Unpacked | None:
        """Return the rows of a dataset; None where it has no filters, or HDF5 must read it.

        Parameters
        ----------
        values
            Open.
        """
        if values.chunks is None or not values.size or values.dtype.kind not in "iufb":
            return None
        properties = values.id.get_create_plist()
        filters = tuple(properties.get_filter(index)[0] for index in range(properties.get_nfilters()))
        if not filters or values.chunks[1:] != values.shape[1:] or values.is_virtual:
            return None
        count = -(-len(values) // values.chunks[0])
        if int(np.prod(values.chunks, dtype=np.int64)) * values.dtype.itemsize > _LARGEST or count > _MOST_CHUNKS:
            return None
        if values.id.get_num_chunks() < count:
            return None
        own = values.file.driver == "sec2" and is_as_in_memory(values)
        found = cls(values, filters if own else ())
        tried = np.unique(np.linspace(0, len(values) - 1, _TRIED).astype(np.int64))
        if found._plain is not None and not found._agrees(tried):
            found._plain = None
        return found

    @property
    def slots_needed(self) -> int:
        """Slots for the windows that are kept."""
        return int(WINDOWS * self.window)

    def share(self, slots: Slots | None) -> None:
        """Use `slots` that other ranks of the host use for the same dataset; None for no longer."""
        with self._lock:
            self._slots = slots

    def prepare(self, window: int, passed: float, blocks: Callable[[int], np.ndarray]) -> None:
        """Unpack ahead what the next window needs.

        Parameters
        ----------
        window
            That is being learned, counted over all epochs.
        passed
            How far into it, 0 to 1; as far into the next one everything is there afterwards.
        blocks
            Returns the chunks of a window.
        """
        if self._slots is not None:
            with self._lock:
                self._prepare(self._slots, window, blocks, passed)

    def _prepare(self, slots: Slots, window: int, blocks: Callable[[int], np.ndarray], passed: float) -> None:
        for number in (window, window + 1):
            if number > self._noted:
                chunks = blocks(number)
                places = np.arange(len(chunks))
                self._slot[chunks] = number % WINDOWS * self.window + places
                self._tag[chunks] = number * self.window + places + 1
                self._noted = number
        coming = blocks(window + 1)
        if self._prepared[0] != window:
            self._prepared = window, slots.part
        stop = int(np.ceil(passed * len(coming)))
        # A chunk may be in both windows, of two epochs: what is noted is where it is next.
        for place in range(self._prepared[1], stop, slots.parts):
            self._prepared = window, place + slots.parts
            chunk = int(coming[place])
            if slots.tags[self._slot[chunk]] < self._tag[chunk]:
                try:
                    self._fill(slots, chunk)
                except OSError:  # to be raised where its rows are asked for
                    return

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return some rows, in any order.

        Parameters
        ----------
        indices
            Of the rows, int64, in range; repeated ones are allowed.

        Raises
        ------
        OSError
            If a chunk is damaged.
        """
        result = np.empty((len(indices), *self._values.shape[1:]), self._values.dtype)
        flat = result.reshape(len(indices), -1).view(np.uint8)
        chunks, inside = np.divmod(np.asarray(indices, np.int64), self.length)
        left = np.arange(len(indices))
        with self._lock:
            if self._slots is not None:
                left = left[~self._copy(self._slots, chunks, inside, flat)]
            for chunk in np.unique(chunks[left]).tolist():
                wanted = left[chunks[left] == chunk]
                flat[wanted] = self._kept(chunk)[inside[wanted]]
        return result

    def _copy(self, slots: Slots, chunks: np.ndarray, inside: np.ndarray, flat: np.ndarray) -> np.ndarray:
        """Copy the rows that are in slots; return which are."""
        slot, tag = self._slot[chunks], self._tag[chunks]
        # Older tags are of windows that are over; a newer one stays, for other replicas are ahead.
        missing = (slot >= 0) & (slots.tags[slot] < tag)
        if missing.any():
            for chunk in np.unique(chunks[missing & (slot % self.window % slots.parts == slots.part)]).tolist():
                self._fill(slots, chunk)
        found: np.ndarray = (slot >= 0) & (slots.tags[slot] == tag)
        # What is not in a slot is copied from the first one, and replaced afterwards.
        copy_rows(slots.memory, slots.starts, self.length, self._run, np.maximum(slot, 0) * self.length + inside, flat)
        _fence()
        found &= slots.tags[slot] == tag
        return found

    def _fill(self, slots: Slots, chunk: int) -> None:
        """Fill the slot of a chunk of this rank's part."""
        slot = self._slot[chunk]
        unpacked = self._unpack(chunk)
        slots.tags[slot] = 0
        _fence()
        slots.memory[slot * self.nbytes : (slot + 1) * self.nbytes] = unpacked.reshape(-1)
        _fence()
        slots.tags[slot] = self._tag[chunk]

    def _kept(self, chunk: int) -> np.ndarray:
        """Return the rows of a chunk, uint8 (rows, bytes), from those that this process keeps for itself."""
        if chunk not in self._private:
            self._private[chunk] = self._unpack(chunk)
            while len(self._private) > self.window:
                self._private.popitem(last=False)
        self._private.move_to_end(chunk)
        return self._private[chunk]

    def _unpack(self, chunk: int) -> np.ndarray:
        """Return the rows of a chunk, uint8 (rows, bytes)."""
        if self._plain is not None:
            with suppress(Unknown):
                return self._unpack_plainly(self._plain, chunk)
        found = np.zeros((self.length, *self._values.shape[1:]), self._values.dtype)
        part = self._values[chunk * self.length : (chunk + 1) * self.length]
        if cut_off(self._values):
            raise OSError("the file has become shorter while it was read; leave it alone until the run has ended")
        found[: len(part)] = part
        return found.reshape(self.length, -1).view(np.uint8)

    def _unpack_plainly(self, plain: _Plain, chunk: int) -> np.ndarray:
        """Unpack a chunk without HDF5."""
        address, size, mask = plain.where[chunk].tolist()
        if mask:  # some filters are left out
            raise Unknown
        unpacked = plain.packing.undone(plain.file.memory[address : address + size])
        if not plain.file.whole:
            raise Unknown
        return unpacked.reshape(self.length, self._row_bytes)

    def _without_hdf5(self, filters: tuple[int, ...]) -> _Plain | None:
        """Return what is needed to unpack chunks without HDF5; None where it must."""
        packing = Packing.of(filters, self._values.dtype.itemsize, self.nbytes)
        if packing is None:
            return None
        where, seen, sound = np.zeros((self._count, 3), np.int64), np.zeros(self._count, np.int64), True

        def note(info: Any) -> None:
            nonlocal sound
            chunk, inside = divmod(info.chunk_offset[0], self.length)
            if inside or any(info.chunk_offset[1:]) or chunk >= self._count:
                sound = False
                return
            seen[chunk] += 1
            where[chunk] = info.byte_offset, info.size, info.filter_mask

        try:
            self._values.id.chunk_iter(note)
            file = MappedFile(self._values.file.id.get_vfd_handle())
        except (AttributeError, OverflowError, OSError, ValueError):  # old HDF5, damaged, or a file system that cannot
            return None
        sound = (
            sound and (seen == 1).all() and where.min() >= 0 and (where[:, :2].sum(axis=1)).max() <= len(file.memory)
        )
        return _Plain(packing, file, where) if sound else None

    def _agrees(self, indices: np.ndarray) -> bool:
        """Whether some rows are those that HDF5 reads."""
        try:
            return bool(self.rows(indices).tobytes() == self._values[indices].tobytes())
        except OSError:  # damaged: to be said where the rows are asked for
            return True
