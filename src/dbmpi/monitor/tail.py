"""Following the records of a run while they grow: only what is new is read, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dbmpi.errors import UserError
from dbmpi.monitor.lines import LONGEST_LINE, Record, parse
from dbmpi.monitor.records import record_files

_CHUNK = 1 << 18
"""Bytes that are read at once."""
_FIRST, _LEAST = 16 << 20, 256 << 10
"""Bytes that are read of long files when they are seen first: of all together, and of each at least."""
_LONGER = "shard-0.jsonl"
"""The file with evaluations and checkpoints, of which more is read."""


@dataclass
class _Position:
    """How far a file has been read."""

    inode: int
    offset: int = 0
    begun: bytes = b""
    """The beginning of a line whose end is not there yet."""
    skipping: bool = False
    """Whether the rest of the line is left out: it is too long, or the file was entered in its middle."""


class RecordTail:
    """Reads the records of a run, and later what has been added to them.

    Of long files, only the end is read at first.  A file that was replaced or has become shorter is read anew.

    Parameters
    ----------
    directory
        The run directory; it need not be there yet.
    whole
        Whether to read long files from their beginnings, too.

    Attributes
    ----------
    skipped
        Lines that were no records, so far.
    """

    def __init__(self, directory: Path, *, whole: bool = False) -> None:
        self._directory, self._whole = directory, whole
        self._positions: dict[str, _Position] = {}
        self.skipped = 0

    def poll(self) -> Iterator[Record]:
        """Yield all records that have been added since the last poll, file by file.

        Raises
        ------
        UserError
            If a file cannot be read, or holds records of a newer version.
        """
        files = record_files(self._directory)
        for gone in self._positions.keys() - {path.name for path in files}:
            del self._positions[gone]
        share = max(_LEAST, _FIRST // max(1, len(files)))
        for path in files:
            try:
                yield from self._added(path, _FIRST if path.name == _LONGER else share)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    def _added(self, path: Path, most: int) -> Iterator[Record]:
        found, position = path.stat(), self._positions.get(path.name)
        if position is None or position.inode != found.st_ino or position.offset > found.st_size:
            start = 0 if self._whole else max(0, found.st_size - most)
            position = self._positions[path.name] = _Position(found.st_ino, start, skipping=start > 0)
        if position.offset == found.st_size:
            return
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_ino != position.inode:
                return  # replaced just now; the next poll begins with it
            file.seek(position.offset)
            while chunk := file.read(_CHUNK):
                position.offset += len(chunk)
                yield from self._records(position, chunk, path)

    def _records(self, position: _Position, chunk: bytes, path: Path) -> Iterator[Record]:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            whole, position.begun = position.begun + line, b""
            if position.skipping:
                position.skipping = False
                continue
            record = parse(whole, path)
            if record is not None:
                yield record
            elif whole.strip():
                self.skipped += 1
        if position.skipping:
            return
        position.begun += rest
        if len(position.begun) >= LONGEST_LINE:
            position.begun, position.skipping = b"", True
            self.skipped += 1
