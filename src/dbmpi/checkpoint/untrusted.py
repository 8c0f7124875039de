"""HDF5 files from anywhere: opened, walked and read without trust.

Nothing here follows a link out of a file, allocates by what a file merely declares, or passes on what HDF5 raises over
damage in all its variety.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py

from dbmpi.errors import Damaged, UserError
from dbmpi.machine import capacity

HDF5_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError)
"""What h5py raises when HDF5 fails; which of them depends on where it failed."""
LARGEST_TEXT = 2**24
"""Bytes of texts in a dataset; a description of a run has a few thousand."""
MOST = 1 << 16
"""Elements of an attribute; a larger one is not read."""
CACHE_SLOTS = 100_003
"""Prime, and many times the number of chunks in the cache, as HDF5 recommends."""
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""With which most files of HDF5 begin; others have something else before it."""
_LOCKED = re.compile("unable to lock file|already open for (write|SWMR)", re.IGNORECASE)
"""What HDF5 says of a file that another program writes, or that says so of itself."""


class Malformed(Exception):
    """The file is no whole checkpoint; the message says why."""


class Foreign(Malformed):
    """The file is whole, as far as can be seen, but none that can be read here."""


def reason(error: Exception) -> str:
    """Return the message of an `error` of HDF5 in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


@contextlib.contextmanager
def damage(path: Path | str, what: str) -> Iterator[None]:
    """Turn whatever HDF5 raises over a damaged file into Damaged, which names the file `path` and `what` is damaged."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: {what} cannot be read: {capacity.explain(error)}") from error
    except HDF5_ERRORS as error:
        raise Damaged(f"{path}: {what} cannot be read (damaged file?): {reason(error)}") from error


def open_file(
    path: Path,
    kind: str,
    expected: str,
    *,
    locking: Literal["best-effort", False] = "best-effort",
    cache_bytes: int = 0,
    begin: bytes = b"",
) -> h5py.File:
    """Open an HDF5 file for reading.

    Parameters
    ----------
    path
        Of the file.
    kind
        What the file should be, for messages, e.g. ``"data file"``.
    expected
        The way out where it is not, e.g. ``"expected a file, or ..."``.
    locking
        Whether to lock the file where its file system can.
    cache_bytes
        Size of the chunk cache.  Without one only the rows asked for are read, which suits rows in random order; chunks
        that are compressed are unpacked whole and need it.
    begin
        The first bytes of the file, where they are known: of one that begins as HDF5 nothing more is asked.

    Raises
    ------
    UserError
        If there is no such file, or it may not be read, or another program writes it.
    Damaged
        If it is no HDF5 file, or torn.
    """
    known = begin.startswith(_SIGNATURE)
    try:
        if not known and not path.is_file():
            raise UserError(f"{path}: {'is not a file' if path.exists() else f'no such {kind}'}; {expected}")
        if not known:
            with path.open("rb"):
                pass
        if not known and not h5py.is_hdf5(path):
            raise Damaged(f"{path}: is not an HDF5 file, or a torn one; {expected}")
        return h5py.File(path, "r", locking=locking, rdcc_nbytes=cache_bytes, rdcc_nslots=CACHE_SLOTS)
    except FileNotFoundError:  # removed since
        raise UserError(f"{path}: no such {kind}; {expected}") from None
    except PermissionError:
        raise UserError(f"{path}: the {kind} may not be read by this user") from None
    except OSError as error:
        if _LOCKED.search(str(error)):
            raise UserError(
                f"{path}: is open for writing in another program; wait until that has closed it, or use a copy "
                f"(if no program has it open, one has died with it: 'h5clear -s {path}' makes it readable again)"
            ) from None
        raise Damaged(f"{path}: cannot be opened as HDF5 (incomplete or damaged?): {reason(error)}") from None


def link(group: Any, name: str) -> Any:
    """Return the kind of link that a member `name` of a group is; None where there is no group, or no such member."""
    return group.get(name, getlink=True) if isinstance(group, h5py.Group) else None


def lies_inside(group: Any, name: str) -> bool:
    """Return whether a group has a member `name` that is an object of the same file, and no link by name."""
    return isinstance(link(group, name), h5py.HardLink)


def attribute(node: Any, name: str) -> Any:
    """Return the attribute `name` of a `node` (file, group or dataset), or None where there is none.

    Raises
    ------
    ValueError
        If it has more than `MOST` elements.
    """
    if name not in node.attrs:
        return None
    shape = node.attrs.get_id(name).shape
    if shape is not None and math.prod(shape) > MOST:
        raise ValueError(f"attribute {name!r} has {math.prod(shape):,} elements; expected at most {MOST:,}")
    return node.attrs[name]


def elsewhere(dataset: h5py.Dataset) -> str:
    """Say how the values of a dataset lie in other files, which are not followed; empty where they do not."""
    return "is virtual" if dataset.is_virtual else "has external storage" if dataset.external else ""


def chunk_bytes(dataset: h5py.Dataset) -> int:
    """Return the size of a chunk of a dataset, unpacked; 0 where it has none."""
    return math.prod(dataset.chunks) * dataset.dtype.itemsize if dataset.chunks else 0


def unwritten(dataset: h5py.Dataset) -> str:
    """Say how much of the values that a dataset declares was ever written; empty where it is all of them."""
    if dataset.chunks is None:
        stored = dataset.id.get_storage_size()
        return f"declares {dataset.nbytes} bytes, but only {stored} were written" if stored < dataset.nbytes else ""
    expected = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    written = dataset.id.get_num_chunks()
    return f"has {expected} chunks, but only {written} were ever written" if written < expected else ""
