"""Reading original files, plain or gzip, with errors that name the file and the position."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dbmpi.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
LARGEST_GZIP_RATIO = 1032
"""A deflate stream cannot expand to more than this many times its size."""
BLOCK_BYTES = 4 << 20
LONGEST_LINE = 64 << 20

Progress = Callable[[int, int], None]
"""Called with how much of the input has been read, and how much there is, in the same unit."""


def no_progress(done: int, total: int) -> None:
    """Report nothing of `done` and `total`."""


class InputFile:
    """The file at `path`, read once from its beginning; gzip is recognised by its first bytes, not by the name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise UserError(f"{path}: no such file")
        if not path.is_file():
            raise UserError(f"{path}: is not a file")
        try:
            self._raw = path.open("rb")
            self.file_bytes = path.stat().st_size
            self.compressed = self._raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            self._raw.seek(0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        self._stream: IO[bytes] = gzip.GzipFile(fileobj=self._raw) if self.compressed else self._raw  # type: ignore[assignment]
        self.offset = 0
        """Bytes read so far, uncompressed."""

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    @property
    def position(self) -> int:
        """How much of the file, as it lies on disk, has been read: for progress."""
        return self._raw.tell()

    @property
    def most_bytes(self) -> int:
        """More than this cannot be read from the file, uncompressed."""
        return self.file_bytes * (LARGEST_GZIP_RATIO if self.compressed else 1)

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""
        try:
            found = self._stream.read(size)
        except (OSError, EOFError, zlib.error) as error:
            what = "gzip data are torn or damaged" if self.compressed else "cannot be read"
            raise UserError(f"{self.path}: {what} after byte {self.offset} of their content: {error}") from None
        self.offset += len(found)
        return found

    def exactly(self, size: int, what: str) -> bytes:
        """Return the next `size` bytes; UserError, saying within `what`, if the file ends before."""
        found = self.read(size)
        if len(found) < size:
            raise UserError(
                f"{self.path}: ends at byte {self.offset}, within {what}; expected {size - len(found)} more bytes"
            )
        return found


@dataclass(frozen=True)
class Lines:
    """Some consecutive lines of a text file, without blank ones."""

    numbers: list[int]
    """Number of each line in the file, counted from 1."""
    texts: list[str]
    """Without line ends."""

    def where(self, row: int) -> str:
        """Return the position in the file of one of these lines, the first one being `row` 0, for messages."""
        return f"line {self.numbers[row]}"


def line_blocks(file: InputFile) -> Iterator[Lines]:
    """Yield the lines of a UTF-8 text file, a block at a time.

    Raises
    ------
    UserError
        If the file is not text, or a line is longer than LONGEST_LINE.
    """
    rest, number = b"", 1
    while True:
        block = file.read(BLOCK_BYTES)
        whole, newline, rest = (rest + block).rpartition(b"\n") if block else (rest, b"", b"")
        if block and not newline:
            if len(rest) > LONGEST_LINE:
                raise UserError(f"{file.path}: line {number} is longer than {LONGEST_LINE >> 20} MiB; expected text")
            continue
        lines = whole.split(b"\n")
        if number == 1:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        numbers, texts = [], []
        for line_number, line in enumerate(lines, number):
            if line.strip():
                numbers.append(line_number)
                texts.append(_decoded(file.path, line_number, line))
        number += len(lines)
        if texts:
            yield Lines(numbers, texts)
        if not block:
            return


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number} is not UTF-8 text (byte {error.start + 1} of the line)") from None
