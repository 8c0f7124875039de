"""The part of a checkpoint of several files that says where the arrays are, checked before it is used."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from dbmpi.checkpoint import checksums, compressed, directory, schema, shard_boxes
from dbmpi.checkpoint.checksums import StoredArray
from dbmpi.checkpoint.compressed import CompressedArray
from dbmpi.checkpoint.shard_boxes import ShardBox
from dbmpi.checkpoint.stored_arrays import ShardedArrays, ShardFiles
from dbmpi.checkpoint.untrusted import Foreign, Malformed
from dbmpi.index.boxes import Box
from dbmpi.index.layout import Layout

if TYPE_CHECKING:
    from dbmpi.checkpoint.contents import Contents


_LARGEST_RATIO = 1 << 16
"""Of an array of zeros that is compressed, and its file."""


class ShardedContents:
    """Access to what a file says of the files of its shards.

    Parameters
    ----------
    contents
        Of the file.
    path
        Of the file; those of the shards must lie beside it.

    Raises
    ------
    Malformed
        From every method, where the file is no whole checkpoint, or a file of a shard is not there.
    """

    def __init__(self, contents: Contents, path: Path) -> None:
        self._contents, self._path = contents, path
        self.vectors: tuple[str, ...] = contents.small(schema.SHARDS_VECTORS, "S", 1)
        self.names: tuple[str, ...] = contents.small(schema.SHARDS_FILES, "S", 1)
        self._sizes: tuple[int, ...] = contents.small(schema.SHARDS_SIZES, "i", 1)
        self._elements: tuple[int, ...] = contents.small(schema.SHARDS_ELEMENTS, "i", 1)
        self._compressed = contents.has(schema.SHARDS_COMPRESSION)
        if self._compressed and (kind := contents.small(schema.SHARDS_COMPRESSION, "S", 0)) != compressed.NAME:
            raise Foreign(f"its arrays are compressed by {kind!r}, which this dbmpi does not know")
        shards, identity = len(self.names), contents.small(schema.SHARDS_ID, "S", 0)
        expected = tuple(directory.shard_path(path, shard, shards, identity).name for shard in range(shards))
        if not shards or self.names != expected or not all(map(directory.is_shard_file, expected)):
            raise Malformed(
                f"/{schema.SHARDS_FILES}: expected the names {', '.join(expected[:1])} ... beside {path.name}; if the "
                "file was renamed, give it its name back"
            )
        if not len(self._sizes) == len(self._elements) == shards or min(*self._sizes, *self._elements) < 0:
            raise Malformed(f"/{schema.SHARDS_SIZES}: expected a size for each of {shards} files")
        if self.vectors[:1] != (schema.PARAMETERS,) or len(set(self.vectors)) < len(self.vectors):
            raise Malformed(f"/{schema.SHARDS_VECTORS}: expected different names, the first {schema.PARAMETERS!r}")
        self.files = ShardFiles(path.parent, self.names, self._sizes)
        problem = self.files.problem()
        if problem:
            self.files.close()
            raise Malformed(problem)

    @property
    def nbytes(self) -> int:
        """Size of the files of all shards."""
        return sum(self._sizes)

    @property
    def most_elements(self) -> int:
        """More than these files can hold of a vector; memory is taken only for what is there."""
        return self.nbytes * (_LARGEST_RATIO if self._compressed else 1)

    def arrays(self, layout: Layout) -> tuple[np.dtype[Any], ShardedArrays]:
        """Return the dtype of the arrays, and where they are; `layout` is that of this file."""
        kinds = {
            self._contents.view(f"{schema.group_of(vector)}/{tensor.name}", tensor.shape)
            for vector in self.vectors
            for tensor in layout.tensors
        }
        if len(kinds) > 1:
            raise Malformed("some of its arrays are float32 and some float64, expected only one of them")
        dtype = kinds.pop()
        try:
            table = self._contents.table(schema.SHARDS_BOXES)
            boxes = shard_boxes.from_table(layout, table, self._elements)
        except ValueError as error:
            raise Malformed(f"/{schema.SHARDS_BOXES}: {error}") from None
        self._check_views(layout, boxes)
        offsets = self._contents.table(schema.SHARDS_OFFSETS)
        if offsets.shape != (len(self.names), len(self.vectors)):
            raise Malformed(f"/{schema.SHARDS_OFFSETS}: expected a row for each file, a column for each vector")
        return dtype, ShardedArrays(
            [self._stored(shard, row, dtype) for shard, row in enumerate(offsets)], layout, boxes
        )

    def _stored(self, shard: int, offsets: np.ndarray, dtype: np.dtype[Any]) -> dict[str, StoredArray]:
        """Return the vectors of a shard."""
        found: dict[str, StoredArray] = {}
        end, size = 0, self._elements[shard] * dtype.itemsize
        for number, (vector, offset) in enumerate(zip(self.vectors, offsets.tolist(), strict=True)):
            if not self._compressed and (offset < end or offset + size > self._sizes[shard]):
                raise Malformed(f"/{schema.SHARDS_OFFSETS}: {vector} of shard {shard} does not lie in its file")
            end = offset + size
            sums = self._contents.table(schema.shard_sums(shard, number), np.uint32)
            if sums.shape != (-(-size // checksums.BLOCK),):
                raise Malformed(f"/{schema.shard_sums(shard, number)}: expected a sum for each block")
            begin = checksums.start(schema.group_of(vector), dtype, (self._elements[shard],))
            reader = partial(self.files.descriptor, shard)
            if self._compressed:
                path, elements = schema.group_of(vector), self._elements[shard]
                found[vector] = CompressedArray(reader, path, dtype, elements, begin, sums, self.names[shard])
            else:
                found[vector] = StoredArray(reader, offset, size, begin, sums, self.names[shard])
        return found

    def _check_views(self, layout: Layout, boxes: list[ShardBox]) -> None:
        """Raise Malformed where other programs would see something else than what is read here."""
        of_tensors: dict[str, set[tuple[str, Box, int]]] = {tensor.name: set() for tensor in layout.tensors}
        for tensor, box, shard, local in boxes:
            of_tensors[tensor.name].add((self.names[shard], box, local))
        for vector in self.vectors:
            group = schema.group_of(vector)
            for tensor in layout.tensors:
                if self._contents.sources(f"{group}/{tensor.name}", f"/{group}") != of_tensors[tensor.name]:
                    raise Malformed(f"/{group}/{tensor.name} is not the view of the shards that it should be")


def sources_of(dataset: h5py.Dataset, expected: str) -> set[tuple[str, Box, int]] | None:
    """Return of which parts a view consists: file, box, and first element there; None if of others than these.

    Parameters
    ----------
    dataset
        The view.
    expected
        Path of the vector in the files.
    """
    properties, found = dataset.id.get_create_plist(), set()
    for number in range(properties.get_virtual_count()):
        here, there = properties.get_virtual_vspace(number), properties.get_virtual_srcspace(number)
        if properties.get_virtual_dsetname(number) != expected or not (_boxed(here) and _boxed(there)):
            return None
        (starts, ends), (first, last) = _bounds(here), _bounds(there)
        box = Box(tuple(map(int, starts)), tuple(int(end) + 1 for end in ends))
        if len(first) != 1 or int(last[0]) + 1 - int(first[0]) != box.size:
            return None
        found.add((properties.get_virtual_filename(number), box, int(first[0])))
    return found


def _boxed(space: h5py.h5s.SpaceID) -> bool:
    """Return whether a selection is a box, and holds all that its bounds do."""
    starts, ends = _bounds(space)
    size = math.prod(int(end) - int(start) + 1 for start, end in zip(starts, ends, strict=True))
    return bool(space.get_select_npoints() == size)


def _bounds(space: h5py.h5s.SpaceID) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first and the last index of a selection; HDF5 has none for a number without axes."""
    return space.get_select_bounds() if space.get_simple_extent_ndims() else ((), ())
