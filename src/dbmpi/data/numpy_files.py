"""NumPy's NPY files, mapped, and the arrays of NPZ archives; Python objects in them are never read."""

from __future__ import annotations

import copy
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dbmpi.data.derived import Derived, Rows, Selection
from dbmpi.errors import UserError
from dbmpi.kernels.mapped import MappedFile

NPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"
_LOCAL_HEADER = 30
"""Bytes before the name of a member of a ZIP archive."""
_ZIP_FAULTS = (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error)


class _Header(NamedTuple):
    kind: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    offset: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.kind.itemsize


class MappedRows(Rows):
    """An array that lies in a file as it is, mapped into memory.

    Parameters
    ----------
    path
        The file.
    header
        Of the array, whose offset is that in the file; the file must reach up to its end.
    """

    def __init__(self, path: Path, header: _Header) -> None:
        super().__init__(header.shape, header.kind)
        with path.open("rb") as file:
            self._path, self._file = path, MappedFile(file.fileno())
        flat = self._file.memory[header.offset : header.end].view(header.kind)
        self._array = flat.reshape(header.shape, order="F" if header.fortran_order else "C")

    def __len__(self) -> int:
        return self.shape[0]

    def reshaped(self, *shape: int) -> MappedRows:
        """Return the same numbers with another `shape`."""
        again = copy.copy(self)
        again.shape, again._array = shape, self._array.reshape(shape)
        return again

    @property
    def scattered(self) -> bool:
        """True: any row is where it is."""
        return True

    any_order = scattered

    def __getitem__(self, selection: Selection | tuple[Selection]) -> np.ndarray:
        """Return a copy of some rows; UserError where the file has become shorter."""
        found = np.array(self._array[selection], order="C")
        if not self._file.whole:
            raise UserError(
                f"{self._path}: has become shorter while it was read; leave it alone until the run has ended"
            )
        return found


def mapped(path: Path, expected: str = "expected an NPY file") -> MappedRows:
    """Map an NPY file into memory; its header is compared with the size of the file.

    Parameters
    ----------
    path
        The file.
    expected
        Ends the message where it is none.

    Raises
    ------
    UserError
        If it is not NPY, torn, or holds anything but numbers and texts.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'no such file'}; {expected}")
    with path.open("rb") as file:
        header = _read_header(file, str(path))
        size = os.fstat(file.fileno()).st_size
    if header.end > size:
        raise UserError(
            f"{path}: its header declares {header.kind} of shape {header.shape}, which end at byte {header.end}, but "
            f"the file has {size} bytes: torn or damaged"
        )
    if not header.shape or 0 in header.shape:
        raise UserError(f"{path}: holds an array of shape {header.shape}; expected at least one sample")
    return MappedRows(path, header)


def npy_dataset(path: Path, name: str) -> Derived:
    """Return the array of the NPY file at `path`, which the user calls `name`, where it lies."""
    return Derived(path, name, mapped(path))


class NpzArchive:
    """The arrays of an NPZ archive, plain or compressed, and the sparse matrices of SciPy.

    Parameters
    ----------
    path
        The archive.
    memory_bytes
        Most that a compressed array may take; one that is stored as it is, is mapped.
    """

    def __init__(self, path: Path, memory_bytes: int) -> None:
        self._path, self._memory_bytes = path, memory_bytes
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        except _ZIP_FAULTS as error:
            raise UserError(f"{path}: cannot be read as an NPZ archive: {error}; torn or damaged?") from None

    @property
    def names(self) -> list[str]:
        """Of the arrays."""
        return [*self._members]

    def holds(self, name: str) -> bool:
        """Return whether there is an array called `name`."""
        return name.strip("/") in self._members

    def find(self, name: str, setting: str = "") -> Derived:
        """Return an array, or a sparse matrix that SciPy has stored as the whole archive.

        Parameters
        ----------
        name
            As the user calls it.
        setting
            By which another one can be named.

        Raises
        ------
        UserError
            If there is no such array, or it holds anything but numbers and texts.
        """
        if not self.holds(name):
            if {"indptr", "indices", "data", "shape", "format"} <= set(self._members) and setting == "data.inputs":
                return self._sparse(name)
            way_on = f"; name the array by {setting}" if setting else ""
            raise UserError(f"{self._path}: has no array {name!r}; found {_some(self.names)}{way_on}")
        return Derived(self._path, name, self._rows(name.strip("/")))

    def _sparse(self, name: str) -> Derived:
        from dbmpi.data.sparse import SparseRows

        kind, shape, indptr, indices, data = (
            np.asarray(self._rows(key)[(slice(None),)] if self._shape(key) else self._loaded(key))
            for key in ("format", "shape", "indptr", "indices", "data")
        )
        text = kind.tobytes().replace(b"\0", b"").decode("ascii", "replace")
        lengths = tuple(shape.tolist())
        if text != "csr" or len(lengths) != 2:
            raise UserError(
                f"{self._path}: is a sparse matrix of SciPy of the format {text!r}; expected 'csr': save x.tocsr()"
            )
        rising = indptr.shape == (lengths[0] + 1,) and indptr[0] == 0 and (np.diff(indptr) >= 0).all()
        if not rising or indptr[-1] > len(indices) or indices.shape != data.shape or data.ndim != 1:
            raise UserError(f"{self._path}: the parts of its sparse matrix do not fit together; damaged?")
        rows = SparseRows(str(self._path), lengths, indptr.astype(np.int64), indices, data)
        return Derived(self._path, name, rows, byte_scale=1.0)

    def _shape(self, key: str) -> tuple[int, ...]:
        return self._header(key)[0].shape

    def _header(self, key: str) -> tuple[_Header, int]:
        """Return the header of a member, and where in the file the member begins if it is stored as it is."""
        info = self._members[key]
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(info) as member:
                header = _read_header(member, f"{self._path}: {key!r}")
        except _ZIP_FAULTS as error:
            raise UserError(f"{self._path}: {key!r} cannot be read: {error}; torn or damaged?") from None
        if header.end != info.file_size:
            raise UserError(
                f"{self._path}: {key!r} declares {header.kind} of shape {header.shape}, which end at byte {header.end},"
                f" but it has {info.file_size}: damaged"
            )
        return header, info.header_offset

    def _rows(self, key: str) -> Any:
        """Return the array: mapped where it is stored as it is, and else read."""
        header, begin = self._header(key)
        if self._members[key].compress_type != zipfile.ZIP_STORED or not header.shape:
            return self._loaded(key)
        with self._path.open("rb") as file:
            file.seek(begin)
            local = file.read(_LOCAL_HEADER)
        begin += _LOCAL_HEADER + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        placed = header._replace(offset=begin + header.offset)
        if len(local) < _LOCAL_HEADER or placed.end > self._path.stat().st_size:
            raise UserError(f"{self._path}: ends within {key!r}: torn or damaged")
        if 0 in header.shape:
            return np.zeros(header.shape, header.kind)
        return MappedRows(self._path, placed)

    def _loaded(self, key: str) -> np.ndarray:
        header, _ = self._header(key)
        nbytes = header.end - header.offset
        if nbytes > self._memory_bytes:
            raise UserError(
                f"{self._path}: {key!r} is compressed and takes {nbytes / 2**20:.0f} MiB, but data.memory_mib allows "
                f"{self._memory_bytes / 2**20:.0f}; raise it, or save it with numpy.save"
            )
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._members[key]) as member:
                member.read(header.offset)
                content = member.read(nbytes)
                member.read()  # to the end, where the checksum is compared
        except _ZIP_FAULTS as error:
            raise UserError(f"{self._path}: {key!r} cannot be read: {error}; torn or damaged?") from None
        if len(content) < nbytes:
            raise UserError(f"{self._path}: ends within {key!r}: torn or damaged")
        return np.frombuffer(content, header.kind).reshape(header.shape, order="F" if header.fortran_order else "C")


def _read_header(file: IO[bytes], called: str) -> _Header:
    """Read the header of an array; no pickle is ever read."""
    try:
        if file.read(4) == ZIP_MAGIC:
            raise UserError(f"{called}: is an NPZ archive; unpack it ('unzip') and give its NPY files")
        file.seek(0)
        version = np.lib.format.read_magic(file)
        of_version_1 = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if of_version_1 else np.lib.format.read_array_header_2_0
        shape, fortran_order, kind = read(file)
        offset = file.tell()
    except UserError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{called}: is not an NPY file: {str(error).splitlines()[0]}") from None
    if kind.hasobject or kind.kind not in "biufUS":
        raise UserError(f"{called}: holds {kind}; expected numbers, or text for labels")
    if any(length < 0 for length in shape):
        raise UserError(f"{called}: its header declares the shape {shape}: damaged")
    return _Header(kind, shape, fortran_order, offset)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (" ..." if len(names) > 8 else "") or "nothing"
