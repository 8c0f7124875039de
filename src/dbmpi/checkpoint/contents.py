"""The contents of a checkpoint file from anywhere, checked before memory is allocated for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import DTypeLike
from pydantic import ValidationError

from dbmpi.checkpoint import checksums, consistency, directory, schema
from dbmpi.checkpoint.checksums import Mismatch, StoredArray
from dbmpi.checkpoint.meaning import Meaning
from dbmpi.checkpoint.sharded_contents import ShardedContents
from dbmpi.checkpoint.stored_arrays import Arrays, WholeArrays
from dbmpi.checkpoint.untrusted import LARGEST_TEXT, Foreign, Malformed, attribute, link
from dbmpi.index.layout import Layout, Tensor


class StateArray(NamedTuple):
    """An array of any type in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    bytes: StoredArray

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


class Contents:
    """Access to a file from anywhere: hard links and plain contiguous data only, never more bytes than the file has.

    Parameters
    ----------
    file
        The open HDF5 file.
    path
        Of the file.
    file_size
        Its size in bytes.

    Raises
    ------
    Malformed
        From every method, where the file is no whole checkpoint.
    """

    def __init__(self, file: Any, path: Path, file_size: int) -> None:
        self._file = file
        self._file_size = file_size
        self._groups: dict[str, Any] = {}
        form = self._attribute("format")
        if form == schema.SHARD_FORMAT.encode():
            whole = directory.whole_path(path)
            beside = "the checkpoint beside it" if whole is None else f"{whole.name}, the checkpoint beside it"
            raise Foreign(f"it has the part of one shard; give {beside}")
        if form != schema.FORMAT.encode():
            raise Foreign(f"expected the attribute format = {schema.FORMAT!r}; is it a data file?")
        number = self._attribute("format_version")
        if number not in range(1, schema.FORMAT_VERSION + 1):
            raise Foreign(f"it has format version {number}, this dbmpi reads versions 1 to {schema.FORMAT_VERSION}")
        self.verified = bool(number >= schema.WITH_CHECKSUMS) or checksums.GROUP in file
        """Whether everything has a checksum; files of version 1 have none."""
        descriptor: int = file.id.get_vfd_handle()
        self._descriptor = lambda: descriptor
        self.shards = ShardedContents(self, path) if schema.SHARDS in file else None
        """What it says of the files of its shards; None if it is the only file."""

    def info(self) -> schema.CheckpointInfo:
        """Return the description."""
        present = {name: path for name, path in schema.OPTIONAL_TEXTS.items() if self.has(path)}
        fields: dict[str, Any] = {name: self.small(path, "S", 0) for name, path in (schema.TEXTS | present).items()}
        present = {name: path for name, path in schema.OPTIONAL_INTEGERS.items() if self.has(path)}
        fields |= {name: self.small(path, "i", 0) for name, path in (schema.INTEGERS | present).items()}
        fields |= {name: self.small(path, "i", 1) for name, path in schema.INTEGER_LISTS.items()}
        present = {name: path for name, path in schema.OPTIONAL_NUMBERS.items() if self.has(path)}
        fields |= {name: self.small(path, "f", 0) for name, path in present.items()}
        metrics = self._members(schema.TEST_METRICS)
        fields["test_metrics"] = {name: self.small(f"{schema.TEST_METRICS}/{name}", "f", 0) for name in metrics}
        libraries = self._find(schema.LIBRARIES, h5py.Group)
        fields["libraries"] = {name: self.small(f"{schema.LIBRARIES}/{name}", "S", 0) for name in libraries}
        info = schema.CheckpointInfo(**fields, meaning=self._meaning())
        try:
            consistency.check(info)
        except consistency.Contradiction as error:
            raise Malformed(str(error)) from None
        return info

    def _meaning(self) -> Meaning | None:
        """Return what the samples stood for, if the file says so."""
        if not self.has(schema.MEANING):
            return None
        names = self._members(schema.MEANING)
        found = {name: self.small(f"{schema.MEANING}/{name}", "fiS", 0, 1) for name in names}
        try:
            return Meaning.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            raise Malformed(f"/{schema.MEANING}/{'/'.join(map(str, first['loc']))}: {first['msg']}") from None

    def layout(self) -> Layout:
        """Return the tensors of the parameters, in their order."""
        names = self.small(schema.TENSORS, "S", 1)
        if not names:
            raise Malformed(f"/{schema.TENSORS}: expected a list of names")
        if self.shards is not None:
            shapes = self.shards.shapes(names)
        else:
            shapes = [self._plain(f"{schema.PARAMETERS}/{name}").shape for name in names]
        return Layout(tuple(map(Tensor, names, shapes)))

    def objective_state(self) -> dict[str, StateArray]:
        """Return the arrays that an objective of a user's own has beside its parameters, by name."""
        found: dict[str, StateArray] = {}
        names = self.small(schema.OBJECTIVE_STATE_NAMES, "S", 1) if self.has(schema.OBJECTIVE_STATE_NAMES) else ()
        for name in names:
            path = f"{schema.OBJECTIVE_STATE}/{name}"
            dataset = self._plain(path, "fiu")
            if not dataset.dtype.isnative:
                raise Malformed(f"/{path} is {dataset.dtype}, expected numbers in the byte order of this machine")
            found[name] = StateArray(dataset.dtype, dataset.shape, self._stored(path, dataset))
        if sum(array.size * array.dtype.itemsize for array in found.values()) > self._file_size or len(found) < len(
            names
        ):
            raise Malformed(f"/{schema.OBJECTIVE_STATE_NAMES}: expected different names")
        return found

    def vectors(self) -> tuple[str, ...]:
        """Return the names of the vectors, the parameters first."""
        return (schema.PARAMETERS, *self._members("state")) if self.shards is None else self.shards.vectors

    def arrays(self, layout: Layout, vectors: Sequence[str]) -> tuple[np.dtype[Any], Arrays]:
        """Return the dtype of the arrays, and where they are; `layout` and `vectors` are those of this file."""
        if self.shards is not None:
            return self.shards.arrays(layout)
        stored, paths, kinds, total = {}, {}, set(), 0
        for vector in vectors:
            for tensor in layout.tensors:
                path = f"{schema.group_of(vector)}/{tensor.name}"
                dataset = self._plain(path)
                if dataset.shape != tensor.shape:
                    raise Malformed(f"{path} has shape {dataset.shape}, the parameters have {tensor.shape}")
                size = dataset.id.get_storage_size()
                offset = dataset.id.get_offset() if size else 0
                if offset is None or offset + size > self._file_size:
                    raise Malformed(f"/{path} lies beyond the end of the file")
                kinds.add(_element(path, dataset))
                paths[vector, tensor.name], stored[path] = path, self._stored(path, dataset)
                total += size
        if len(kinds) > 1:
            raise Malformed("some of its arrays are float32 and some float64, expected only one of them")
        # Many names for the same bytes would make a small file fill the memory.
        if total > self._file_size:
            raise Malformed(f"its arrays have {total} bytes and the file has {self._file_size}")
        return kinds.pop(), WholeArrays(stored, paths)

    def table(self, path: str, dtype: DTypeLike = np.int64) -> np.ndarray:
        """Return the array of integers of this `dtype` at `path`, after comparing it with its checksums."""
        dataset = self._plain(path, "iu")
        if dataset.dtype != dtype:
            raise Malformed(f"/{path}: expected {np.dtype(dtype)}, found {dataset.dtype}")
        values = np.empty(dataset.shape, dtype)
        try:
            self._stored(path, dataset).read(0, values.reshape(-1).view(np.uint8).data)
        except Mismatch as error:
            raise Malformed(f"/{path} does not fit its checksum: {error}") from None
        return values

    def _find(self, path: str, kind: type) -> Any:
        """Return an object of the file, going through hard links only: other links may lead to other files."""
        folder = path.rpartition("/")[0]
        node, parts = self._file, path.split("/")
        if folder in self._groups:  # walked before
            node, parts = self._groups[folder], parts[-1:]
        for number, part in enumerate(parts, 1):
            if number == len(parts):
                self._groups[folder] = node
            way = link(node, part) if part not in ("", ".", "..") else None
            if way is None:
                raise Malformed(f"/{path} is missing")
            if not isinstance(way, h5py.HardLink):
                raise Malformed(f"/{path}: {part!r} is a link to somewhere else")
            node = node[part]
        if not isinstance(node, kind):
            raise Malformed(f"/{path}: expected a {kind.__name__.lower()}, found a {type(node).__name__.lower()}")
        return node

    def has(self, path: str) -> bool:
        """Return whether a dataset is at `path`, or at least its checksum, so that it should be."""
        return path in self._file or (self.verified and f"{checksums.GROUP}/{path}" in self._file)

    def _members(self, path: str) -> tuple[str, ...]:
        """Return the names in a group, none if it is not there; refuse it if they are not those with checksums."""
        names = tuple(self._find(path, h5py.Group)) if path in self._file else ()
        if self.verified:
            sums = f"{checksums.GROUP}/{path}"
            summed = tuple(self._find(sums, h5py.Group)) if sums in self._file else ()
            for name in {*summed}.symmetric_difference(names):
                raise Malformed(f"/{sums if name in names else path}/{name} is missing")
        return names

    def _stored(self, path: str, dataset: Any) -> StoredArray:
        """Return where a dataset that :meth:`_plain` returned is, with its checksums if the file has any."""
        size = dataset.id.get_storage_size()
        offset = dataset.id.get_offset() if size else 0
        if not self.verified:
            return StoredArray(self._descriptor, offset, size)
        where = f"{checksums.GROUP}/{path}"
        sums = self._plain(where, "u")
        if sums.dtype != np.uint32 or sums.shape != (-(-size // checksums.BLOCK),):
            raise Malformed(f"/{where}: expected uint32, one for each {checksums.BLOCK} bytes of /{path}")
        return StoredArray(
            self._descriptor, offset, size, checksums.start(path, dataset.dtype, dataset.shape), sums[()]
        )

    def small(self, path: str, kinds: str, *axes: int) -> Any:
        """Return a number or text, or a tuple of them, after comparing it with its checksum.

        Parameters
        ----------
        path
            Where it is.
        kinds
            NumPy's letters for the kinds of dtype that it may have.
        axes
            How many axes it may have.
        """
        dataset = self._plain(path)
        large = dataset.dtype.kind != "i" and dataset.id.get_storage_size() > LARGEST_TEXT
        if dataset.dtype.kind not in kinds or dataset.ndim not in axes or large:
            expected = {"S": "text", "i": "integers", "f": "a float"}.get(kinds, "numbers or texts")
            raise Malformed(
                f"/{path}: expected {expected} with {' or '.join(map(str, axes))} axes, of at most {LARGEST_TEXT} bytes"
            )
        try:
            self._stored(path, dataset).verify()
        except Mismatch as error:
            raise Malformed(f"/{path} does not fit its checksum: {error}") from None
        values = np.atleast_1d(dataset[()]).tolist()
        values = tuple(value.decode() if isinstance(value, bytes) else value for value in values)
        return values if dataset.ndim else values[0]

    def _plain(self, path: str, kinds: str = "fiS") -> Any:
        """Return a dataset whose elements all lie in this file as they are."""
        dataset = self._find(path, h5py.Dataset)
        properties = dataset.id.get_create_plist()
        if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count() > 0:
            raise Malformed(
                f"/{path} is stored in chunks, elsewhere or virtually; expected contiguous data "
                "(h5repack -l CONTI -f NONE makes it so)"
            )
        if dataset.shape is None or dataset.dtype.kind not in kinds or dataset.dtype.hasobject:
            raise Malformed(f"/{path}: expected numbers or text of fixed length, found {dataset.dtype}")
        stored, needed = dataset.id.get_storage_size(), math.prod(dataset.shape) * dataset.dtype.itemsize
        if stored != needed or needed > self._file_size:
            raise Malformed(f"/{path} needs {needed} bytes, {stored} of the file's {self._file_size} are its own")
        return dataset

    def _attribute(self, name: str) -> Any:
        value = attribute(self._file, name)
        if not isinstance(value, bytes | np.integer | None):
            raise Malformed(f"the attribute {name} is not a number or a short text")
        return value


def _element(path: str, dataset: Any) -> np.dtype[Any]:
    """Return the type of an array, if its bytes can be used as they are."""
    stored = dataset.id.get_type()
    for native, dtype in ((h5py.h5t.NATIVE_FLOAT, np.float32), (h5py.h5t.NATIVE_DOUBLE, np.float64)):
        if stored == native:
            return np.dtype(dtype)
    raise Malformed(f"/{path} is {dataset.dtype}, expected float32 or float64 in the byte order of this machine")
