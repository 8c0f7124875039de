"""Write a checkpoint: create, fill range by range, commit.  One process writes; nothing here knows MPI."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Self

import h5py
import numpy as np
from numpy.typing import DTypeLike

from dbmpi.checkpoint import consistency, directory, leftovers, retention, schema
from dbmpi.checkpoint.annotations import annotate
from dbmpi.checkpoint.new_file import ARRAYS, NewFile
from dbmpi.checkpoint.untrusted import HDF5_ERRORS
from dbmpi.errors import DiskFailed, UserError
from dbmpi.index.layout import Layout


class CheckpointWriter:
    """A checkpoint that is being written under a temporary name.

    Parameters
    ----------
    path : Path
        The name that the file gets when it is whole, see :func:`dbmpi.checkpoint.directory.checkpoint_path`; its
        directory is created if missing.
    layout : Layout
        Tensors that every vector consists of.
    vectors : sequence of str
        ``"parameters"`` and the names of the update rule's state, if it has any.
    dtype : dtype
        float32 or float64, of all these arrays.
    objective_state : mapping of str to array
        What an objective of a user's own has beside: numbers of any type and shape.
    of_run : bool
        Whether the file is the newest of the checkpoints in its directory; else it is a file of its own.

    Raises
    ------
    DiskFailed
        If the directory cannot be written to, or the disk is too small for the file.  This and every later failure
        leaves no file behind, and the checkpoints that are there already untouched.
    UserError
        If the directory of a file of its own cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        vectors: Sequence[str] = (schema.PARAMETERS,),
        dtype: DTypeLike = np.float32,
        objective_state: Mapping[str, np.ndarray] = MappingProxyType({}),
        *,
        of_run: bool = True,
    ) -> None:
        self.path = path
        self._of_run = of_run
        self.layout = layout
        self.dtype = np.dtype(dtype)
        check_names(layout, vectors)
        self._objective_state = tuple(objective_state)
        self._written = {vector: Coverage() for vector in vectors}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"{path.parent}: checkpoints cannot be written here: {error.strerror}"
            raise self._failure(text, False) from error
        self._file = NewFile(path, ARRAYS, with_checksums=True, failure=self._failure)
        self._file.set_attribute("format", schema.FORMAT)
        self._file.set_attribute("format_version", schema.FORMAT_VERSION)
        for vector in vectors:
            for tensor in layout.tensors:
                self._file.create(f"{schema.group_of(vector)}/{tensor.name}", tensor.shape, self.dtype)
        for name, values in objective_state.items():
            self._file.create(f"{schema.OBJECTIVE_STATE}/{name}", values.shape, values.dtype)
        self._file.check_space()
        for name, values in objective_state.items():
            self._file.write(f"{schema.OBJECTIVE_STATE}/{name}", 0, np.ascontiguousarray(values).reshape(-1))

    def write(self, vector: str, start: int, values: np.ndarray) -> None:
        """Write `values` (n,), of the file's dtype, to the positions ``start ... start + n`` of a vector.

        Ranges may come in any order; a position that is written twice keeps the later value.
        """
        if values.ndim != 1 or values.dtype != self.dtype:
            raise ValueError(f"expected a vector of {self.dtype}, got {values.dtype} of shape {values.shape}")
        stop = start + len(values)
        if start < 0 or stop > self.layout.size:
            raise ValueError(f"the range [{start}, {stop}) is not within the vector of {self.layout.size} elements")
        written = self._written[vector]
        values = np.ascontiguousarray(values)
        position = 0
        for tensor, first, last in self.layout.pieces(start, stop):
            part = values[position : position + last - first]
            self._file.write(f"{schema.group_of(vector)}/{tensor.name}", first, part)
            position += last - first
        written.add(start, stop)

    def commit(
        self, info: schema.CheckpointInfo, keep: int | None = None, confirm: Callable[[], object] = lambda: None
    ) -> Path:
        """Write the description `info`, give the file its name, and return the path.

        If it is of a run and named so, ``latest`` points to it from then on.

        All but the `keep` last checkpoints are then deleted.  `confirm` is called just before the file gets its name;
        it raises where the file is not to get it.

        When this returns, the checkpoint is on disk.  It counts as soon as it has its name, also where the process dies
        before ``latest`` names it.

        Raises
        ------
        ValueError
            If some elements have never been written, or the description is none that could be read; the file is then
            removed.
        DiskFailed
            If the disk is full or fails.
        """
        for vector, written in self._written.items():
            missing = written.first_gap(self.layout.size)
            if missing is not None:
                self.abort()
                raise ValueError(f"{self.path}: elements [{missing[0]}, {missing[1]}) of {vector!r} were never written")
        return finish(
            self._file, self.layout, info, self._objective_state, keep=keep, confirm=confirm, of_run=self._of_run
        )

    def abort(self) -> None:
        """Remove the temporary file; without effect after a commit or another abort."""
        self._file.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _failure(self, text: str, begun: bool) -> Exception:
        """Say, where a checkpoint of a run fails, which one is left."""
        if not self._of_run:
            return DiskFailed(text) if begun else UserError(text)
        return DiskFailed(f"{text}; {retention.kept(self.path.parent)}")


def finish(
    file: NewFile,
    layout: Layout,
    info: schema.CheckpointInfo,
    objective_state: Sequence[str] = (),
    *,
    identity: str = "",
    keep: int | None = None,
    confirm: Callable[[], object] = lambda: None,
    of_run: bool = True,
) -> Path:
    """Write the description into the new `file` of a checkpoint, give it its name, and return its path.

    Parameters
    ----------
    file, layout
        Whose arrays are written, or lie with the shards.
    info
        The description.
    objective_state
        Names of the arrays of the objective's state.
    identity
        That of the files of the shards, if these hold the arrays.
    keep, confirm
        As for :meth:`CheckpointWriter.commit`.
    of_run
        As for :class:`CheckpointWriter`.

    Raises
    ------
    ValueError, DiskFailed
        As :meth:`CheckpointWriter.commit` does.
    """
    path = file.path
    try:
        consistency.check(info)
    except consistency.Contradiction as error:
        file.abort()
        raise ValueError(f"{path}: {error}") from None
    others: list[retention.Whole] = []
    if of_run:
        with suppress(OSError):  # whatever is wrong there, the commit will say
            others = retention.whole(path.parent)
        info = replace(info, created=retention.later_than(others, info.created))
    # Written last, so that a file without a description is known to be partial.
    _write_info(file, layout, info)
    if objective_state:
        file.put(schema.OBJECTIVE_STATE_NAMES, [name.encode() for name in objective_state])
    if not of_run:
        file.commit(confirm)
        return path
    try:
        with leftovers.replacing(path):
            file.commit(confirm)
            if directory.step_of(path) is not None:  # of a run, and not of a user's own loop
                directory.replace_pointer(path)
        if identity:
            leftovers.discard(path, identity)  # nothing but the note
        if keep is not None:
            retention.retain(path, others, keep)
    except OSError as error:
        raise DiskFailed(f"{path}: is whole, but its directory could not be updated: {error}") from error
    return path


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


def check_names(layout: Layout, vectors: Sequence[str]) -> None:
    """Refuse names that HDF5 cannot hold as they are; a user may have given them.

    Parameters
    ----------
    layout
        Of the tensors.
    vectors
        ``"parameters"`` and the names of the update rule's state.

    Raises
    ------
    UserError
        If a checkpoint cannot have one of these names.
    """
    if schema.PARAMETERS not in vectors or len(set(vectors)) < len(vectors):
        raise UserError(f"expected vectors with different names, {schema.PARAMETERS!r} among them, got {vectors}")
    if not layout.tensors:
        raise UserError("a checkpoint needs at least one tensor, and the layout has none")
    names = [tensor.name for tensor in layout.tensors]
    for name in (*names, *vectors):
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(f"the name {name!r} cannot stand in a checkpoint: expected e.g. 'layer/weights'")
    groups = {name[:end] for name in names for end, letter in enumerate(name) if letter == "/"}
    for name in names:
        if name in groups:
            raise UserError(f"a tensor is called {name!r} and others lie below that name: rename one of them")
    for vector in vectors:
        if "/" in vector:
            raise UserError(f"the name of a vector has no '/': {vector!r}")


def write_measures(file: NewFile, info: schema.CheckpointInfo, within: str = "") -> None:
    """Write what not every checkpoint has.

    Parameters
    ----------
    file
        Where it is not yet.
    info
        All but the arrays.
    within
        Write only datasets whose path begins like this.
    """
    found: dict[str, str | int | float] = {}
    for name, path in (schema.OPTIONAL_TEXTS | schema.OPTIONAL_INTEGERS).items():
        if getattr(info, name):
            found[path] = getattr(info, name)
    for name, path in schema.OPTIONAL_NUMBERS.items():
        if getattr(info, name) is not None:
            found[path] = float(getattr(info, name))
    found |= {f"{schema.TEST_METRICS}/{name}": float(value) for name, value in info.test_metrics.items()}
    for path, value in found.items():
        if path.startswith(within):
            file.put(path, value)


def _write_info(file: NewFile, layout: Layout, info: schema.CheckpointInfo) -> None:
    for name, path in (schema.TEXTS | schema.INTEGERS | schema.INTEGER_LISTS).items():
        file.put(path, getattr(info, name))
    write_measures(file, info)
    for library, text in {**info.libraries, "hdf5": h5py.version.hdf5_version}.items():
        file.put(f"{schema.LIBRARIES}/{library}", text)
    for name, value in () if info.meaning is None else info.meaning:
        if value not in ("", ()):
            texts = isinstance(value, tuple) and isinstance(value[0], str)
            file.put(f"{schema.MEANING}/{name}", [text.encode() for text in value] if texts else value)
    file.put(schema.TENSORS, [tensor.name.encode() for tensor in layout.tensors])
    with file.writing(), suppress(*HDF5_ERRORS):  # for other programs only; errors of the disk are kept all the same
        annotate(file.hdf5, layout, info)
