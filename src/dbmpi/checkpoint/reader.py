"""Read a checkpoint: open the right one, compare it with a network, read ranges of its vectors."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from dbmpi.checkpoint import directory, schema
from dbmpi.checkpoint.checksums import Mismatch
from dbmpi.checkpoint.contents import Contents, StateArray
from dbmpi.checkpoint.finite import finite
from dbmpi.checkpoint.stored_arrays import StoredRun
from dbmpi.checkpoint.untrusted import Foreign, Malformed, damage, open_file
from dbmpi.errors import Damaged, UserError
from dbmpi.index.layout import Layout

_DIFFERENCES_SHOWN = 6
_CONVERTED_AT_ONCE = _CHECKED_AT_ONCE = 2**20
_ATTEMPTS = 10
"""How often a checkpoint is looked for where a run deletes what has just been found."""


class Checkpoint:
    """An open checkpoint: a description and named vectors of one layout.

    Made by :meth:`open`; closed by :meth:`close` or as a context manager.

    Attributes
    ----------
    path : Path
        The file.
    notice : str
        Empty, or which files of the directory cannot be read, so that this one was taken.
    unreadable : mapping of Path to UserError
        These files.
    info : CheckpointInfo
        All but the arrays.
    layout : Layout
        The tensors, in the order of the flat vector.
    vectors : tuple of str
        ``"parameters"`` and the names of the rule's state.
    dtype : dtype
        Of their arrays.
    state_arrays : mapping of str to StateArray
        What an objective of a user's own has beside its parameters: dtypes and shapes by name, empty if nothing.
    nbytes : int
        Size of all its files.
    files : tuple of Path
        The file, and those of its shards.
    has_checksums : bool
        Whether everything is verified when it is read; the first version of the format had no checksums.
    """

    def __init__(self, path: Path, notice: str = "") -> None:
        self.path = path
        self.notice = notice
        self.files: tuple[Path, ...] = (path,)
        self.unreadable: Mapping[Path, UserError] = {}
        # What a link leads to may change at any time, and views are found beside it.
        real = path.resolve() if path.is_symlink() else path
        with contextlib.ExitStack() as stack:
            expected = "expected a checkpoint, or the directory of a run"
            self._file = stack.enter_context(open_file(real, "checkpoint", expected, locking=False))
            stack.enter_context(damage(path, "the checkpoint"))
            try:
                self.nbytes = os.fstat(self._file.id.get_vfd_handle()).st_size
                contents = Contents(self._file, real, self.nbytes)
                self._shards = contents.shards
                if contents.shards is not None:
                    stack.callback(contents.shards.files.close)
                    self.files += tuple(real.with_name(name) for name in contents.shards.names)
                    self.nbytes += contents.shards.nbytes
                self.info = contents.info()
                self.layout = contents.layout()
                self.vectors = contents.vectors()
                self.dtype, self._arrays = contents.arrays(self.layout, self.vectors)
                self.state_arrays: Mapping[str, StateArray] = contents.objective_state()
                self.has_checksums = contents.verified
            except Malformed as error:
                kind = UserError if isinstance(error, Foreign) else Damaged
                raise kind(f"{path}: not a whole checkpoint: {error}") from None
            stack.pop_all()

    @classmethod
    def open(cls, path: Path, without: Collection[Path] = ()) -> Checkpoint:
        """Open a file, or the newest whole checkpoint of a run directory or of a directory of checkpoints.

        A checkpoint can be opened at any time, also while a run writes the next one: a file that has its name
        is whole and never changes.  That is also why no lock is taken, which many parallel file systems refuse.
        It stays readable where the run deletes it meanwhile, unless it is of very many files.

        Parameters
        ----------
        path
            A file, ``latest``, ``best``, or a directory; there the newest counts, whatever ``latest`` says, because a
            run may have been killed between the two.
        without
            Files of a directory that are not to be taken.

        Raises
        ------
        UserError
            If there is none, or the file is no checkpoint, is torn, or is of a later format.
        """
        if not path.is_dir():
            if path.name in directory.POINTERS and path.is_file() and not path.is_symlink():
                path = directory.read_pointer(path.parent, path.name) or path
            return _steady(cls, path)
        folder = directory.checkpoints_directory(path)
        newest, unreadable = _open_newest(cls, folder, without)
        latest = directory.read_pointer(folder)
        problems = [str(error) for error in unreadable.values()]
        if latest is None:
            problems.append(f"{folder / directory.LATEST} is missing or names no checkpoint")
        elif not latest.exists():
            problems.append(f"{latest}: no such checkpoint")
        if newest is None:
            raise UserError(
                f"{folder}: no checkpoint that can be read; expected files like step-000000123.h5 "
                f"({'; '.join([*problems, *(f'{path} is not taken' for path in without)])})"
            )
        if problems:
            newest.notice = f"{'; '.join(problems)}; the newest checkpoint that can be read is {newest.path}"
        newest.unreadable = unreadable
        return newest

    def read(self, vector: str, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,), contiguous, with the positions ``start ... start + n`` of a vector, in out's dtype.

        Raises
        ------
        Damaged
            If some of it is not what was written.
        """
        stop = start + len(out)
        if out.ndim != 1 or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError("expected a contiguous vector that can be written to")
        if start < 0 or stop > self.layout.size:
            raise ValueError(f"the range [{start}, {stop}) is not within the vector of {self.layout.size} elements")
        position = 0
        for tensor, first, last in self.layout.pieces(start, stop):
            part = out[position : position + last - first]
            with self._naming(f"{schema.group_of(vector)}/{tensor.name}"):
                done = 0
                for segment in self._arrays.segments(vector, tensor, first, last):
                    _fill(segment, self.dtype, part[done : done + segment.length])
                    done += segment.length
            position += last - first

    def load(self, vector: str, start: int, out: np.ndarray) -> None:
        """Fill `out` from position `start` of a `vector`, as :meth:`read` does, with numbers to resume from.

        Parameters are finite then, and nothing is NaN.

        Raises
        ------
        Damaged
            If some of it is not what was written.
        UserError
            If no run can resume from some of it.
        """
        for first in range(0, len(out), _CHECKED_AT_ONCE):
            self._load(vector, start + first, out[first : first + _CHECKED_AT_ONCE])

    def _load(self, vector: str, start: int, out: np.ndarray) -> None:
        """Fill a piece that is small enough for a cache, and check it."""
        self.read(vector, start, out)
        if finite(out):
            return
        lowest, highest = float(np.min(out)), float(np.max(out))
        if math.isnan(lowest) or (vector == schema.PARAMETERS and math.isinf(highest - lowest)):
            bad = np.isnan(out) if math.isnan(lowest) else ~np.isfinite(out)
            at = start + int(np.argmax(bad))
            tensor, first, _ = next(self.layout.pieces(at, at + 1))
            index = ", ".join(str(int(axis)) for axis in np.unravel_index(first, tensor.shape))
            raise UserError(
                f"{self.path}: /{schema.group_of(vector)}/{tensor.name} holds {out[at - start]} at ({index}), and no "
                "run can go on from that: use an earlier checkpoint, or train anew"
            )

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read part number `part` of `parts` equal ones of every array, and compare it with its checksums, if any.

        Raises
        ------
        Damaged
            If it is not what was written.
        """
        for name, stored in self._arrays.stored.items():
            with self._naming(name):
                stored.verify(part, parts)
        for name, array in self.state_arrays.items():
            with self._naming(f"{schema.OBJECTIVE_STATE}/{name}"):
                array.bytes.verify(part, parts)

    def parameters(self, dtype: DTypeLike = np.float32) -> np.ndarray:
        """Return all parameters as one flat vector (layout.size,) of this `dtype`."""
        out = np.empty(self.layout.size, dtype=dtype)
        self.read(schema.PARAMETERS, 0, out)
        return out

    def read_state(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the elements from `start` to `stop`, in C order, of the array `name` of :attr:`state_arrays`.

        Raises
        ------
        Damaged
            If some of it is not what was written.
        """
        array = self.state_arrays[name]
        values = np.empty(stop - start, array.dtype)
        with self._naming(f"{schema.OBJECTIVE_STATE}/{name}"):
            array.bytes.read(start * array.dtype.itemsize, values.view(np.uint8).data)
        return values

    def objective_state(self) -> dict[str, np.ndarray]:
        """Return all arrays of :attr:`state_arrays`, by name; raises as :meth:`read_state` does."""
        return {
            name: self.read_state(name, 0, array.size).reshape(array.shape) for name, array in self.state_arrays.items()
        }

    def expect(self, layout: Layout, vectors: Sequence[str] = (), what: str = "network") -> None:
        """Raise UserError unless the checkpoint is of this layout, that of a `what`, and holds these vectors."""
        if layout != self.layout:
            raise UserError(f"{self.path}: a checkpoint of another {what}: {self._difference(layout, what)}")
        missing = [vector for vector in vectors if vector not in self.vectors]
        if missing:
            raise UserError(
                f"{self.path}: the checkpoint has no {', '.join(map(repr, missing))}, it has "
                f"{', '.join(map(repr, self.vectors))}: it was written with another update rule; "
                "choose that rule, or start anew"
            )

    def close(self) -> None:
        """Close the file, and those of its shards; without effect the second time."""
        self._file.close()
        if self._shards is not None:
            self._shards.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Say which array of which file cannot be read."""
        with damage(self.path, f"/{name}"):
            try:
                yield
            except Mismatch as error:
                raise Damaged(f"{self.path}: /{name} is damaged: {error}; use another checkpoint") from None

    def _difference(self, layout: Layout, what: str) -> str:
        here = {tensor.name: tensor.shape for tensor in self.layout.tensors}
        there = {tensor.name: tensor.shape for tensor in layout.tensors}
        lines = [
            f"{name} is {_shape(here.get(name))} in the file and {_shape(there.get(name))} in the {what}"
            for name in (here | there)
            if here.get(name) != there.get(name)
        ]
        if not lines:
            return "its tensors come in another order"
        more = len(lines) - _DIFFERENCES_SHOWN
        return "; ".join(lines[:_DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _steady(kind: type[Checkpoint], path: Path) -> Checkpoint:
    """Open a checkpoint; again if another one has got its name meanwhile, after which files of shards are deleted."""
    for attempt in range(_ATTEMPTS):
        before = _identity(path)
        try:
            return kind(path)
        except UserError:
            if attempt == _ATTEMPTS - 1 or _identity(path) == before:
                raise
    raise AssertionError("the last attempt raises")


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _open_newest(
    kind: type[Checkpoint], folder: Path, without: Collection[Path]
) -> tuple[Checkpoint | None, dict[Path, UserError]]:
    """Open the newest checkpoint in a directory that can be read, if any; return the errors of the others, too."""
    for attempt in range(_ATTEMPTS):
        newest: Checkpoint | None = None
        unreadable, vanished = {}, False
        for candidate in directory.checkpoints(folder):
            if candidate in without:
                continue
            try:
                opened = _steady(kind, candidate)
            except UserError as error:
                if candidate.exists():
                    unreadable[candidate] = error
                else:
                    vanished = True
                continue
            if newest is None or _age(newest) < _age(opened):
                newest, opened = opened, newest
            if opened is not None:
                opened.close()
        # A run deletes an old checkpoint when there is a newer one, which the list may not have had yet.
        vanished = vanished or (newest is None and not unreadable and directory.read_pointer(folder) is not None)
        if not vanished or attempt == _ATTEMPTS - 1:
            break
        if newest is not None:
            newest.close()
    return newest, unreadable


def _age(checkpoint: Checkpoint) -> tuple[str, int]:
    return checkpoint.info.created, checkpoint.info.step


def _fill(segment: StoredRun, dtype: np.dtype[Any], out: np.ndarray) -> None:
    """Fill the contiguous vector `out` from a segment of an array of this `dtype`.

    The arrays of a checkpoint are contiguous in C order, so a range of the flat vector is a range of bytes: without
    conversion it is read with one call of the operating system and without a copy.
    """
    if out.dtype == dtype:
        segment.stored.read(segment.first * dtype.itemsize, out.view(np.uint8).data)
        return
    buffer = np.empty(min(len(out), _CONVERTED_AT_ONCE), dtype)
    for start in range(0, len(out), _CONVERTED_AT_ONCE):
        part = out[start : start + _CONVERTED_AT_ONCE]
        segment.stored.read((segment.first + start) * dtype.itemsize, buffer[: len(part)].view(np.uint8).data)
        part[:] = buffer[: len(part)]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a single number"
