"""Files of shards that belong to no checkpoint: before they are written, or their checkpoint goes, a note says so.

A checkpoint of several files may have been renamed or moved away from the files of its shards; these look like what a
killed run has left, and are never deleted for that.  Only what a note is about is: an empty hidden file beside the
checkpoints, with the step and the identity of the files.  It is there from before the first of them is written until
they have become a checkpoint or are deleted, and again from before that checkpoint is deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np

from dbmpi.checkpoint import directory, schema
from dbmpi.checkpoint.untrusted import HDF5_ERRORS, LARGEST_TEXT, elsewhere, lies_inside, open_file


def note(path: Path, identity: str) -> None:
    """Note that files of shards of the checkpoint `path`, of an `identity`, may come to belong to nothing."""
    directory.note_path(path, identity).touch()


def discard(path: Path, identity: str) -> list[Path]:
    """Delete the files of shards of an `identity` that belong to no checkpoint, and the note; return the files.

    A file belongs to every HDF5 file of its directory that lists it, whatever that is called.  All stay, with the note,
    while a file that is named like the checkpoint cannot be read: it may list them.

    Parameters
    ----------
    path
        Of the checkpoint that the files were written for.
    identity
        That in their names.
    """
    files = [file for file in directory.shard_files(path) if directory.identity_of(file) == identity]
    for other in path.parent.iterdir() if files else ():
        if other.name.startswith(".") or directory.is_shard_file(other.name) or other.is_symlink():
            continue
        names = listed(other) if other.is_file() else ()
        if names is None and other.name.startswith(path.name):
            return []
        files = [file for file in files if file.name not in (names or ())]
    for file in files:
        file.unlink(missing_ok=True)
    directory.note_path(path, identity).unlink(missing_ok=True)
    return files


@contextmanager
def replacing(path: Path) -> Iterator[None]:
    """In this context, the checkpoint `path` is replaced or deleted; then the files of its shards go, too."""
    identities = {directory.identity_of(path.with_name(name)) for name in listed(path) or ()}
    for identity in identities:
        with suppress(OSError):  # on a full disk, what is deleted makes space
            note(path, identity)
    try:
        yield
    finally:
        for identity in identities:
            discard(path, identity)


def remove(path: Path) -> None:
    """Delete the checkpoint `path`, and then the files of its shards."""
    with replacing(path):
        path.unlink(missing_ok=True)


def clean(folder: Path) -> list[Path]:
    """Delete the files that killed runs have left in a directory of checkpoints; return those of shards.

    Called before a run starts to write, when no other one can.

    Parameters
    ----------
    folder
        The directory.
    """
    directory.clean(folder)
    return [file for path, identity in directory.notes(folder) for file in discard(path, identity)]


def listed(path: Path) -> tuple[str, ...] | None:
    """Return the names of the files of shards that the file `path` lists; None if it is no HDF5 file that can be read.

    Nothing else of the file is looked at, so that it may have any name and be damaged.
    """
    try:
        with open_file(path, "checkpoint", "expected a checkpoint", locking=False) as file:
            if not lies_inside(file, schema.SHARDS):
                return ()
            dataset = file[schema.SHARDS_FILES]
            plain = isinstance(dataset, h5py.Dataset) and dataset.chunks is None and not elsewhere(dataset)
            if not plain or dataset.dtype.kind != "S" or dataset.nbytes > LARGEST_TEXT:
                return None
            names = tuple(name.decode() for name in np.ravel(dataset[()]).tolist())
    except HDF5_ERRORS:  # UserError is one of them
        return None
    return names if all(map(directory.is_shard_file, names)) else None
