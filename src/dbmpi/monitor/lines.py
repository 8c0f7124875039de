"""Lines of a run's records: what tells a record from anything else."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dbmpi.errors import UserError
from dbmpi.monitor.reports import KINDS

Record = dict[str, Any]
"""One line as read back: the fields of its report, and ``format, kind, role, number, session, time, elapsed,
steps_before, steps_per_epoch``; the last two are None in records of early versions."""

FORMAT = 1
"""Of the lines; raised when a reader of an earlier version would misunderstand them.  Without one, it is 1."""
LONGEST_LINE = 1 << 20
"""Bytes; longer lines are skipped, so that a foreign file cannot fill the memory."""
_ENVELOPE: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("time", "elapsed"), ("float", dataclasses.MISSING)),
    **dict.fromkeys(("number", "session"), ("int", dataclasses.MISSING)),
    **dict.fromkeys(("steps_before", "steps_per_epoch"), ("int | None", None)),
    "format": ("int", FORMAT),
}
"""Types and defaults of the numbers in every line."""


def split(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a `file`, an overlong one as its beginning only."""
    while line := file.readline(LONGEST_LINE):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(LONGEST_LINE)):
            pass
        yield line


def parse(line: bytes, path: Path) -> Record | None:
    """Return the record that a line holds, or None.

    Parameters
    ----------
    line
        With or without its end.
    path
        The file that it is from, for the message.

    Raises
    ------
    UserError
        If a newer version has written the line.
    """
    record = _load(line)
    if record is None:
        return None
    number = record.get("format", FORMAT)
    if _is_number(number, int) and number > FORMAT:
        raise UserError(
            f"{path}: was written by a newer dbmpi, as records of format {number}; this one reads format {FORMAT}: "
            "use the dbmpi that the run was started with"
        )
    fields = _fields(str(record.get("kind")))
    if not fields or not isinstance(record.get("role"), str):
        return None
    if None in (record.get("time"), record.get("elapsed")):
        return None
    for name, (annotation, default) in (fields | _ENVELOPE).items():
        if default is not dataclasses.MISSING:
            record.setdefault(name, default)
        if name not in record or not _fits(record[name], annotation):
            return None
    return record


def session_of(line: bytes) -> int:
    """Return the session of the record that a `line` holds, of whichever version; 0 where it holds none."""
    try:
        record = parse(line, Path())
    except UserError:
        record = _load(line) or {}
    session = 0 if record is None else record.get("session")
    return session if isinstance(session, int) and _is_number(session, int) else 0


def _load(line: bytes) -> Record | None:
    """Return the JSON object that a line holds, or None."""
    try:
        record = json.loads(line, parse_constant=lambda name: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _fields(kind: str) -> dict[str, tuple[str, Any]]:
    """Return types and defaults of the fields of a kind of report; nothing for an unknown one."""
    report = KINDS.get(kind)
    return {} if report is None else {one.name: (str(one.type), one.default) for one in dataclasses.fields(report)}


def _finite(text: str) -> float | None:
    """Read a float; one beyond the range, such as 1e999, counts as missing."""
    value = float(text)
    return value if math.isfinite(value) else None


def _is_number(value: Any, kind: type[int | float] = float) -> bool:
    """Return whether a value from JSON is a number, or an integer that fits 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        return False
    return isinstance(value, float) or -(2**63) <= value < 2**63


def _fits(value: Any, annotation: str) -> bool:
    """Return whether a value from JSON has the type of a field; floats may be null, where they were not finite."""
    if value is None:
        return annotation == "float" or annotation.endswith("None")
    if annotation == "str":
        return isinstance(value, str)
    if annotation.startswith("Mapping"):
        return isinstance(value, dict) and all(entry is None or _is_number(entry) for entry in value.values())
    if annotation.startswith("Sequence"):
        return isinstance(value, list) and all(_is_number(entry, int) for entry in value)
    return _is_number(value, int if annotation.startswith("int") else float)
