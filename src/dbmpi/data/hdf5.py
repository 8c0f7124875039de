"""Datasets of HDF5 files from anywhere, by the names that the user gave them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint import untrusted
from dbmpi.checkpoint.untrusted import damage
from dbmpi.data.in_place import InPlace
from dbmpi.data.unpacked import Unpacked, cut_off
from dbmpi.errors import UserError
from dbmpi.kernels.checks import all_finite

FORMAT = "dbmpi-data"
FORMAT_VERSION = 1
BYTE_SCALE = 1 / 255
"""Factor on uint8 inputs whose dataset has no attribute `scale`."""
LARGEST_LABEL = 2**31 - 2
"""Labels are int32, and so is the number of classes."""
BLOCK_BYTES = 8 << 20
"""Files are read and written in blocks of about this size."""


@dataclass(frozen=True)
class Dataset:
    """A dataset whose values lie in the file itself."""

    path: Path | str
    """Of the file, or what the user calls the data."""
    name: str
    """As the user calls it."""
    values: h5py.Dataset

    def error(self, text: str) -> UserError:
        """Return an error that says `text` of the dataset."""
        return UserError(f"{self.path}: dataset {self.name!r}{'' if text[0] == ':' else ' '}{text}")

    def damage(self) -> AbstractContextManager[None]:
        """Return a context in which errors of HDF5 become Damaged."""
        return damage(self.path, f"dataset {self.name!r}")

    def attribute(self, key: str) -> Any:
        """Return the attribute called `key`, or None where there is none."""
        with damage(self.path, f"attribute {key!r} of {self.name!r}"):
            return untrusted.attribute(self.values, key)

    def text(self, key: str) -> str:
        """Return the attribute `key` as text; empty where there is none."""
        found = self.attribute(key)
        return "" if found is None else decoded(found)

    def number(self, key: str, default: float) -> float:
        """Return the attribute `key`, which is one number, or the `default` where there is none."""
        value = self.attribute(key)
        array = np.asarray(default if value is None else value)
        if array.size != 1 or array.dtype.kind not in "iuf":
            raise self.wrong(key, value, "one number, e.g. 0.5")
        return array.reshape(()).item()  # type: ignore[no-any-return]

    def wrong(self, key: str, value: Any, expected: str) -> UserError:
        """Return the error for a `value` of the attribute `key` that is not what was `expected`."""
        shown = repr(value[:40]) if isinstance(value, str) else str(value)[:40]
        return UserError(f"{self.path}: attribute {key!r} of {self.name!r} is {shown}; expected {expected}")

    def read(self, selection: Any) -> np.ndarray:
        """Return the values of a `selection`; Damaged where the file is damaged, or was cut off while it is open."""
        with self.damage():
            some = isinstance(selection, tuple) and len(selection) == 1 and isinstance(selection[0], np.ndarray)
            if some and self.scattered:
                return self._rows(selection[0])
            values = np.asarray(self.values[selection])
            # HDF5 gives zeros for what lies behind the end of the file, where that has moved since it was opened.
            if cut_off(self.values):
                raise self._shorter()
            return values

    @cached_property
    def in_place(self) -> InPlace | None:
        """Reads scattered rows where they lie in the file; None where HDF5 must."""
        if not isinstance(self.values, h5py.Dataset):
            return None
        with self.damage():
            return InPlace.of(self.values)

    @cached_property
    def unpacked(self) -> Unpacked | None:
        """Reads scattered rows of compressed chunks; None where HDF5 must."""
        if not isinstance(self.values, h5py.Dataset):
            return None
        with self.damage():
            return Unpacked.of(self.values)

    @property
    def scattered(self) -> bool:
        """Whether scattered rows are read about as fast as consecutive ones, in any order."""
        return self.in_place is not None or self.unpacked is not None

    @property
    def any_order(self) -> bool:
        """Whether they may be asked for in any order, and several times."""
        return self.scattered

    def _rows(self, indices: np.ndarray) -> np.ndarray:
        if self.in_place is None:
            assert self.unpacked is not None
            return self.unpacked.rows(indices)
        rows = self.in_place.rows(indices)
        if rows is not None:
            return rows
        if cut_off(self.values):
            raise self._shorter()
        wanted, positions = np.unique(indices, return_inverse=True)
        found: np.ndarray = self.values[wanted][positions]  # or HDF5 says what is wrong
        return found

    def _shorter(self) -> UserError:
        return UserError(f"{self.path}: has become shorter while it was read; leave it alone until the run has ended")

    @property
    def stored(self) -> bool:
        """Whether it lies in an HDF5 file as it is, so that its attributes and its storage count."""
        return True

    @property
    def parts(self) -> tuple[Dataset, ...]:
        """The datasets of HDF5 whose values these are."""
        return (self,)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may want to know."""
        return ()

    @property
    def byte_scale(self) -> float | None:
        """Factor on bytes; None for that of pixels."""
        return None

    def reopened(self, fresh: Mapping[tuple[str, str], Dataset]) -> Dataset:
        """Return the same dataset of a file that was opened again, among `fresh` ones by path and name."""
        return fresh[str(self.path), self.name]

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.values.file.id.get_filesize()  # type: ignore[no-any-return]

    @property
    def at_hand(self) -> bool:
        """Whether any rows can be taken at once: they can as soon as the file has been read."""
        return True

    def check_storage(self, memory_bytes: int) -> None:
        """Refuse a dataset that declares more than was ever written, or whose chunks are larger than `memory_bytes`."""
        chunk_bytes = untrusted.chunk_bytes(self.values)
        if chunk_bytes > memory_bytes:
            raise self.error(
                f"has chunks of {chunk_bytes / 2**20:.0f} MiB, but data.memory_mib allows "
                f"{memory_bytes / 2**20:.0f}; store it with smaller chunks, e.g. with h5repack"
            )
        unwritten = untrusted.unwritten(self.values)
        if unwritten:
            raise self.error(
                f"{unwritten}; write all of it, or shorten it to the samples that are there, e.g. with h5py's "
                "Dataset.resize"
            )


def open_file(path: Path, cache_bytes: int = 0, begin: bytes = b"") -> h5py.File:
    """Open the data file `path` for reading, with a chunk cache of `cache_bytes`; UserError where it cannot be read.

    Its first bytes may be given as `begin`.
    """
    expected = "expected an HDF5 file, e.g. made by 'dbmpi data import'"
    return untrusted.open_file(path, "data file", expected, cache_bytes=cache_bytes, begin=begin)


def product(shape: Iterable[int]) -> int:
    """Return the number of elements of a `shape`."""
    return math.prod(int(length) for length in shape)


def decoded(text: Any) -> str:
    """Return a `text` of HDF5, which may be bytes."""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def not_finite(rows: np.ndarray) -> np.ndarray:
    """Return the positions of the `rows` that hold NaN, infinity, or a number too large for float32."""
    if rows.dtype.kind != "f" or (rows.dtype == np.float32 and all_finite(np.ascontiguousarray(rows).reshape(-1))):
        return np.empty(0, np.int64)
    with np.errstate(over="ignore"):
        narrow = rows.astype(np.float32, copy=False)
    return np.flatnonzero(~np.isfinite(narrow).reshape(len(rows), -1).all(axis=1))


def check_version(path: Path, file: h5py.File) -> None:
    """Raise UserError if the `file` open at `path` is one of dbmpi's that is no data file, or of a later version."""
    whole = Dataset(path, "/", file)
    declared = whole.text("format")
    if declared == FORMAT:
        version = whole.number("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path}: has version {version:g} of the data format, but this dbmpi reads up to {FORMAT_VERSION}; "
                f"upgrade it"
            )
    elif declared.startswith("dbmpi-"):
        raise UserError(f"{path}: is a file of format {declared!r}; expected {FORMAT!r}")
