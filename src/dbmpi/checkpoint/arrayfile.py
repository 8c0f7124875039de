"""A new HDF5 file of whole arrays, that appears under its name when it is complete and on disk."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import DTypeLike

from dbmpi.checkpoint import checksums
from dbmpi.checkpoint.new_file import NewFile
from dbmpi.checkpoint.schema import HDF5_ERRORS
from dbmpi.errors import DiskFailed, UserError


class ArrayFile:
    """An HDF5 file that is being written under a temporary name.

    Parameters
    ----------
    path : Path
        The name that the file gets in :meth:`commit`.
    with_checksums : bool
        Whether checksums of all datasets are written, too; see :mod:`dbmpi.checkpoint.checksums`.

    Raises
    ------
    UserError
        If no file can be made there.
    DiskFailed
        If the disk is full or fails, now or in any later call.  No file is then left behind, and one that had the
        name before is untouched.

    Notes
    -----
    The arrays are contiguous in the file and get their place at once, so that a write is one plain write of the
    operating system at an offset.  Files are not locked: nobody else knows the temporary name, and many parallel
    file systems refuse locks.
    """

    def __init__(self, path: Path, *, with_checksums: bool = False) -> None:
        self.path = path
        self._summed = with_checksums
        self._sums: dict[str, checksums.WrittenSums] = {}
        self._offsets: dict[str, tuple[int, np.dtype[Any]]] = {}
        self._bytes = 0
        self._new: NewFile | None = None
        with self._or_nothing():
            self._new = self._begin()
            # Version 1.8 of the format has checksums over all that is not array; every HDF5 since 2008 reads it.
            # Aligned arrays are written in whole pages.
            self._file: Any = self._new.hdf5(
                libver=("v108", "v110"), alignment_threshold=65536, alignment_interval=4096
            )
            self._new.check()

    def create(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        """Make room for an array; `name` is its path in the file."""
        kind = np.dtype(dtype)
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
        with self._or_nothing():
            above, _, last = name.rpartition("/")
            group = self._file.require_group(above) if above else self._file
            stored = h5py.h5t.py_create(kind, logical=True)
            dataset = h5py.h5d.create(group.id, last.encode(), stored, space, dcpl=properties)
            self._offsets[name] = dataset.get_offset() or 0, kind  # None where there are no elements
        if self._summed:
            self._sums[name] = checksums.WrittenSums(name, kind, shape)
        self._bytes += math.prod(shape) * kind.itemsize

    def check_room(self) -> None:
        """Raise DiskFailed if the disk has no room for the arrays created so far."""
        with self._or_nothing():
            free = shutil.disk_usage(self.path.parent).free
            if free < self._bytes:
                needs = f"{self._bytes / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB are free"
                raise OSError(errno.ENOSPC, needs)

    def write(self, name: str, first: int, values: np.ndarray) -> None:
        """Write `values` (n,), contiguous and of the array's dtype, to its flat positions ``first ... first + n``."""
        new = self._require_open()
        offset, dtype = self._offsets[name]
        assert values.dtype == dtype
        with self._or_nothing():
            new.check()
            new.write_at(offset + first * dtype.itemsize, values)
        if self._summed:
            self._sums[name].wrote(first * dtype.itemsize, values.view(np.uint8).data)

    def put(self, name: str, value: str | float | Sequence[float] | Sequence[bytes]) -> None:
        """Add a small dataset: a text, a number, numbers, or a non-empty list of texts (as UTF-8).

        Numbers are stored as int64, or as float64 where they are a float, or a list that begins with one.
        """
        self._require_open()
        data: Any
        if isinstance(value, str):
            data, kind = value.encode(), _text_type(len(value.encode()))
        elif isinstance(value, Sequence) and value and isinstance(value[0], bytes):
            kind = _text_type(max(len(text) for text in value if isinstance(text, bytes)))
            data = np.array(value, dtype=kind)
        else:
            first = value[0] if isinstance(value, Sequence) and value else value
            kind = np.dtype(np.float64 if isinstance(first, float) else np.int64)
            data = np.asarray(value, dtype=kind)
        with self._or_nothing():
            self._file.create_dataset(name, data=data, dtype=kind)
        if self._summed:
            stored = np.array(data, dtype=kind, order="C")
            self._sums[name] = checksums.WrittenSums(name, stored.dtype, stored.shape)
            self._sums[name].wrote(0, memoryview(stored.tobytes()))

    def set_attribute(self, name: str, value: str | int, of: str = "/") -> None:
        """Set an attribute of the file or of one of its members."""
        self._require_open()
        with self._or_nothing():
            if isinstance(value, str):
                self._file[of].attrs.create(name, value.encode(), dtype=_text_type(len(value.encode())))
            else:
                self._file[of].attrs.create(name, value, dtype=np.int64)

    def commit(self) -> None:
        """Bring the file to disk and give it its name."""
        new = self._require_open()
        with self._or_nothing():
            for name, sums in self._sums.items():
                found = sums.complete(new.descriptor, self._offsets.get(name, (0, None))[0])
                self._file.create_dataset(f"{checksums.GROUP}/{name}", data=found)
            new.complete()
            new.commit()
        self._new = None

    def abort(self) -> None:
        """Remove the file; without effect after a commit or another abort."""
        if self._new is not None:
            self._new.abort()
            self._new = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _begin(self) -> NewFile:
        try:
            return NewFile(self.path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{self.path}: cannot be written here: {error.strerror}; expected a directory that can be written to"
            ) from error

    def _require_open(self) -> NewFile:
        if self._new is None:
            raise ValueError(f"{self.path}: the file is committed or aborted already")
        return self._new

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Leave no file behind on an error, and raise DiskFailed for what the disk or HDF5 says."""
        try:
            yield
        except UserError:
            raise
        except HDF5_ERRORS as error:
            self.abort()
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise DiskFailed(f"{self.path}: could not be written: {reason}") from error
        except BaseException:
            self.abort()
            raise


def _text_type(length: int) -> Any:
    """Return a type of fixed length: unlike a variable one it lies in the dataset, and says how much to read."""
    return h5py.string_dtype("utf-8", max(length, 1))
