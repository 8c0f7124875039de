"""What a data file looks like, and whether a given HDF5 file is one.

The format is two datasets whose first axis is the sample: `inputs` (float32, float64 or uint8) and `targets`
(integers for classes, floats for values).  ``docs/data.md`` describes it for users.  Files may come from strangers,
so that nothing here allocates by what a file merely declares, and nothing outside the file is followed.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.errors import UserError
from dbmpi.runtime import capacity

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


@dataclass(frozen=True)
class Description:
    """What a data file declares about itself."""

    samples: int
    input_shape: tuple[int, ...]
    scale: float
    """Factor on uint8 inputs; 1 for the others."""
    classes: int | None
    """The attribute `classes`, or None where it is missing or the targets are values."""
    target_size: int | None
    """Values of a sample, or None where the targets are classes."""
    has_targets: bool
    labels: tuple[int, ...] | None
    """Labels of the original file in the order of the classes, where an importer had to number them."""

    @property
    def features(self) -> int:
        """Number of inputs of one sample."""
        return math.prod(self.input_shape)

    @property
    def float32_bytes(self) -> int:
        """Size of all samples as float32."""
        return self.samples * (self.features + (self.target_size or 1)) * 4


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


def describe(path: Path, file: h5py.File, memory_bytes: int, targets_required: bool) -> Description:
    """Check ranks, types, sizes and attributes of an open data file, without reading its values.

    Raises
    ------
    UserError
        If the file is not a data file, is incomplete, or one sample or chunk would not fit `memory_bytes`.
    """
    with damage(path, "its structure"):
        return _described(path, file, memory_bytes, targets_required)


def find(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset that lies in this very file; raises UserError where there is none."""
    if name not in file and file.get(name, getlink=True) is None:
        found = ", ".join(repr(key) for key in list(file)[:8]) or "nothing"
        raise UserError(f"{path}: has no dataset {name!r}; found {found}; expected 'inputs' and 'targets'")
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise UserError(f"{path}: {name!r} is a link to another place, which is not followed; store the dataset itself")
    with damage(path, f"dataset {name!r}"):
        dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path}: {name!r} is a {type(dataset).__name__.lower()}; expected a dataset")
    if dataset.is_virtual or dataset.external:
        raise UserError(
            f"{path}: the values of dataset {name!r} lie in other files, which are not followed; copy them into one"
        )
    return dataset


def plain_name(place: Any) -> str:
    """Return the name of a dataset or group for messages, as the user wrote it."""
    return str(place.name).lstrip("/") or "/"


def compressed(dataset: h5py.Dataset) -> bool:
    """Return whether the chunks of a dataset pass through filters."""
    return bool(dataset.id.get_create_plist().get_nfilters())


def number(path: Path, dataset: h5py.Dataset, name: str, default: float) -> float:
    """Return an attribute that is one number; raises UserError for anything else."""
    value = _attribute(path, dataset, name)
    if value is None:
        return default
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: attribute {name!r} of {plain_name(dataset)!r} is {str(value)[:40]!r}; expected one number"
        )
    return array.reshape(()).item()  # type: ignore[no-any-return]


def blocks(path: Path, dataset: h5py.Dataset) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(first sample, rows)`` over a whole dataset, about BLOCK_BYTES at a time."""
    row_bytes = max(1, math.prod(dataset.shape[1:]) * dataset.dtype.itemsize)
    rows = max(1, BLOCK_BYTES // row_bytes)
    if dataset.chunks and rows > dataset.chunks[0]:
        rows -= rows % dataset.chunks[0]
    for start in range(0, dataset.shape[0], rows):
        yield start, read(path, dataset, slice(start, start + rows))


def read(path: Path, dataset: h5py.Dataset, rows: slice | np.ndarray) -> np.ndarray:
    """Return rows of a dataset; a file that is damaged, or cut off while it is open, is a UserError that names it."""
    with damage(path, f"dataset {plain_name(dataset)!r}"):
        values = np.asarray(dataset[rows])
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


def _described(path: Path, file: h5py.File, memory_bytes: int, targets_required: bool) -> Description:
    _check_version(path, file)
    inputs = find(path, file, "inputs")
    if _native(inputs) not in (np.float32, np.float64, np.uint8):
        raise UserError(f"{path}: dataset 'inputs' is {inputs.dtype}; expected float32, float64 or uint8")
    if inputs.ndim < 2:
        raise UserError(f"{path}: dataset 'inputs' has shape {inputs.shape}; expected (samples, features ...)")
    samples, input_shape = int(inputs.shape[0]), tuple(int(length) for length in inputs.shape[1:])
    if samples == 0 or 0 in input_shape:
        raise UserError(f"{path}: dataset 'inputs' has shape {inputs.shape}; expected at least one sample and feature")
    scale = 1.0
    if inputs.dtype == np.uint8:
        scale = number(path, inputs, "scale", BYTE_SCALE)
        if not (math.isfinite(scale) and scale > 0):
            raise UserError(f"{path}: attribute 'scale' of 'inputs' is {scale}; expected a number above 0")
    classes = target_size = labels = None
    has_targets = targets_required or "targets" in file
    datasets = [inputs]
    if has_targets:
        targets = find(path, file, "targets")
        datasets.append(targets)
        classes, target_size = _describe_targets(path, targets, samples)
        labels = _labels(path, targets, classes)
    described = Description(samples, input_shape, scale, classes, target_size, has_targets, labels)
    sample_bytes = (described.features + (target_size or 1)) * 4
    if sample_bytes > memory_bytes:
        raise UserError(
            f"{path}: one sample of shape {input_shape} takes {sample_bytes / 2**20:.0f} MiB, but data.memory_mib "
            f"allows {memory_bytes / 2**20:.0f}; raise it if this is meant"
        )
    for dataset in datasets:
        _check_storage(path, dataset, memory_bytes)
    return described


def _check_version(path: Path, file: h5py.File) -> None:
    declared = _attribute(path, file, "format")
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


def _describe_targets(path: Path, targets: h5py.Dataset, samples: int) -> tuple[int | None, int | None]:
    """Return ``(declared classes, values of a sample)`` of the dataset `targets`."""
    expected = "(samples,) integers for classes, or (samples, outputs) float32 or float64 for values"
    kind, shape = targets.dtype.kind, targets.shape
    if kind in "iu" and len(shape) == 1:
        values = None
    elif _native(targets) in (np.float32, np.float64) and len(shape) == 2:
        values = int(shape[1])
    else:
        hint = "; reshape it to (samples, 1)" if kind == "f" and shape is not None and len(shape) == 1 else ""
        raise UserError(f"{path}: dataset 'targets' is {targets.dtype} of shape {shape}; expected {expected}{hint}")
    if shape[0] != samples:
        raise UserError(
            f"{path}: 'inputs' has {samples} samples, but 'targets' has {shape[0]}; expected the same number"
        )
    if values is not None:
        if values == 0:
            raise UserError(f"{path}: dataset 'targets' has shape {shape}; expected at least one value a sample")
        return None, values
    classes = number(path, targets, "classes", 0)
    if "classes" in targets.attrs and not (classes == int(classes) and 1 <= classes <= LARGEST_LABEL + 1):
        raise UserError(f"{path}: attribute 'classes' of 'targets' is {classes}; expected a whole number above 0")
    return int(classes) or None, None


def _native(dataset: h5py.Dataset) -> np.dtype[Any]:
    """Return the type of the elements, whatever the order of their bytes in the file."""
    return dataset.dtype.newbyteorder("=")  # type: ignore[no-any-return]


def _labels(path: Path, targets: h5py.Dataset, classes: int | None) -> tuple[int, ...] | None:
    """Return the attribute `labels` that an importer wrote, or None."""
    value = _attribute(path, targets, "labels")
    array = np.asarray(value)
    if value is None or classes is None or array.dtype.kind not in "iu" or array.shape != (classes,):
        return None
    return tuple(array.tolist())


def _attribute(path: Path, place: Any, name: str) -> Any:
    with damage(path, f"attribute {name!r} of {plain_name(place)!r}"):
        return place.attrs.get(name)


def _check_storage(path: Path, dataset: h5py.Dataset, memory_bytes: int) -> None:
    """Refuse datasets that declare more than was ever written, and chunks that cannot be held in memory."""
    name = plain_name(dataset)
    if dataset.chunks is None:
        stored = dataset.id.get_storage_size()
        if stored < dataset.nbytes:
            raise UserError(f"{path}: dataset {name!r} declares {dataset.nbytes} bytes, but only {stored} were written")
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
        raise UserError(f"{path}: dataset {name!r} has {expected} chunks, but only {written} were ever written")
