"""Imports in several data files: one that was interrupted goes on behind the files that are complete."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py

from dbmpi.checkpoint.untrusted import HDF5_ERRORS
from dbmpi.errors import UserError

_PLAN = "plan"
"""Attribute of a data file: a digest of what it was made of."""


@dataclass(frozen=True)
class PartFile:
    """What one data file is made of."""

    out: Path
    """The data file."""
    sources: Sequence[Path]
    """Files that hold its samples, in order."""
    plan: str
    """Digest of names, sizes and times of the sources, and of all that says how they are read; empty for one file."""

    @property
    def attributes(self) -> dict[str, str]:
        """Of the data file, by which a later import knows it."""
        return {_PLAN: self.plan} if self.plan else {}

    @property
    def is_there(self) -> bool:
        """Whether an earlier import has written the file, whole, from the same sources in the same way."""
        try:
            with h5py.File(self.out, "r") as file:
                return bool(self.plan) and bool(file.attrs.get(_PLAN, "") == self.plan)
        except HDF5_ERRORS:
            return False


def parts(out: Path, sources: Sequence[Path], per_file: int | None, way: object) -> Iterator[PartFile]:
    """Yield the data files of an import.

    Parameters
    ----------
    out
        Name of the data file; with `per_file`, it has a ``{}`` for the number of the file.
    sources
        Files that hold the samples.
    per_file
        Sources of each data file; None for one data file of all.
    way
        All that says how they are read; its ``repr`` counts.

    Raises
    ------
    UserError
        If the name has no place for a number.
    """
    if per_file is None:
        yield PartFile(out, sources, "")
        return
    if "{}" not in out.name:
        raise UserError(f"--out {out}: expected a name with {{}}, for the number of each file, e.g. train-{{}}.h5")
    for number, start in enumerate(range(0, len(sources), per_file)):
        some = sources[start : start + per_file]
        digest = hashlib.sha256(repr(way).encode())
        for source in some:
            status = source.stat()
            digest.update(f"{source.parent.name}/{source.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        yield PartFile(out.with_name(out.name.replace("{}", str(number))), some, digest.hexdigest())
