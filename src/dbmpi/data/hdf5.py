"""HDF5 files as they lie on disk: opened, read, and checked for damage.

Files may come from strangers, so that nothing here allocates by what a file merely declares.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.errors import UserError
from dbmpi.machine import capacity

FORMAT = "dbmpi-data"
FORMAT_VERSION = 1
BYTE_SCALE = 1 / 255
"""Factor on uint8 inputs whose dataset has no attribute `scale`."""
LARGEST_LABEL = 2**31 - 2
"""Labels are int32, and so is the number of classes."""
CACHE_SLOTS = 100_003
"""Prime, and many times the number of chunks in the cache, as HDF5 recommends."""
BLOCK_BYTES = 8 << 20
"""Files are read and written in blocks of about this size."""
_LOCKED = re.compile("unable to lock file|already open for (write|SWMR)", re.IGNORECASE)
"""What HDF5 says of a file that another program writes, or that says so of itself."""


def open_file(path: Path, cache_bytes: int = 0) -> h5py.File:
    """Open an HDF5 file for reading; raises UserError where that cannot be done.

    Without a chunk cache only the rows asked for are read, which suits rows in random order; chunks that are
    compressed are unpacked whole and need `cache_bytes` for them.
    """
    if not path.exists():
        raise UserError(f"{path}: no such data file; expected an HDF5 file, e.g. made by 'dbmpi data import'")
    if not path.is_file():
        raise UserError(f"{path}: is not a file; expected an HDF5 file, e.g. made by 'dbmpi data import'")
    try:
        with path.open("rb"):
            pass
        if not h5py.is_hdf5(path):
            raise UserError(f"{path}: is not an HDF5 file; convert it with 'dbmpi data import'")
        return h5py.File(path, "r", locking="best-effort", rdcc_nbytes=cache_bytes, rdcc_nslots=CACHE_SLOTS)
    except OSError as error:
        if _LOCKED.search(str(error)):
            raise UserError(
                f"{path}: is open for writing in another program; wait until that has closed it, or learn from a copy "
                f"(if no program has it open, one has died with it: 'h5clear -s {path}' makes it readable again)"
            ) from None
        raise UserError(f"{path}: cannot be opened as HDF5 (incomplete or damaged?): {error}") from None


@contextlib.contextmanager
def damage(path: Path, what: str) -> Iterator[None]:
    """Turn what HDF5 raises over a damaged file, in all its variety, into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: {what} cannot be read: {capacity.explain(error)}") from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {what} cannot be read (damaged file?): {error}") from error


def plain_name(place: Any) -> str:
    """Return the name of a dataset or group for messages, as the user wrote it."""
    return str(place.name).lstrip("/") or "/"


def compressed(dataset: h5py.Dataset) -> bool:
    """Return whether the chunks of a dataset pass through filters."""
    return bool(dataset.id.get_create_plist().get_nfilters())


def number(path: Path, dataset: h5py.Dataset, name: str, default: float) -> float:
    """Return an attribute that is one number; raises UserError for anything else."""
    value = attribute(path, dataset, name)
    if value is None:
        return default
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: attribute {name!r} of {plain_name(dataset)!r} is {str(value)[:40]!r}; expected one number, "
            f"e.g. 0.5"
        )
    return array.reshape(()).item()  # type: ignore[no-any-return]


def read(path: Path, dataset: h5py.Dataset, selection: Any) -> np.ndarray:
    """Return a part of a dataset; a file that is damaged, or cut off while it is open, is a UserError that names it."""
    with damage(path, f"dataset {plain_name(dataset)!r}"):
        values = np.asarray(dataset[selection])
        # HDF5 gives zeros for what lies behind the end of the file, where that has moved since it was opened.
        file = dataset.file.id
        if os.fstat(file.get_vfd_handle()).st_size < file.get_filesize():
            raise UserError(f"{path}: has become shorter while it was read; leave it alone until the run has ended")
        return values


def not_finite(rows: np.ndarray) -> np.ndarray:
    """Return the positions of the rows that hold NaN, infinity, or a number too large for float32."""
    if rows.dtype.kind != "f":
        return np.empty(0, np.int64)
    with np.errstate(over="ignore"):
        narrow = rows.astype(np.float32, copy=False)
    finite = np.isfinite(narrow)
    if finite.all():
        return np.empty(0, np.int64)
    return np.flatnonzero(~finite.reshape(len(rows), -1).all(axis=1))


def check_version(path: Path, file: h5py.File) -> None:
    """Refuse files of ours that are no data files, or of a later version."""
    declared = attribute(path, file, "format")
    if isinstance(declared, bytes):
        declared = declared.decode("utf-8", "replace")
    if declared == FORMAT:
        version = number(path, file, "format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path}: has version {version:g} of the data format, but this dbmpi reads up to {FORMAT_VERSION}; "
                f"upgrade it"
            )
    elif isinstance(declared, str) and declared.startswith("dbmpi-"):
        raise UserError(f"{path}: is a file of format {declared!r}; expected {FORMAT!r}")


def attribute(path: Path, place: Any, name: str) -> Any:
    """Return an attribute, or None where there is none."""
    with damage(path, f"attribute {name!r} of {plain_name(place)!r}"):
        return place.attrs.get(name)


def check_storage(path: Path, dataset: h5py.Dataset, memory_bytes: int) -> None:
    """Refuse datasets that declare more than was ever written, and chunks that cannot be held in memory."""
    name = plain_name(dataset)
    if dataset.chunks is None:
        stored = dataset.id.get_storage_size()
        if stored < dataset.nbytes:
            raise UserError(
                f"{path}: dataset {name!r} declares {dataset.nbytes} bytes, but only {stored} were written; "
                f"write all of it, or store it without the rest"
            )
        return
    chunk_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if chunk_bytes > memory_bytes:
        raise UserError(
            f"{path}: dataset {name!r} has chunks of {chunk_bytes / 2**20:.0f} MiB, but data.memory_mib allows "
            f"{memory_bytes / 2**20:.0f}; store it with smaller chunks, e.g. with h5repack"
        )
    expected = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    written = dataset.id.get_num_chunks()
    if written < expected:
        raise UserError(
            f"{path}: dataset {name!r} has {expected} chunks, but only {written} were ever written; write all of it, "
            f"or shorten it to the samples that are there, e.g. with h5py's Dataset.resize"
        )
