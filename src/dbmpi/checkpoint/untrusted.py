"""Access to a checkpoint file that anybody may have made: everything is checked before memory is taken for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from pydantic import ValidationError

from dbmpi.checkpoint import checksums, consistency, schema
from dbmpi.checkpoint.checksums import Mismatch, StoredArray
from dbmpi.checkpoint.meaning import Meaning
from dbmpi.index.layout import Layout, Tensor

LARGEST_TEXT = 2**24
"""Bytes; a description of a run has a few thousand."""


class Malformed(Exception):
    """What is wrong with the file."""


class Foreign(Malformed):
    """The file is whole, as far as can be seen, but none that can be read here."""


class UntrustedFile:
    """Access to a file from anywhere: hard links and plain contiguous data only, never more bytes than the file has."""

    def __init__(self, file: Any, file_size: int) -> None:
        self._file = file
        self._file_size = file_size
        form = self._attribute("format")
        if form != schema.FORMAT.encode():
            raise Foreign(f"expected the attribute format = {schema.FORMAT!r}; is it a data file?")
        number = self._attribute("format_version")
        if number not in range(1, schema.FORMAT_VERSION + 1):
            raise Foreign(f"it has format version {number}, this dbmpi reads versions 1 to {schema.FORMAT_VERSION}")
        self.verified = bool(number >= schema.WITH_CHECKSUMS) or checksums.GROUP in file
        """Whether everything has a checksum; files of version 1 have none."""
        self._descriptor: int = file.id.get_vfd_handle()

    def info(self) -> schema.CheckpointInfo:
        """Return the description."""
        fields: dict[str, Any] = {name: self._text(place) for name, place in schema.TEXTS.items()}
        fields |= {name: self._integers(place, 0)[()].item() for name, place in schema.INTEGERS.items()}
        fields |= {name: tuple(self._integers(place, 1).tolist()) for name, place in schema.INTEGER_LISTS.items()}
        present = {name: place for name, place in schema.OPTIONAL_TEXTS.items() if self._has(place)}
        fields |= {name: self._text(place) for name, place in present.items()}
        libraries = self._find(schema.LIBRARIES, h5py.Group)
        fields["libraries"] = {name: self._text(f"{schema.LIBRARIES}/{name}") for name in libraries}
        info = schema.CheckpointInfo(**fields, meaning=self._meaning())
        try:
            consistency.check(info)
        except consistency.Contradiction as error:
            raise Malformed(str(error)) from None
        return info

    def _meaning(self) -> Meaning | None:
        """Return what the samples stood for, if the file says so."""
        if not self._has(schema.MEANING):
            return None
        found: dict[str, Any] = {}
        for name in self._members(schema.MEANING):
            place = f"{schema.MEANING}/{name}"
            dataset = self._plain(place)
            if dataset.ndim > 1 or dataset.id.get_storage_size() > LARGEST_TEXT:
                raise Malformed(f"/{place}: expected numbers or texts in one list of at most {LARGEST_TEXT} bytes")
            self._verify(place, dataset)
            values = dataset[()].tolist()
            if dataset.dtype.kind == "S":
                values = [text.decode() for text in values] if dataset.ndim else values.decode()
            found[name] = tuple(values) if dataset.ndim else values
        try:
            return Meaning.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            raise Malformed(f"/{schema.MEANING}/{'/'.join(map(str, first['loc']))}: {first['msg']}") from None

    def layout(self) -> Layout:
        """Return the tensors of the parameters, in their order."""
        dataset = self._plain(schema.TENSORS)
        if dataset.dtype.kind != "S" or dataset.ndim != 1 or len(dataset) == 0:
            raise Malformed(f"{schema.TENSORS}: expected a list of names")
        self._verify(schema.TENSORS, dataset)
        names = [name.decode() for name in dataset[()]]
        tensors = (Tensor(name, self._plain(f"{schema.PARAMETERS}/{name}").shape) for name in names)
        return Layout(tuple(tensors))

    def vectors(self) -> tuple[str, ...]:
        """Return the names of the vectors, the parameters first."""
        return (schema.PARAMETERS, *self._members("state"))

    def arrays(
        self, layout: Layout, vectors: Sequence[str]
    ) -> tuple[np.dtype[Any], dict[tuple[str, str], StoredArray]]:
        """Return the type of the arrays and where in the file each one is."""
        arrays, kinds, total = {}, set(), 0
        for vector in vectors:
            for tensor in layout.tensors:
                place = f"{schema.group_of(vector)}/{tensor.name}"
                dataset = self._plain(place)
                if dataset.shape != tensor.shape:
                    raise Malformed(f"{place} has shape {dataset.shape}, the parameters have {tensor.shape}")
                size = dataset.id.get_storage_size()
                offset = dataset.id.get_offset() if size else 0
                if offset is None or offset + size > self._file_size:
                    raise Malformed(f"/{place} lies beyond the end of the file")
                kinds.add(_element(place, dataset))
                arrays[vector, tensor.name] = self._stored(place, dataset)
                total += size
        if len(kinds) > 1:
            raise Malformed("some of its arrays are float32 and some float64, expected only one of them")
        # Many names for the same bytes would make a small file fill the memory.
        if total > self._file_size:
            raise Malformed(f"its arrays have {total} bytes and the file has {self._file_size}")
        return kinds.pop(), arrays

    def _find(self, place: str, kind: type) -> Any:
        """Return an object of the file, going through hard links only: other links may lead to other files."""
        node = self._file
        for part in place.split("/"):
            if not isinstance(node, h5py.Group) or part in ("", ".", "..") or part not in node:
                raise Malformed(f"/{place} is missing")
            if not isinstance(node.get(part, getlink=True), h5py.HardLink):
                raise Malformed(f"/{place}: {part!r} is a link to somewhere else")
            node = node[part]
        if not isinstance(node, kind):
            raise Malformed(f"/{place}: expected a {kind.__name__.lower()}, found a {type(node).__name__.lower()}")
        return node

    def _has(self, place: str) -> bool:
        """Return whether a dataset is there, or at least its checksum, so that it should be."""
        return place in self._file or (self.verified and f"{checksums.GROUP}/{place}" in self._file)

    def _members(self, place: str) -> tuple[str, ...]:
        """Return the names in a group, none if it is not there; refuse it if they are not those with checksums."""
        names = tuple(self._find(place, h5py.Group)) if place in self._file else ()
        if self.verified:
            sums = f"{checksums.GROUP}/{place}"
            summed = tuple(self._find(sums, h5py.Group)) if sums in self._file else ()
            for name in {*summed}.symmetric_difference(names):
                raise Malformed(f"/{sums if name in names else place}/{name} is missing")
        return names

    def _stored(self, place: str, dataset: Any) -> StoredArray:
        """Return where a dataset that :meth:`_plain` returned is, with its checksums if the file has any."""
        size = dataset.id.get_storage_size()
        offset = dataset.id.get_offset() if size else 0
        if not self.verified:
            return StoredArray(self._descriptor, offset, size)
        where = f"{checksums.GROUP}/{place}"
        sums = self._plain(where, "u")
        if sums.dtype != np.uint32 or sums.shape != (-(-size // checksums.BLOCK),):
            raise Malformed(f"/{where}: expected uint32, one for each {checksums.BLOCK} bytes of /{place}")
        return StoredArray(
            self._descriptor, offset, size, checksums.start(place, dataset.dtype, dataset.shape), sums[()]
        )

    def _verify(self, place: str, dataset: Any) -> None:
        """Compare all of a small dataset with its checksum."""
        try:
            self._stored(place, dataset).verify()
        except Mismatch as error:
            raise Malformed(f"/{place} does not fit its checksum: {error}") from None

    def _plain(self, place: str, kinds: str = "fiS") -> Any:
        """Return a dataset whose elements all lie in this file as they are."""
        dataset = self._find(place, h5py.Dataset)
        properties = dataset.id.get_create_plist()
        if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count() > 0:
            raise Malformed(
                f"/{place} is stored in chunks, elsewhere or virtually; expected contiguous data "
                "(h5repack -l CONTI -f NONE makes it so)"
            )
        if dataset.shape is None or dataset.dtype.kind not in kinds or dataset.dtype.hasobject:
            raise Malformed(f"/{place}: expected numbers or text of fixed length, found {dataset.dtype}")
        stored, needed = dataset.id.get_storage_size(), math.prod(dataset.shape) * dataset.dtype.itemsize
        if stored != needed or needed > self._file_size:
            raise Malformed(f"/{place} needs {needed} bytes, {stored} of the file's {self._file_size} are its own")
        return dataset

    def _attribute(self, name: str) -> Any:
        if name not in self._file.attrs:
            return None
        attribute = self._file.attrs.get_id(name)
        if attribute.shape != () or attribute.dtype.kind not in "iS" or attribute.get_storage_size() > 256:
            raise Malformed(f"the attribute {name} is not a number or a short text")
        value = np.empty((), dtype=attribute.dtype)
        attribute.read(value)
        return value[()]

    def _text(self, place: str) -> str:
        dataset = self._plain(place)
        if dataset.dtype.kind != "S" or dataset.shape != () or dataset.dtype.itemsize > LARGEST_TEXT:
            raise Malformed(f"/{place}: expected text of at most {LARGEST_TEXT} bytes")
        self._verify(place, dataset)
        return bytes(dataset[()]).decode("utf-8")

    def _integers(self, place: str, dimensions: int) -> np.ndarray:
        dataset = self._plain(place)
        if dataset.dtype.kind != "i" or dataset.ndim != dimensions:
            raise Malformed(f"/{place}: expected integers with {dimensions} axes")
        self._verify(place, dataset)
        return np.asarray(dataset[()], dtype=np.int64)


def _element(place: str, dataset: Any) -> np.dtype[Any]:
    """Return the type of an array, if its bytes can be used as they are."""
    stored = dataset.id.get_type()
    for native, dtype in ((h5py.h5t.NATIVE_FLOAT, np.float32), (h5py.h5t.NATIVE_DOUBLE, np.float64)):
        if stored == native:
            return np.dtype(dtype)
    raise Malformed(f"/{place} is {dataset.dtype}, expected float32 or float64 in the byte order of this machine")
