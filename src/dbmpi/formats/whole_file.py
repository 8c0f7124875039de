"""A file that appears under its name when it is whole and on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dbmpi.errors import DiskFailed, UserError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing under another name, and give it the name `path` if the block ends without an exception.

    Raises
    ------
    UserError
        If no file can be created there.
    DiskFailed
        If it cannot be written; nothing is left behind then, and a file of that name is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        file = temporary.open("wb")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DiskFailed(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
