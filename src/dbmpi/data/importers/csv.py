"""CSV files, plain or gzip: one sample a line, one or more of the columns the target, the others numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dbmpi.data import labels as data_labels
from dbmpi.data.importers.csv_table import CsvTable, Header, find_table
from dbmpi.data.importers.reading import InputFile, Lines, Progress, line_blocks, no_progress
from dbmpi.data.labels import MOST_LABELS, Numbering
from dbmpi.data.source import Source
from dbmpi.data.writer import LARGEST_SAMPLE_BYTES, DataWriter, Origin, Shape, Written, check_writable
from dbmpi.errors import UserError


def import_csv(
    file: Path,
    out: Path,
    *,
    targets: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    kind: Literal["classes", "values"] = "classes",
    classes: int | None = None,
    like: Path | None = None,
    header: Header = "auto",
    delimiter: str = ",",
    scale: float = 1.0,
    force: bool = False,
    progress: Progress = no_progress,
) -> Written:
    """Write a data file from a table.

    Labels that are text, or numbers that do not begin at 0, are numbered in increasing order and recorded in the
    attribute `labels`.

    Parameters
    ----------
    file
        UTF-8 text, plain or gzip.
    out
        Data file to write; inputs are float32 ``(samples, columns)``.
    targets
        Columns of the targets, by name or by number counted from 0, or from the last column (-1) backwards; by default
        the last one.
    drop
        Columns to leave out, likewise.
    kind
        Whether the target is a class (whole numbers, or text) or values.
    classes
        Number of classes, whose labels are then numbers from 0, or text; by default what the file holds.
    like
        A data file whose labels and number of inputs are to be used: the training file, for a test file.
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
        If the table is ragged, lacks a value, inputs are not finite numbers, a column does not exist, or a label is not
        one of `like`.
    """
    targets = targets or ("-1",)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UserError(f"the delimiter {delimiter!r} is impossible; expected one character, e.g. ',' or ';'")
    if kind == "classes" and len(targets) != 1:
        raise UserError(f"{len(targets)} target columns were given, but a class is one column; for values say --values")
    if like is not None and (kind == "values" or classes is not None):
        raise UserError(f"--like {like} says which classes there are; leave out --classes and --values")
    check_writable(out, force, (file,))
    with InputFile(file) as text:
        blocks = _blocks(text)
        first = next(blocks, None)
        if first is None:
            raise UserError(f"{file}: is empty; expected lines of numbers")
        table = find_table(file, first, targets, drop, kind == "classes", header, delimiter)
        if table.names is not None:
            first = Lines(first.numbers[1:], first.texts[1:])
        labels = _Labels(table, classes, like)
        shape = Shape((len(table.inputs),), labels.classes, len(targets) if kind == "values" else None)
        with DataWriter(out, shape, Origin("csv", file, file), force) as writer:
            if table.names is not None:
                answers = [table.names[column] for column in table.targets] if kind == "values" else []
                writer.name_columns([table.names[column] for column in table.inputs], answers)
            while first is not None:
                if first.texts:
                    _append(writer, table, labels, first, scale)
                progress(text.position, text.file_bytes)
                first = next(blocks, None)
            labels.conclude(writer)
    assert writer.written is not None
    return writer.written


def _blocks(text: InputFile) -> Iterator[Lines]:
    """Yield the lines in blocks; the first one has two, if there are so many, from which the columns can be told."""
    blocks = line_blocks(text)
    first = next(blocks, None)
    if first is not None and len(first.texts) < 2:
        more = next(blocks, Lines([], []))
        first = Lines([*first.numbers, *more.numbers], [*first.texts, *more.texts])
    if first is not None:
        yield first
    yield from blocks


class _Labels:
    """Classes for the labels of a column, in the order in which they come, or as another file has them."""

    def __init__(self, table: CsvTable, classes: int | None, like: Path | None) -> None:
        self._table, self._asked, self._like = table, classes, like
        self._codes: dict[str, int] = {}
        self._given: Numbering | None = None
        self.classes = None if table.text else classes
        if like is None:
            return
        with Source.open(like, LARGEST_SAMPLE_BYTES >> 20, "required") as source:
            if source.classes is None or source.input_shape != (len(table.inputs),):
                raise UserError(
                    f"{like}: has samples of shape {source.input_shape} and {source.classes or 'no'} classes, but "
                    f"{table.path} has {len(table.inputs)} columns of inputs; expected a file made from such a table"
                )
            self.classes, labels = source.classes, source.labels
            if table.text != isinstance((labels or (0,))[0], str):
                raise UserError(
                    f"{like}: its labels are {data_labels.some(labels or range(source.classes))}, but those of "
                    f"{table.path} are {'text' if table.text else 'numbers'}; expected labels of one kind"
                )
            if labels is not None:
                self._given = Numbering(labels)

    def numbers(self, labels: np.ndarray, lines: Lines) -> np.ndarray:
        """Return classes for labels, whole numbers or text."""
        if self._given is not None:
            codes = self._given.codes(labels)
            if (codes < 0).any():
                row = int(np.flatnonzero(codes < 0)[0])
                raise UserError(
                    f"{self._table.path}: line {lines.numbers[row]}: the label {labels[row]} does not occur in "
                    f"{self._like}; expected {data_labels.some(self._given.labels)}"
                )
            return codes
        if not self._table.text:
            return labels
        codes = np.array([self._codes.setdefault(label, len(self._codes)) for label in labels.tolist()], np.int32)
        most = MOST_LABELS if self._asked is None else self._asked
        if len(self._codes) > most:
            row = int(np.flatnonzero(codes >= most)[0])
            raise UserError(
                f"{self._table.path}: line {lines.numbers[row]}: the label {labels[row]!r} is one more than {most} "
                f"classes; the others are {data_labels.some([*self._codes])}"
            )
        return codes

    def conclude(self, writer: DataWriter) -> None:
        """Bring text labels in order, and record which classes stand for what."""
        if self._given is not None:
            writer.number_labels(self._given.labels, np.arange(len(self._given.labels), dtype=np.int32))
        elif self._codes:
            ordered = sorted(self._codes)
            if self._asked is not None and len(ordered) < self._asked:
                raise UserError(
                    f"{self._table.path}: --classes {self._asked} was given, but there are {len(ordered)} labels: "
                    f"{data_labels.some(ordered)}; leave --classes out, or say --like TRAIN.h5 for a test file"
                )
            codes = np.empty(len(ordered), np.int32)
            for code, label in enumerate(ordered):
                codes[self._codes[label]] = code
            writer.number_labels(ordered, codes)


def _append(writer: DataWriter, table: CsvTable, labels: _Labels, lines: Lines, scale: float) -> None:
    inputs, answers, words = table.read(lines)
    inputs *= scale
    table.check_finite(lines, inputs, table.inputs)

    def where(row: int) -> str:
        return f"line {lines.numbers[row]}"

    if writer.shape.target_size is not None:
        table.check_finite(lines, answers, table.targets)
        writer.append(inputs, answers, where)
        return
    if words is None:
        found = answers[:, 0]
        table.check_finite(lines, answers, table.targets)
        wrong = np.flatnonzero(found != np.rint(found))
        if len(wrong):
            raise UserError(
                f"{table.path}: {where(int(wrong[0]))}: the target {found[wrong[0]]:g} is not a class; expected whole "
                f"numbers or text (for values say --values)"
            )
        words = np.clip(found, -(2.0**53), 2.0**53).astype(np.int64)
    writer.append(inputs, labels.numbers(words, lines), where)
