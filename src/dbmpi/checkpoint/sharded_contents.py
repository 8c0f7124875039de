"""The part of a checkpoint of several files that says where the arrays are, checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.checkpoint import checksums, compressed, directory, schema, shard_boxes
from dbmpi.checkpoint.checksums import StoredArray
from dbmpi.checkpoint.compressed import CompressedArray
from dbmpi.checkpoint.stored_arrays import ShardedArrays, ShardFiles
from dbmpi.checkpoint.untrusted import Foreign, Malformed
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
        if len(self.names) > shard_boxes.MOST:
            raise Malformed(f"/{schema.SHARDS_FILES}: expected at most {shard_boxes.MOST:,} names")
        shards, identity = len(self.names), contents.small(schema.SHARDS_ID, "S", 0)
        expected = tuple(directory.shard_path(path, shard, shards, identity).name for shard in range(shards))
        if not shards or self.names != expected or not all(map(directory.is_shard_file, expected)):
            raise Malformed(
                f"/{schema.SHARDS_FILES}: expected the names {', '.join(expected[:1])} ... beside {path.name}; if the "
                "file was renamed, give it its name back"
            )
        if not len(self._sizes) == len(self._elements) == shards or min(*self._sizes, *self._elements) < 0:
            raise Malformed(f"/{schema.SHARDS_SIZES}: expected a size for each of {shards} files")
        plain = all("/" not in vector and vector not in ("", ".", "..") for vector in self.vectors)
        if self.vectors[:1] != (schema.PARAMETERS,) or len(set(self.vectors)) < len(self.vectors) or not plain:
            raise Malformed(
                f"/{schema.SHARDS_VECTORS}: expected different names without '/', the first {schema.PARAMETERS!r}"
            )
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
    def _most(self) -> int:
        """More elements than a vector in these files can have; memory is taken only for what is there."""
        return self.nbytes * (_LARGEST_RATIO if self._compressed else 1)

    def shapes(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the shape of each tensor of parameters, of which these are the `names`.

        The views are never opened: where they were damaged, HDF5 may crash.
        """
        table = self._contents.table(schema.SHARDS_SHAPES)
        if table.ndim != 2 or len(table) != len(names) or table.shape[1] < 1:
            raise Malformed(f"/{schema.SHARDS_SHAPES}: expected a row for each of {len(names)} tensors")
        found = []
        for name, (axes, *lengths) in zip(names, table.tolist(), strict=True):
            shape = tuple(lengths[:axes])
            if not 0 <= axes <= len(lengths) or min(shape, default=0) < 0 or math.prod(shape) > self._most:
                raise Malformed(f"/{schema.SHARDS_SHAPES}: {name} cannot have the shape {shape} in these files")
            found.append(shape)
        return found

    def arrays(self, layout: Layout) -> tuple[np.dtype[Any], ShardedArrays]:
        """Return the dtype of the arrays, and where they are; `layout` is that of this file."""
        kind = self._contents.small(schema.SHARDS_DTYPE, "S", 0)
        if kind not in ("<f4", "<f8", ">f4", ">f8") or not np.dtype(kind).isnative:
            raise Malformed(f"/{schema.SHARDS_DTYPE} is {kind!r}, expected float32 or float64 of this machine")
        dtype = np.dtype(kind)
        try:
            boxes = shard_boxes.from_table(layout, self._contents.table(schema.SHARDS_BOXES), self._elements)
        except ValueError as error:
            raise Malformed(f"/{schema.SHARDS_BOXES}: {error}") from None
        offsets = self._contents.table(schema.SHARDS_OFFSETS)
        if offsets.shape != (len(self.names), len(self.vectors)):
            raise Malformed(f"/{schema.SHARDS_OFFSETS}: expected a row for each file, a column for each vector")
        stored = [self._stored(shard, row, dtype) for shard, row in enumerate(offsets)]
        return dtype, ShardedArrays(stored, layout, boxes)

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
