"""Write a checkpoint: create, fill range by range, commit.  One process writes; nothing here knows MPI."""

from __future__ import annotations

import errno
import shutil
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import DTypeLike

from dbmpi.checkpoint import directory, schema
from dbmpi.checkpoint.schema import HDF5_ERRORS
from dbmpi.checkpoint.storage import NewFile
from dbmpi.errors import RunFailed, UserError
from dbmpi.paramserver.layout import Layout


class CheckpointWriter:
    """A checkpoint that is being written under a temporary name.

    Parameters
    ----------
    path : Path
        The name that the file gets when it is whole, see :func:`dbmpi.checkpoint.directory.checkpoint_path`; its
        directory is made if missing.
    layout : Layout
        Tensors that every vector consists of.
    vectors : sequence of str
        ``"parameters"`` and the names of the update rule's state, if it has any.
    dtype : dtype
        float32 or float64, of all the arrays.

    Raises
    ------
    UserError
        If the directory cannot be written to.
    RunFailed
        If the disk has no room for the file.  This and every later failure leaves no file behind, and the
        checkpoints that are there already untouched.

    Notes
    -----
    The arrays are contiguous in the file and get their place at once, so that a write is one plain write of the
    operating system at an offset, see :mod:`dbmpi.checkpoint.storage`.
    """

    def __init__(
        self, path: Path, layout: Layout, vectors: Sequence[str] = (schema.PARAMETERS,), dtype: DTypeLike = np.float32
    ) -> None:
        self.path = path
        self.layout = layout
        self.dtype = np.dtype(dtype)
        _check_names(layout, vectors)
        self._written = {vector: Coverage() for vector in vectors}
        self._temporary = directory.temporary_path(path)
        self._storage: NewFile | None = None
        self._file: Any = None
        self._offsets: dict[tuple[str, str], int] = {}
        self._open()
        try:
            self._check_room()
            self._create()
        except HDF5_ERRORS as error:
            self._fail(error)

    def write(self, vector: str, start: int, values: np.ndarray) -> None:
        """Write `values` (n,), of the file's dtype, to the positions ``start ... start + n`` of a vector.

        Ranges may come in any order; what is written twice keeps the later values.
        """
        if values.ndim != 1 or values.dtype != self.dtype:
            raise ValueError(f"expected a vector of {self.dtype}, got {values.dtype} of shape {values.shape}")
        stop = start + len(values)
        if start < 0 or stop > self.layout.size:
            raise ValueError(f"the range [{start}, {stop}) is not within the vector of {self.layout.size} elements")
        storage = self._require_open()
        written = self._written[vector]
        values = np.ascontiguousarray(values)
        position = 0
        try:
            for tensor, first, last in self.layout.pieces(start, stop):
                part = values[position : position + last - first]
                storage.write_at(self._offsets[vector, tensor.name] + first * self.dtype.itemsize, part)
                position += last - first
        except OSError as error:
            self._fail(error)
        written.add(start, stop)

    def commit(self, info: schema.CheckpointInfo, keep: int | None = None) -> Path:
        """Give the file its name, let ``latest`` point to it, delete all but the `keep` last ones; return the path.

        When this returns, the checkpoint is on disk; when the process dies before, ``latest`` is what it was.

        Raises
        ------
        ValueError
            If some elements have never been written; the file is then removed.
        RunFailed
            If the disk is full or fails.
        """
        storage = self._require_open()
        for vector, written in self._written.items():
            missing = written.first_gap(self.layout.size)
            if missing is not None:
                self.abort()
                raise ValueError(f"{self.path}: elements [{missing[0]}, {missing[1]}) of {vector!r} were never written")
        try:
            _write_info(self._file, self.layout, info)
            self._file.close()
            storage.check()
            storage.sync()
            self._temporary.replace(self.path)
            storage.close()
            self._storage = None
            directory.sync(self.path.parent)
            directory.replace_latest(self.path.parent, self.path.name)
            directory.sync(self.path.parent)
            if keep is not None:
                directory.remove_older(self.path, keep)
        except HDF5_ERRORS as error:
            self._fail(error)
        return self.path

    def abort(self) -> None:
        """Remove the temporary file; without effect after a commit or another abort."""
        if self._storage is None:
            return
        storage, self._storage = self._storage, None
        try:
            self._temporary.unlink(missing_ok=True)
        finally:
            if self._file is not None:
                self._file.close()
            storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._storage = NewFile(self._temporary)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._fail(error)
            raise UserError(
                f"{self.path.parent}: checkpoints cannot be written here: {error.strerror}; "
                "expected a directory that can be made and written to"
            ) from error

    def _require_open(self) -> NewFile:
        if self._storage is None:
            raise ValueError(f"{self.path}: the checkpoint is committed or aborted already")
        return self._storage

    def _check_room(self) -> None:
        needed = self.layout.size * self.dtype.itemsize * len(self._written)
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            self._fail(
                OSError(errno.ENOSPC, f"{needed / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB are free")
            )

    def _create(self) -> None:
        """Create the arrays; the rest follows in the commit, so that a file without it is known to be partial."""
        # Version 1.8 of the format has checksums over all that is not array; every HDF5 since 2008 reads it.
        # Aligned arrays are written in whole pages.
        self._file = h5py.File(
            self._storage, "w", libver=("v108", "v110"), alignment_threshold=65536, alignment_interval=4096
        )
        self._file.attrs.create("format", schema.FORMAT, dtype=_text_type(schema.FORMAT))
        self._file.attrs.create("format_version", schema.FORMAT_VERSION, dtype=np.int64)
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        element = h5py.h5t.py_create(self.dtype)
        for vector in self._written:
            top = self._file.require_group(schema.group_of(vector))
            for tensor in self.layout.tensors:
                *groups, name = tensor.name.split("/")
                group = top.require_group("/".join(groups)) if groups else top
                space = h5py.h5s.create_simple(tensor.shape) if tensor.shape else h5py.h5s.create(h5py.h5s.SCALAR)
                dataset = h5py.h5d.create(group.id, name.encode(), element, space, dcpl=properties)
                self._offsets[vector, tensor.name] = dataset.get_offset() or 0  # None where there are no elements

    def _fail(self, error: Exception) -> None:
        """Remove what was written and raise RunFailed."""
        self.abort()
        latest = directory.read_latest(self.path.parent)
        kept = f"the last checkpoint is {latest}" if latest else "there is no earlier checkpoint"
        raise RunFailed(f"{self.path}: the checkpoint could not be written: {error}; {kept}") from error


class Coverage:
    """Which positions of a vector have been written: disjoint ranges in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Add the range [start, stop), joining it with the ranges that it meets."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = first
        while last < len(self._starts) and self._starts[last] <= stop:
            start, stop = min(start, self._starts[last]), max(stop, self._stops[last])
            last += 1
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def first_gap(self, size: int) -> tuple[int, int] | None:
        """Return the first range of ``range(size)`` that has not been added, or None."""
        position = 0
        for start, stop in zip(self._starts, self._stops, strict=True):
            if start > position:
                return position, start
            position = stop
        return (position, size) if position < size else None


def _check_names(layout: Layout, vectors: Sequence[str]) -> None:
    """Refuse names that HDF5 cannot hold as they are; UserError, because a user's objective may have named them."""
    if schema.PARAMETERS not in vectors or len(set(vectors)) < len(vectors):
        raise ValueError(f"expected vectors with different names, {schema.PARAMETERS!r} among them, got {vectors}")
    if not layout.tensors:
        raise UserError("a checkpoint needs at least one tensor, and the layout has none")
    names = [tensor.name for tensor in layout.tensors]
    for name in (*names, *vectors):
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(f"the name {name!r} cannot stand in a checkpoint: expected e.g. 'layer/weights'")
    groups = {name[:place] for name in names for place, letter in enumerate(name) if letter == "/"}
    for name in names:
        if name in groups:
            raise UserError(f"a tensor is called {name!r} and others lie below that name: rename one of them")
    for vector in vectors:
        if "/" in vector:
            raise ValueError(f"the name of a vector has no '/': {vector!r}")


def _write_info(file: Any, layout: Layout, info: schema.CheckpointInfo) -> None:
    for name, place in schema.TEXTS.items():
        _write_text(file, place, getattr(info, name))
    for name, place in schema.INTEGERS.items():
        file.create_dataset(place, data=np.int64(getattr(info, name)))
    for name, place in schema.INTEGER_LISTS.items():
        file.create_dataset(place, data=np.array(getattr(info, name), dtype=np.int64))
    hdf5 = {"hdf5": h5py.version.hdf5_version}
    for library, text in {**info.libraries, **hdf5}.items():
        _write_text(file, f"{schema.LIBRARIES}/{library}", text)
    names = [tensor.name.encode() for tensor in layout.tensors]
    longest = h5py.string_dtype("utf-8", max(map(len, names)))
    file.create_dataset(schema.TENSORS, data=np.array(names, dtype=longest))


def _write_text(file: Any, place: str, text: str) -> None:
    file.create_dataset(place, data=text.encode(), dtype=_text_type(text))


def _text_type(text: str) -> Any:
    """Return a type of fixed length: unlike a variable one it lies in the dataset, and says how much to read."""
    return h5py.string_dtype("utf-8", max(len(text.encode()), 1))
