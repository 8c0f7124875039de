"""Read a checkpoint: open the right one, compare it with a network, read ranges of its vectors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import DTypeLike

from dbmpi.checkpoint import directory, schema
from dbmpi.checkpoint.schema import HDF5_ERRORS
from dbmpi.checkpoint.untrusted import Malformed, UntrustedFile
from dbmpi.errors import UserError
from dbmpi.paramserver.layout import Layout

_DIFFERENCES_SHOWN = 6
_CONVERTED_AT_ONCE = 2**20


class Checkpoint:
    """An open checkpoint: a description and named vectors of one layout.

    Made by :meth:`open`; closed by :meth:`close` or as a context manager.

    Attributes
    ----------
    path : Path
        The file.
    notice : str
        Empty, or why this file was taken instead of the one that ``latest`` names.
    info : CheckpointInfo
        All but the arrays.
    layout : Layout
        The tensors, in the order of the flat vector.
    vectors : tuple of str
        ``"parameters"`` and the names of the rule's state.
    dtype : dtype
        Of the arrays.
    """

    def __init__(self, path: Path, notice: str = "") -> None:
        self.path = path
        self.notice = notice
        self._file = _open(path)
        try:
            checked = UntrustedFile(self._file, path.stat().st_size)
            self.info = checked.info()
            self.layout = checked.layout()
            self.vectors = checked.vectors()
            self.dtype, self._offsets = checked.arrays(self.layout, self.vectors)
            self._descriptor: int = self._file.id.get_vfd_handle()
        except Malformed as error:
            self._file.close()
            raise UserError(f"{path}: not a whole checkpoint: {error}") from None
        except HDF5_ERRORS as error:
            self._file.close()
            raise UserError(f"{path}: the checkpoint cannot be read: {_text(error)}") from None

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a file, or the latest checkpoint of a run directory or of a directory of checkpoints.

        A checkpoint can be opened at any time, also while a run writes the next one: a file that has its name
        is whole and never changes.  That is also why no lock is taken, which many parallel file systems refuse.

        Raises
        ------
        UserError
            If there is none, or the file is no checkpoint, is torn, or is of a later format.
        """
        if not path.is_dir():
            if path.name == directory.LATEST and path.is_file() and not path.is_symlink():
                return cls(directory.read_latest(path.parent) or path)
            return cls(path)
        place = directory.checkpoints_directory(path)
        for _ in range(3):
            latest = directory.read_latest(place)
            if latest is None:
                problem = f"{place / directory.LATEST} is missing or names no checkpoint"
                break
            try:
                return cls(latest)
            except UserError as error:
                problem = str(error)
            if latest == directory.read_latest(place):
                break
            # A run has replaced and deleted the file between the two looks: look again.
        return cls._newest(place, problem)

    @classmethod
    def _newest(cls, place: Path, problem: str) -> Checkpoint:
        readable = []
        for candidate in directory.checkpoints(place):
            with contextlib.suppress(UserError):
                readable.append(cls(candidate))
        if not readable:
            raise UserError(
                f"{place}: no checkpoint that can be read; expected files like step-000000123.h5 ({problem})"
            )
        newest = max(readable, key=lambda checkpoint: (checkpoint.info.created, checkpoint.info.step))
        for checkpoint in readable:
            if checkpoint is not newest:
                checkpoint.close()
        newest.notice = f"{problem}; the newest checkpoint that can be read is {newest.path}"
        return newest

    def read(self, vector: str, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,), contiguous, with the positions ``start ... start + n`` of a vector, in out's dtype."""
        stop = start + len(out)
        if out.ndim != 1 or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError("expected a contiguous vector that can be written to")
        if start < 0 or stop > self.layout.size:
            raise ValueError(f"the range [{start}, {stop}) is not within the vector of {self.layout.size} elements")
        position = 0
        try:
            for tensor, first, last in self.layout.pieces(start, stop):
                part = out[position : position + last - first]
                offset = self._offsets[vector, tensor.name] + first * self.dtype.itemsize
                _read_at(self._descriptor, offset, self.dtype, part)
                position += last - first
        except HDF5_ERRORS as error:
            raise UserError(f"{self.path}: {vector!r} cannot be read: {_text(error)}") from error

    def parameters(self, dtype: DTypeLike = np.float32) -> np.ndarray:
        """Return all parameters as one flat vector (layout.size,)."""
        out = np.empty(self.layout.size, dtype=dtype)
        self.read(schema.PARAMETERS, 0, out)
        return out

    def expect(self, layout: Layout, vectors: Sequence[str] = ()) -> None:
        """Raise UserError unless the checkpoint is of this layout and holds these vectors."""
        if layout != self.layout:
            raise UserError(f"{self.path}: a checkpoint of another network: {self._difference(layout)}")
        missing = [vector for vector in vectors if vector not in self.vectors]
        if missing:
            raise UserError(
                f"{self.path}: the checkpoint has no {', '.join(map(repr, missing))}, it has "
                f"{', '.join(map(repr, self.vectors))}: it was written with another update rule; "
                "choose that rule, or start anew"
            )

    def close(self) -> None:
        """Close the file; without effect the second time."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _difference(self, layout: Layout) -> str:
        here = {tensor.name: tensor.shape for tensor in self.layout.tensors}
        there = {tensor.name: tensor.shape for tensor in layout.tensors}
        lines = [
            f"{name} is {_shape(here.get(name))} in the file and {_shape(there.get(name))} in the network"
            for name in (here | there)
            if here.get(name) != there.get(name)
        ]
        if not lines:
            return "its tensors come in another order"
        more = len(lines) - _DIFFERENCES_SHOWN
        return "; ".join(lines[:_DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _open(path: Path) -> Any:
    try:
        return h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; expected a file, or the directory of a run") from None
    except PermissionError:
        raise UserError(f"{path}: the checkpoint may not be read by this user") from None
    except HDF5_ERRORS as error:
        raise UserError(f"{path}: not a checkpoint, or a torn one: {_text(error)}") from None


def _read_at(descriptor: int, offset: int, dtype: np.dtype[Any], out: np.ndarray) -> None:
    """Fill the contiguous vector `out` (n,) from values of `dtype` at the bytes from `offset` of a file.

    The arrays of a checkpoint are contiguous in C order, so a range of the flat vector is a range of bytes: without
    conversion it is read with one call of the operating system and without a copy.
    """
    if out.dtype == dtype:
        left = out.view(np.uint8).data
        while left:
            count = os.preadv(descriptor, [left], offset)
            if count == 0:
                raise OSError("the file ends in the middle of an array")
            left, offset = left[count:], offset + count
        return
    buffer = np.empty(min(len(out), _CONVERTED_AT_ONCE), dtype)
    for start in range(0, len(out), _CONVERTED_AT_ONCE):
        part = out[start : start + _CONVERTED_AT_ONCE]
        _read_at(descriptor, offset + start * dtype.itemsize, dtype, buffer[: len(part)])
        part[:] = buffer[: len(part)]


def _text(error: Exception) -> str:
    return " ".join(str(error).split())


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a single number"
