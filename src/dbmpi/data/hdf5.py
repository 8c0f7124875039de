"""Datasets of HDF5 files from anywhere, by the names that the user gave them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint import untrusted
from dbmpi.checkpoint.untrusted import damage
from dbmpi.errors import UserError

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
        return damage(Path(self.path), f"dataset {self.name!r}")

    def attribute(self, key: str) -> Any:
        """Return the attribute called `key`, or None where there is none."""
        with damage(Path(self.path), f"attribute {key!r} of {self.name!r}"):
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
            values = np.asarray(self.values[selection])
            # HDF5 gives zeros for what lies behind the end of the file, where that has moved since it was opened.
            file = self.values.file.id
            if os.fstat(file.get_vfd_handle()).st_size < file.get_filesize():
                raise UserError(
                    f"{self.path}: has become shorter while it was read; leave it alone until the run has ended"
                )
            return values

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


def open_file(path: Path, cache_bytes: int = 0) -> h5py.File:
    """Open the data file `path` for reading, with a chunk cache of `cache_bytes`; UserError where it cannot be read."""
    expected = "expected an HDF5 file, e.g. made by 'dbmpi data import'"
    return untrusted.open_file(path, "data file", expected, cache_bytes=cache_bytes)


def decoded(text: Any) -> str:
    """Return a `text` of HDF5, which may be bytes."""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def not_finite(rows: np.ndarray) -> np.ndarray:
    """Return the positions of the `rows` that hold NaN, infinity, or a number too large for float32."""
    if rows.dtype.kind != "f":
        return np.empty(0, np.int64)
    with np.errstate(over="ignore"):
        narrow = rows.astype(np.float32, copy=False)
    finite = np.isfinite(narrow)
    if finite.all():
        return np.empty(0, np.int64)
    return np.flatnonzero(~finite.reshape(len(rows), -1).all(axis=1))


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
