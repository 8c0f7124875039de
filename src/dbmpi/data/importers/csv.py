"""CSV files of numbers, plain or gzip: one sample a line, one or more of the columns the target."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from dbmpi.data.importers.reading import InputFile, Lines, Progress, line_blocks, no_progress
from dbmpi.data.writer import Origin, Shape, Writer, Written, check_writable
from dbmpi.errors import UserError

Header = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class Table:
    """The columns of a CSV file."""

    path: Path
    delimiter: str
    width: int
    names: tuple[str, ...] | None
    """Names of the columns if the file has a header."""
    targets: tuple[int, ...]
    """Columns of the targets."""

    @property
    def inputs(self) -> list[int]:
        """Columns of the inputs: all the others."""
        return [column for column in range(self.width) if column not in self.targets]


def import_csv(
    file: Path,
    out: Path,
    *,
    targets: Sequence[str] = ("-1",),
    kind: Literal["classes", "values"] = "classes",
    classes: int | None = None,
    header: Header = "auto",
    delimiter: str = ",",
    scale: float = 1.0,
    force: bool = False,
    progress: Progress = no_progress,
) -> Written:
    """Write a data file from a table of numbers.

    Parameters
    ----------
    file
        UTF-8 text, plain or gzip.
    out
        Data file to write; inputs are float32 ``(samples, columns)``.
    targets
        Columns of the targets, by name or by number counted from 0, or from the last column (-1) backwards.
    kind
        Whether the target is a class (whole numbers from 0) or values.
    classes
        Number of classes; by default the largest label plus one.
    header
        Whether the first line holds the names of the columns; ``auto`` takes it for names if none of it is a number.
    delimiter
        The character between columns.
    scale
        Factor on every input, e.g. 1/255 for pixels.
    force
        Replace an existing file.
    progress
        Told how many bytes of the file have been read.

    Raises
    ------
    UserError
        If the table is ragged, holds anything but finite numbers, or a target is no column of it.
    """
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UserError(f"the delimiter {delimiter!r} is impossible; expected one character, e.g. ',' or ';'")
    if kind == "classes" and len(targets) != 1:
        raise UserError(f"{len(targets)} target columns were given, but a class is one column; for values say --values")
    check_writable(out, force, (file,))
    with InputFile(file) as text:
        blocks = line_blocks(text)
        first = next(blocks, None)
        if first is None:
            raise UserError(f"{file}: is empty; expected lines of numbers")
        table = _table(file, first, targets, header, delimiter)
        if table.names is not None:
            first = Lines(first.numbers[1:], first.texts[1:])
        shape = Shape((len(table.inputs),), classes, len(targets) if kind == "values" else None)
        with Writer(out, shape, Origin("csv", file, file), force) as writer:
            if table.names is not None:
                answers = [table.names[column] for column in table.targets] if kind == "values" else []
                writer.name_columns([table.names[column] for column in table.inputs], answers)
            for lines in chain([first], blocks):
                if lines.texts:
                    _append(writer, table, lines, scale)
                progress(text.position, text.file_bytes)
    assert writer.written is not None
    return writer.written


def _append(writer: Writer, table: Table, lines: Lines, scale: float) -> None:
    rows = _numbers(table, lines)
    targets = rows[:, table.targets]

    def where(row: int) -> str:
        return f"line {lines.numbers[row]}"

    if writer.shape.target_size is None:
        labels = targets[:, 0]
        wrong = np.flatnonzero(labels != np.rint(labels))
        if len(wrong):
            raise UserError(
                f"{table.path}: {where(int(wrong[0]))}: the target {labels[wrong[0]]:g} is not a class; expected whole "
                f"numbers from 0 (for values say --values)"
            )
        targets = np.clip(labels, -1, 2**53).astype(np.int64)
    writer.append(rows[:, table.inputs] * scale, targets, where)


def _numbers(table: Table, lines: Lines) -> np.ndarray:
    """Return a block of lines as float64 ``(lines, columns)``."""
    try:
        rows = np.loadtxt(lines.texts, np.float64, comments=None, delimiter=table.delimiter, ndmin=2, quotechar='"')
    except ValueError as error:
        raise UserError(_fault(table, lines) or f"{table.path}: line {lines.numbers[0]} ff.: {error}") from None
    if rows.shape != (len(lines.texts), table.width):
        raise UserError(_fault(table, lines) or f"{table.path}: line {lines.numbers[0]} ff.: a quotation is not closed")
    return rows


def _fault(table: Table, lines: Lines) -> str | None:
    """Describe the first fault of lines that could not be read as numbers, slowly."""
    for number, text in zip(lines.numbers, lines.texts, strict=True):
        fields = _fields(table.path, number, text, table.delimiter)
        if len(fields) != table.width:
            return f"{table.path}: line {number} has {len(fields)} columns; expected {table.width} as in the first line"
        for column, field in enumerate(fields):
            if not _is_number(field):
                name = f" ({table.names[column]})" if table.names else ""
                given = f"{field[:40]!r} is not a number" if field.strip() else "is empty"
                return f"{table.path}: line {number}, column {column}{name}: {given}; expected a number"
    return None


def _table(path: Path, first: Lines, targets: Sequence[str], header: Header, delimiter: str) -> Table:
    """Find out what the columns are, from the first line."""
    fields = _fields(path, first.numbers[0], first.texts[0], delimiter)
    numeric = [_is_number(field) for field in fields]
    if header == "auto" and any(numeric) and not all(numeric):
        raise UserError(
            f"{path}: line {first.numbers[0]} holds numbers and text ({fields[numeric.index(False)][:40]!r}): say "
            f"--header yes if it names the columns, --header no if it is a sample"
        )
    named = header == "yes" or (header == "auto" and not any(numeric))
    names = tuple(name.strip() for name in fields) if named else None
    columns = tuple(_column(path, target, names, len(fields)) for target in targets)
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: a target column was given twice: {', '.join(targets)}")
    if len(columns) == len(fields):
        hint = "" if len(fields) > 1 else f"; is {delimiter!r} the delimiter?"
        raise UserError(f"{path}: has {len(fields)} columns and all are targets; expected some inputs{hint}")
    return Table(path, delimiter, len(fields), names, columns)


def _column(path: Path, target: str, names: tuple[str, ...] | None, width: int) -> int:
    if names is not None and names.count(target) > 1:
        raise UserError(f"{path}: {names.count(target)} columns are called {target!r}; give the number of the column")
    if names is not None and target in names:
        return names.index(target)
    try:
        number = int(target)
    except ValueError:
        known = (
            f"its columns are {', '.join(names[:12])}{' ...' if width > 12 else ''}" if names else "it has no header"
        )
        raise UserError(f"{path}: has no column {target!r}; {known}") from None
    if not -width <= number < width:
        raise UserError(f"{path}: has no column {number}; expected 0 to {width - 1}, or -1 for the last")
    return number % width


def _fields(path: Path, number: int, text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([text], delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{path}: line {number}: {error}") from None


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
