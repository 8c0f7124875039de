"""The columns of a CSV file: which are inputs, targets or left out, and what their fields hold."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dbmpi.data.importers.features import GAP_WORDS
from dbmpi.data.importers.reading import Lines
from dbmpi.errors import UserError

Header = Literal["auto", "yes", "no"]
_MISSING = frozenset(GAP_WORDS)


@dataclass(frozen=True)
class CsvTable:
    """The columns of a CSV file, numbered from 0."""

    path: Path
    delimiter: str
    width: int
    names: tuple[str, ...] | None
    """Names of the columns if the file has a header."""
    targets: tuple[int, ...]
    """Columns of the targets."""
    dropped: tuple[int, ...]
    """Columns that are left out."""
    text: bool
    """Whether the target is text."""

    @property
    def inputs(self) -> list[int]:
        """Columns of the inputs: all the others."""
        return [column for column in range(self.width) if column not in (*self.targets, *self.dropped)]

    def read(self, lines: Lines) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return inputs and targets of a block of lines, float64 ``(lines, columns)``, or labels that are text.

        Raises
        ------
        UserError
            Naming the line and the column, both counted from 1, of a field that is missing or no number.
        """
        kind = object if self.text or self.dropped else np.float64
        try:
            rows = np.loadtxt(lines.texts, kind, comments=None, delimiter=self.delimiter, ndmin=2, quotechar='"')
            if rows.shape != (len(lines.texts), self.width):
                raise ValueError("a quotation is not closed")
            inputs = rows[:, self.inputs].astype(np.float64, copy=False)
            targets = rows[:, [] if self.text else self.targets].astype(np.float64, copy=False)
        except ValueError as error:
            raise UserError(self._fault(lines) or f"{self.path}: line {lines.numbers[0]} ff.: {error}") from None
        if not self.text:
            return inputs, targets, None
        words = rows[:, self.targets[0]]
        words[:] = [word.strip() for word in words]
        missing = np.flatnonzero(words == "")
        if len(missing):
            position = self._position(lines.numbers[missing[0]], self.targets[0])
            raise UserError(f"{position}: the label is missing; leave the line out")
        return inputs, targets, words

    def texts(self, lines: Lines) -> np.ndarray:
        """Return the fields of a block of `lines` as texts without blanks around them, object ``(lines, columns)``.

        Raises
        ------
        UserError
            Naming the line whose number of columns is another one.
        """
        rows = []
        for number, text in zip(lines.numbers, lines.texts, strict=True):
            fields = self._fields(number, text)
            if len(fields) != self.width:
                raise UserError(
                    f"{self.path}: line {number} has {len(fields)} columns; expected {self.width} as in the first line"
                )
            rows.append([field.strip() for field in fields])
        found = np.empty((len(rows), self.width), object)
        found[:] = rows
        return found

    def numbers(self, lines: Lines, column: int, texts: np.ndarray) -> np.ndarray:
        """Return the `texts` of a `column` of some `lines` as float64, NaN where they say that there is no number."""
        try:
            found: np.ndarray = texts.astype(np.float64)
        except ValueError:
            found = np.full(len(texts), np.nan)
            for row, text in enumerate(texts):
                if text.lower() in _MISSING:
                    continue
                if not is_number(text):
                    raise UserError(self._complaint(lines.numbers[row], column, text)) from None
                found[row] = float(text)
        if np.isinf(found).any():
            row = int(np.flatnonzero(np.isinf(found))[0])
            raise UserError(self._complaint(lines.numbers[row], column, texts[row]))
        return found

    def check_finite(self, lines: Lines, values: np.ndarray, columns: Sequence[int]) -> None:
        """Raise UserError where `values` (lines, columns) are missing (NaN), infinite or too large for float32.

        The message names the first one, by its line of `lines` and its column of `columns`.
        """
        with np.errstate(over="ignore"):
            wrong = np.argwhere(~np.isfinite(values.astype(np.float32)))
        if len(wrong):
            row, column = wrong[0].tolist()
            text = self._fields(lines.numbers[row], lines.texts[row])[columns[column]]
            raise UserError(self._complaint(lines.numbers[row], columns[column], text))

    def _fault(self, lines: Lines) -> str | None:
        """Describe the first fault of lines that could not be read as numbers, slowly."""
        for number, text in zip(lines.numbers, lines.texts, strict=True):
            fields = self._fields(number, text)
            if len(fields) != self.width:
                return (
                    f"{self.path}: line {number} has {len(fields)} columns; expected {self.width} as in the first line"
                )
            for column, field in enumerate(fields):
                skipped = column in self.dropped or (self.text and column in self.targets)
                if not skipped and not is_number(field):
                    return self._complaint(number, column, field)
        return None

    def _complaint(self, line: int, column: int, field: str) -> str:
        position, shown = self._position(line, column), field.strip()[:40]
        name = self.names[column] if self.names else str(column)
        if shown.lower() in _MISSING:
            way_on = (
                "leave the line out"
                if column in self.targets
                else f"leave the line or the column (--drop {name}) out, or say --gaps mean, drop or a number"
            )
            return f"{position}: a value is missing{f' ({shown!r})' if shown else ''}; fill it in, or {way_on}"
        if is_number(field):
            return f"{position}: {shown} is infinite or too large for float32; expected finite numbers"
        hint = f", or --drop {name} to leave the column out, or --one-hot {name} if these are categories"
        hint = "" if column in self.targets else hint
        return f"{position}: {shown!r} is not a number; expected a number{hint}"

    def _position(self, line: int, column: int) -> str:
        name = f" ({self.names[column]})" if self.names else ""
        return f"{self.path}: line {line}, column {column + 1}{name}"

    def _fields(self, number: int, text: str) -> list[str]:
        return fields_of(self.path, number, text, self.delimiter)


def find_table(
    path: Path,
    first: Lines,
    *,
    targets: Sequence[str],
    drop: Sequence[str],
    classes: bool,
    header: Header,
    delimiter: str,
) -> CsvTable:
    """Return what the columns are, from the first two lines.

    Parameters
    ----------
    path
        Of the file, for messages.
    first
        Its first lines.
    targets, drop
        Columns, by name or number, of the targets and to leave out.
    classes
        Whether the target is a class.
    header
        Whether the first line names the columns.
    delimiter
        The character between columns.

    Raises
    ------
    UserError
        If a column does not exist, is given twice, or none is left for the inputs.
    """
    rows = [fields_of(path, *line, delimiter) for line in zip(first.numbers[:2], first.texts[:2], strict=True)]
    named = _has_header(path, first.numbers[0], rows, [*targets, *drop], header)
    names = tuple(name.strip() for name in rows[0]) if named else None
    width = len(rows[0])
    columns = tuple(column_of(path, target, names, width) for target in targets)
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: a target column was given twice: {', '.join(targets)}")
    dropped = tuple(column_of(path, one, names, width) for one in drop)
    both = set(columns) & set(dropped)
    if both:
        raise UserError(f"{path}: column {min(both)} is a target and to be dropped; give another --target")
    if len({*columns, *dropped}) == width:
        hint = "" if width > 1 else f"; is {delimiter!r} the delimiter?"
        raise UserError(f"{path}: has {width} columns and all are targets or dropped; expected some inputs{hint}")
    samples = rows[1:] if named else rows
    answer = samples[0][columns[0]] if samples and len(samples[0]) == width else "0"
    text = classes and not is_number(answer)
    return CsvTable(path, delimiter, width, names, columns, dropped, text)


def is_number(field: str) -> bool:
    """Return whether a field holds a number; NaN and infinity are some, too."""
    try:
        float(field)
    except ValueError:
        return False
    return True


def fields_of(path: Path, number: int, text: str, delimiter: str) -> list[str]:
    """Return the fields of a line, or raise UserError.

    Parameters
    ----------
    path, number
        The file and the line's number, for messages.
    text
        The line.
    delimiter
        The character between columns.
    """
    try:
        return next(csv.reader([text], delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{path}: line {number}: {error}") from None


def _has_header(path: Path, number: int, rows: list[list[str]], columns: list[str], header: Header) -> bool:
    """Return whether the first line names the columns.

    It does if none of it is a number.  If some of it is, it may still be a sample whose label is text, or which has a
    column of text to be dropped: if the second line has numbers and text in the same columns, and the numbers of the
    first are not just counted.
    """
    if header != "auto":
        return header == "yes"
    numeric = [is_number(field) for field in rows[0]]
    if all(numeric) or not any(numeric):
        return not any(numeric)
    names = [field.strip() for field in rows[0]]
    if any(column in names for column in columns if not is_number(column)):
        return True
    counted = [float(field) for field in rows[0] if is_number(field)]
    like_the_second = len(rows) == 2 and numeric == [is_number(field) for field in rows[1]]
    if like_the_second and counted not in (list(range(len(counted))), list(range(1, len(counted) + 1))):
        return False
    raise UserError(
        f"{path}: line {number} holds numbers and text ({rows[0][numeric.index(False)][:40]!r}): say --header yes if "
        f"it names the columns, --header no if it is a sample"
    )


def column_of(path: Path, target: str, names: tuple[str, ...] | None, width: int) -> int:
    """Return the number of a column.

    Parameters
    ----------
    path
        Of the file, for messages.
    target
        The column's name, or its number.
    names, width
        The names of the columns, if they have some, and how many there are.

    Raises
    ------
    UserError
        If there is none, or several of that name.
    """
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
