"""A new HDF5 file that appears under its name when it is whole and on disk, and that a full disk cannot crash."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import DTypeLike

from dbmpi.checkpoint import checksums
from dbmpi.checkpoint.schema import HDF5_ERRORS
from dbmpi.errors import DiskFailed, UserError

ARRAYS = {"libver": ("v108", "v110"), "alignment_threshold": 65536, "alignment_interval": 4096}
"""Options of h5py for a file of large arrays.

Version 1.8 of the format has checksums over everything but the arrays; every HDF5 since 2008 reads it.  Aligned arrays
are written in whole pages.
"""


def _failure(text: str, begun: bool) -> Exception:
    return DiskFailed(text) if begun else UserError(text)


class NewFile:
    """An HDF5 file under a temporary name, until it is renamed.  Use as a context manager, which aborts at its end.

    Parameters
    ----------
    path
        The name that the file gets in :meth:`commit`.
    options
        Options of :class:`h5py.File`.
    with_checksums
        Whether checksums of all datasets that are made here are written, too; see :mod:`dbmpi.checkpoint.checksums`.
    failure
        Makes the exception for a failed write from its message, and from whether the file could be created at all.

    Raises
    ------
    UserError
        If no file can be made there.
    DiskFailed
        If the disk is full or fails, now or in any later call.  No file is then left behind, and one that had the name
        before is untouched.

    Notes
    -----
    HDF5 cannot close a file whose last blocks it cannot write: on a full disk it complains again for every open object,
    and the process crashes, at the latest when it ends (h5py issue 914).  So HDF5 is told that all went well, nothing
    more is written after an error, and :meth:`writing` raises it.

    Files are not locked: no other process knows the temporary name, and many parallel file systems refuse locks.
    """

    def __init__(
        self,
        path: Path,
        options: dict[str, Any],
        *,
        with_checksums: bool = False,
        failure: Callable[[str, bool], Exception] = _failure,
    ) -> None:
        self.path = path
        self._summed, self._failure = with_checksums, failure
        self._sums: dict[str, checksums.WrittenSums] = {}
        self._offsets: dict[str, tuple[int, np.dtype[Any]]] = {}
        self._bytes = 0
        self._open = True
        self._temporary = temporary_path(path)
        try:
            self._temporary.unlink(missing_ok=True)
            self._raw = _Raw(self._temporary, "x+")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise failure(f"{path}: could not be written: {error.strerror}", True) from error
            text = f"{path}: cannot be written here: {error.strerror}; expected a directory that can be written to"
            raise failure(text, False) from error
        with self.writing():
            self.hdf5 = h5py.File(self._raw, "w", **options)

    def create(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        """Create an array, which is contiguous in the file and gets its offset at once; fill it by :meth:`write`.

        Parameters
        ----------
        name
            Its path in the file.
        shape, dtype
            Of the array.
        """
        kind = np.dtype(dtype)
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
        with self.writing():
            above, _, last = name.rpartition("/")
            group = self.hdf5.require_group(above) if above else self.hdf5
            stored = h5py.h5t.py_create(kind, logical=True)
            dataset = h5py.h5d.create(group.id, last.encode(), stored, space, dcpl=properties)
            self._offsets[name] = dataset.get_offset() or 0, kind  # None where there are no elements
        if self._summed:
            self._sums[name] = checksums.WrittenSums(name, kind, shape)
        self._bytes += math.prod(shape) * kind.itemsize

    def check_space(self) -> None:
        """Raise DiskFailed if the arrays created so far are larger than the free space of the disk."""
        with self.writing():
            free = shutil.disk_usage(self.path.parent).free
            if free < self._bytes:
                needs = f"{self._bytes / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB are free"
                raise OSError(errno.ENOSPC, needs)

    def write(self, name: str, first: int, values: np.ndarray) -> None:
        """Write a part of an array by plain writes of the operating system.

        Parameters
        ----------
        name
            Of the array.
        first
            Flat position of the first element to write.
        values
            ``(n,)``, contiguous and of the array's dtype.
        """
        offset, dtype = self._offsets[name]
        assert values.dtype == dtype
        data, start = values.view(np.uint8).data, first * dtype.itemsize
        with self.writing():
            written = 0
            while written < len(data):
                written += os.pwrite(self._raw.fileno(), data[written:], offset + start + written)
        if self._summed:
            self._sums[name].wrote(start, data)

    def put(self, name: str, value: str | float | Sequence[float] | Sequence[bytes]) -> None:
        """Add a small dataset.

        Parameters
        ----------
        name
            Its path in the file.
        value
            A text, a number, numbers, or a non-empty list of texts (as UTF-8).  Numbers are stored as int64, or as
            float64 where they are a float, or a list that begins with one.
        """
        data: Any
        if isinstance(value, str):
            data, kind = value.encode(), _text_type(value.encode())
        elif isinstance(value, Sequence) and value and isinstance(value[0], bytes):
            kind = _text_type(*(text for text in value if isinstance(text, bytes)))
            data = np.array(value, dtype=kind)
        else:
            first = value[0] if isinstance(value, Sequence) and value else value
            kind = np.dtype(np.float64 if isinstance(first, float) else np.int64)
            data = np.asarray(value, dtype=kind)
        with self.writing():
            self.hdf5.create_dataset(name, data=data, dtype=kind)
        if self._summed:
            stored = np.array(data, dtype=kind, order="C")
            self._sums[name] = checksums.WrittenSums(name, stored.dtype, stored.shape)
            self._sums[name].wrote(0, memoryview(stored.tobytes()))

    def set_attribute(self, name: str, value: str | int, of: str = "/") -> None:
        """Set the attribute `name` of a member `of` the file, by default of the file itself, to `value`."""
        with self.writing():
            text = value.encode() if isinstance(value, str) else None
            kind = np.int64 if text is None else _text_type(text)
            self.hdf5[of].attrs.create(name, value if text is None else text, dtype=kind)

    def commit(self, check: Callable[[], object] = lambda: None) -> None:
        """Bring the file to disk and give it its name, unless `check`, called just before that, raises."""
        with self.writing():
            for name, sums in self._sums.items():
                found = sums.complete(self._raw.fileno(), self._offsets.get(name, (0, None))[0])
                self.hdf5.create_dataset(f"{checksums.GROUP}/{name}", data=found)
            self.hdf5.close()
            self._raw.check()
            os.fsync(self._raw.fileno())
            self._raw.close()
            check()
            self._temporary.replace(self.path)
            self._open = False
            sync(self.path.parent)

    def abort(self) -> None:
        """Remove the file and close everything; without effect after a commit or another abort."""
        if not self._open:
            return
        self._open = False
        self._raw.abandoned = True
        # The error that has led here is to be raised, and not another one of the same disk.
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        if hasattr(self, "hdf5"):
            self.hdf5.close()
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """In this context, errors of the disk and of HDF5 become `failure`; after any exception no file is left."""
        if not self._open:
            raise ValueError(f"{self.path}: the file is committed or aborted already")
        try:
            yield
            self._raw.check()
        except UserError:
            self.abort()
            raise
        except HDF5_ERRORS as error:
            self.abort()
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise self._failure(f"{self.path}: could not be written: {reason}", True) from error
        except BaseException:
            self.abort()
            raise


class _Raw(io.FileIO):
    """The file that HDF5 writes to; it keeps an error instead of raising it, and writes nothing more when abandoned."""

    abandoned = False
    error: BaseException | None = None

    def check(self) -> None:
        """Raise the first error that HDF5 has not been told, if there was one."""
        if self.error is not None:
            raise self.error

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view) and not self.abandoned:
            try:
                written += super().write(view[written:]) or 0
            except BaseException as error:  # an interrupt, too, must not be thrown into HDF5
                self._fail(error)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; what could not be written reads as zeros."""
        view = memoryview(buffer).cast("B")
        count = super().readinto(view) or 0
        view[count:] = bytes(len(view) - count)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file."""
        if not self.abandoned:
            try:
                return super().truncate(size)
            except BaseException as error:
                self._fail(error)
        return size or 0

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.abandoned = True


def _text_type(*texts: bytes) -> Any:
    """Return a type of fixed length: unlike a variable one it lies in the dataset, and says how much to read."""
    return h5py.string_dtype("utf-8", max(1, *map(len, texts)))


def temporary_path(path: Path) -> Path:
    """Return the name under which `path` is written: hidden, and of no other process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Bring the file `path`, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for directories; there it is not needed either.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
