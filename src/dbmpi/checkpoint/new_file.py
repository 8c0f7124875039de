"""A new HDF5 file that appears under its name when it is whole and on disk, and that a full disk cannot crash."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
from numpy.typing import DTypeLike

from dbmpi.checkpoint import checksums
from dbmpi.checkpoint import compressed as compression
from dbmpi.checkpoint.raw_file import RawFile
from dbmpi.checkpoint.untrusted import HDF5_ERRORS, reason
from dbmpi.errors import DiskFailed, RunFailed, UserError
from dbmpi.index.boxes import Box

ARRAYS = {"libver": ("v108", "v110"), "alignment_threshold": 65536, "alignment_interval": 4096}
"""Options of h5py for a file of large arrays.

Version 1.8 of the format has checksums over everything but the arrays; every HDF5 since 2008 reads it.  Aligned arrays
are written in whole pages.
"""


_FLUSHED = 1 << 24
"""Bytes after which the disk is told to begin."""
_SYNCED = 1 << 30
"""Bytes after which it is waited for."""


class View(NamedTuple):
    """A part of an array that lies in another file, in one piece."""

    box: Box
    file: str
    """Its name, without a directory."""
    elements: int
    """Of the vector in that file."""
    first: int
    """Position in the vector."""


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
        Whether checksums of all datasets that are created here are written, too; see :mod:`dbmpi.checkpoint.checksums`.
    copy_of
        A file to begin as a copy of; without one it is empty.
    failure
        Makes the exception for a failed write from its message, and from whether the file could be created at all.

    Raises
    ------
    UserError
        If no file can be created there.
    DiskFailed
        If the disk is full or fails, now or in any later call.  No file is then left behind, and one that had the name
        before is untouched.

    Notes
    -----
    HDF5 cannot close a file whose last blocks it cannot write: on a full disk it complains again for every open object,
    and the process crashes, at the latest when it ends (h5py issue 914).  So HDF5 sees every write succeed, nothing
    more is written after an error, and :meth:`writing` raises it.

    Files are not locked: no other process knows the temporary name, and many parallel file systems refuse locks.
    """

    def __init__(
        self,
        path: Path,
        options: dict[str, Any],
        *,
        with_checksums: bool = False,
        copy_of: Path | None = None,
        failure: Callable[[str, bool], Exception] = _failure,
    ) -> None:
        self.path = path
        self._summed, self._failure = with_checksums, failure
        self._sums: dict[str, checksums.WrittenSums] = {}
        self._offsets: dict[str, tuple[int, np.dtype[Any]]] = {}
        self._bytes = 0
        self._dirty: dict[str, range] = {}
        self._flushed = 0
        self._compressed: set[str] = set()
        self._open = True
        self._temporary = temporary_path(path)
        self.size = 0
        """Bytes of the whole file, after :meth:`commit`."""
        try:
            self._temporary.unlink(missing_ok=True)
            self._raw = RawFile(self._temporary, "x+")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise failure(f"{path}: could not be written: {error.strerror}", True) from error
            text = f"{path}: cannot be written here: {error.strerror}; expected a directory that can be written to"
            raise failure(text, False) from error
        with self.writing():
            if copy_of is not None:
                self._copy(copy_of)
            self.hdf5 = h5py.File(self._raw, "w" if copy_of is None else "r+", **options)

    def create(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, *, compressed: bool = False) -> None:
        """Create an array, which is contiguous in the file and gets its offset at once; fill it by :meth:`write`.

        One that is compressed has one axis, and is filled in whole chunks.

        Parameters
        ----------
        name
            Its path in the file.
        shape, dtype
            Of the array.
        compressed
            Whether it is compressed; see :mod:`dbmpi.checkpoint.compressed`.
        """
        kind = np.dtype(dtype)
        if self._summed:
            self._sums[name] = checksums.WrittenSums(name, kind, shape)
        self._bytes += math.prod(shape) * kind.itemsize
        if compressed:
            with self.writing():
                compression.create(self.hdf5, name, math.prod(shape), kind)
            self._offsets[name] = 0, kind
            self._compressed.add(name)
            return
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = _space(shape)
        with self.writing():
            above, _, last = name.rpartition("/")
            group = self.hdf5.require_group(above) if above else self.hdf5
            stored = h5py.h5t.py_create(kind, logical=True)
            dataset = h5py.h5d.create(group.id, last.encode(), stored, space, dcpl=properties)
            self._offsets[name] = dataset.get_offset() or 0, kind  # None where there are no elements

    def create_view(
        self, name: str, shape: tuple[int, ...], dtype: DTypeLike, source: str, views: Sequence[View]
    ) -> None:
        """Create an array that consists of parts of vectors in other files; what is missing there reads as NaN.

        Parameters
        ----------
        name
            Its path in the file.
        shape, dtype
            Of the array, and of the vectors.
        source
            Path of the vector in each of the other files.
        views
            The parts.
        """
        if not views:  # an array without elements
            self.create(name, shape, dtype)
            return
        kind = np.dtype(dtype)
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.VIRTUAL)
        properties.set_fill_value(np.array(np.nan, kind))
        with self.writing():
            for box, file, elements, first in views:
                there, here = h5py.h5s.create_simple((elements,)), _space(shape)
                there.select_hyperslab((first,), (box.size,))
                if shape:
                    here.select_hyperslab(box.starts, box.shape)
                properties.set_virtual(here, file.encode(), f"/{source}".encode(), there)
            above, _, last = name.rpartition("/")
            group = self.hdf5.require_group(above) if above else self.hdf5
            stored = h5py.h5t.py_create(kind, logical=True)
            h5py.h5d.create(group.id, last.encode(), stored, _space(shape), dcpl=properties)

    def _copy(self, path: Path) -> None:
        self._bytes = path.stat().st_size
        self.check_space()
        with path.open("rb") as source:
            left = self._bytes
            with contextlib.suppress(OSError):  # not between these file systems
                while left and (count := os.copy_file_range(source.fileno(), self._raw.fileno(), min(left, 2**26))):
                    left -= count
            source.seek(self._bytes - left)
            shutil.copyfileobj(source, self._raw, 2**17)
        self._raw.check()  # HDF5 must not see a part of a file
        self._raw.seek(0)

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
            if name in self._compressed:
                self.hdf5[name][first : first + len(values)] = values
            written = len(data) if name in self._compressed else 0
            while written < len(data):
                written += os.pwrite(self._raw.fileno(), data[written:], offset + start + written)
            self._written(name, offset + start, written)
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
        data, kind = _typed(value)
        with self.writing():
            self.hdf5.create_dataset(name, data=data, dtype=kind)
        if self._summed:
            stored = np.array(data, dtype=kind, order="C")
            self._sums[name] = checksums.WrittenSums(name, stored.dtype, stored.shape)
            self._sums[name].wrote(0, memoryview(stored.tobytes()))

    def offset(self, name: str) -> int:
        """Return where in the file the array `name` begins."""
        return self._offsets[name][0]

    def checksums(self, name: str) -> np.ndarray:
        """Return the checksums of the array `name`, after :meth:`commit`."""
        return self._sums[name].found

    def set_attribute(self, name: str, value: str | int, of: str = "/") -> None:
        """Set the attribute `name` of a member `of` the file, by default of the file itself, to `value`."""
        with self.writing():
            data, kind = _typed(value)
            self.hdf5[of].attrs.create(name, data, dtype=kind)

    def commit(self, check: Callable[[], object] = lambda: None) -> None:
        """Bring the file to disk and give it its name, unless `check`, called just before that, raises."""
        with self.writing():
            for name, sums in self._sums.items():
                found = sums.complete(self._raw.fileno(), self._offsets.get(name, (0, None))[0])
                self.hdf5.create_dataset(f"{checksums.GROUP}/{name}", data=found)
            self.hdf5.close()
            self._raw.check()
            os.fsync(self._raw.fileno())
            self.size = os.fstat(self._raw.fileno()).st_size
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
        # The caller raises the error that has led here, and not another one of the same disk.
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        if hasattr(self, "hdf5"):
            self.hdf5.close()
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _written(self, name: str, offset: int, count: int) -> None:
        """Let the disk begin with what was written while the next bytes are prepared; they stay in the cache."""
        dirty = self._dirty.get(name) or range(offset, offset)
        self._dirty[name] = dirty = range(min(dirty.start, offset), max(dirty.stop, offset + count))
        if len(dirty) >= _FLUSHED:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._raw.fileno(), dirty.start, len(dirty), os.POSIX_FADV_DONTNEED)
            self._flushed, self._dirty[name] = self._flushed + len(dirty), range(0)
        if self._flushed >= _SYNCED:  # so that the end need not wait for long
            self._flushed = 0
            os.fdatasync(self._raw.fileno())

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """In this context, errors of the disk and of HDF5 become `failure`; after any exception no file is left."""
        if not self._open:
            raise ValueError(f"{self.path}: the file is committed or aborted already")
        try:
            yield
            self._raw.check()
        except (UserError, RunFailed):  # of a check, and those that are made here
            self.abort()
            raise
        except HDF5_ERRORS as error:
            self.abort()
            raise self._failure(f"{self.path}: could not be written: {reason(error)}", True) from error
        except BaseException:
            self.abort()
            raise


def _space(shape: tuple[int, ...]) -> Any:
    return h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)


def _typed(value: str | float | Sequence[float] | Sequence[bytes]) -> tuple[Any, Any]:
    """Return a value as HDF5 takes it, and its type.

    That of texts has a fixed length: unlike a variable one it lies in the dataset, and says how much to read.
    """
    values = [value.encode()] if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    texts = [text for text in values if isinstance(text, bytes)]
    if texts:
        kind: Any = h5py.string_dtype("utf-8", max(1, *map(len, texts)))
        return texts[0] if isinstance(value, str) else np.array(texts, kind), kind
    kind = np.dtype(np.float64 if values and isinstance(values[0], float) else np.int64)
    return np.asarray(value, kind), kind


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
