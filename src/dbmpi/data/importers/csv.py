"""CSV files, plain or gzip: one sample a line, one or more of the columns the target, the others numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dbmpi.data.importers.classes import Classes, whole
from dbmpi.data.importers.csv_table import CsvTable, Header, column_of, find_table, is_number
from dbmpi.data.importers.features import GAP_WORDS, Features, Gaps, filled
from dbmpi.data.importers.features import like as features_like
from dbmpi.data.importers.reading import InputFile, Lines, Progress, line_blocks, no_progress
from dbmpi.data.labels import some
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
    one_hot: Sequence[str] = (),
    gaps: Gaps = "refuse",
    group: str | None = None,
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
        A data file whose labels and number of inputs are used: the training file, for a test file.
    header
        Whether the first line holds the names of the columns; ``auto`` takes it for names if none of it is a number.
    delimiter
        The character between columns.
    one_hot
        Columns of categories, likewise, each of which becomes an input that is 0 or 1; ``*`` stands for all that
        hold text in the first lines of the file.
    gaps
        What to do where an input is missing: ``refuse`` the file, ``drop`` the line, take the ``mean`` of the column,
        or a number.  With `like`, what was taken for the training file.
    group
        Column that says whose each sample is, likewise; it is recorded and no input.
    scale
        Factor on every input, e.g. 1/255 for pixels.
    force
        Replace an existing file.
    progress
        Called with the number of bytes of the file that have been read, and of all.

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
        left_out = [*drop, *([] if group is None else [group])]
        table = find_table(
            file, first, targets=targets, drop=left_out, classes=kind == "classes", header=header, delimiter=delimiter
        )
        if table.names is not None:
            first = Lines(first.numbers[1:], first.texts[1:])
        owner = None if group is None else column_of(file, group, table.names, table.width)
        features = _features(table, first, one_hot, gaps)
        simple = owner is None and gaps == "refuse" and not any(features.one_hot) and not (like and filled(like))
        work = _Work(table, features, owner, simple)
        passes = 1
        if like is not None and not simple:
            features = work.features = features_like(like, features)
        elif features.needs_measuring:
            passes = 2
            _measure(work, progress)
        features.conclude()
        width = len(table.inputs) if simple else len(features.input_names)
        known, numbering = _classes(table, classes, like, width)
        shape = Shape((width,), known, len(targets) if kind == "values" else None)
        with DataWriter(out, shape, Origin("csv", file, file), force) as writer:
            answers = [table.names[column] for column in table.targets] if table.names and kind == "values" else []
            if not simple:
                features.record(writer, answers)
            elif table.names is not None:
                writer.name_columns([table.names[column] for column in table.inputs], answers)
            while first is not None:
                if first.texts:
                    work.append(writer, numbering, first, scale)
                progress((passes - 1) * text.file_bytes + text.position, passes * text.file_bytes)
                first = next(blocks, None)
            if numbering is not None:
                numbering.conclude(writer)
    return writer.written


def _features(table: CsvTable, first: Lines, one_hot: Sequence[str], gaps: Gaps) -> Features:
    """Return what becomes of the columns of the inputs."""
    asked = {column_of(table.path, name, table.names, table.width) for name in one_hot if name != "*"}
    wrong = asked - set(table.inputs)
    if wrong:
        raise UserError(f"{table.path}: --one-hot column {min(wrong)} is no input; expected one that is not left out")
    if "*" in one_hot and first.texts:
        fields = table.texts(first)
        asked |= {column for column in table.inputs if not all(map(_may_be_number, fields[:, column]))}
    names = [table.names[column] if table.names else str(column) for column in table.inputs]
    return Features(table.path, names, [column in asked for column in table.inputs], gaps)


def _may_be_number(field: str) -> bool:
    return is_number(field) or field.lower() in GAP_WORDS


def _measure(work: _Work, progress: Progress) -> None:
    """Read all of the table once for categories and means."""
    with InputFile(work.table.path) as text:
        begun = work.table.names is None
        for lines in line_blocks(text):
            rows = lines if begun else Lines(lines.numbers[1:], lines.texts[1:])
            begun = True
            if rows.texts:
                work.features.measure(work.columns(rows)[0])
            progress(text.position, 2 * text.file_bytes)


def _blocks(text: InputFile) -> Iterator[Lines]:
    """Yield the lines in blocks; the first one has two, if there are so many, which show what the columns hold."""
    blocks = line_blocks(text)
    first = next(blocks, None)
    if first is not None and len(first.texts) < 2:
        more = next(blocks, Lines([], []))
        first = Lines([*first.numbers, *more.numbers], [*first.texts, *more.texts])
    if first is not None:
        yield first
    yield from blocks


def _classes(table: CsvTable, asked: int | None, like: Path | None, width: int) -> tuple[int | None, Classes | None]:
    """Return the number of classes, if it is known, and their labels, unless those are numbers taken as they are."""
    if like is None:
        return (None, Classes(table.path, most=asked)) if table.text else (asked, None)
    with Source.open(like, LARGEST_SAMPLE_BYTES >> 20, "required") as source:
        if source.classes is None or source.input_shape != (width,):
            raise UserError(
                f"{like}: has samples of shape {source.input_shape} and {source.classes or 'no'} classes, but "
                f"{table.path} has {width} columns of inputs; expected a file made from such a table"
            )
        labels = source.labels
        if table.text != isinstance((labels or (0,))[0], str):
            raise UserError(
                f"{like}: its labels are {some(labels or range(source.classes))}, but those of {table.path} are "
                f"{'text' if table.text else 'numbers'}; expected labels of one kind"
            )
        return source.classes, None if labels is None else Classes(table.path, (like, labels))


@dataclass
class _Work:
    """From lines to samples."""

    table: CsvTable
    features: Features
    owner: int | None
    """Column that says whose a sample is."""
    simple: bool
    """Whether all inputs are numbers that are there: these are read quickly."""

    def columns(self, lines: Lines) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the columns of the inputs, and all fields."""
        texts = self.table.texts(lines)
        pairs = zip(self.table.inputs, self.features.one_hot, strict=True)
        return [texts[:, c] if text else self.table.numbers(lines, c, texts[:, c]) for c, text in pairs], texts

    def append(self, writer: DataWriter, numbering: Classes | None, lines: Lines, scale: float) -> None:
        table, groups = self.table, None
        if self.simple:
            inputs, answers, words = table.read(lines)
        else:
            columns, texts = self.columns(lines)
            inputs, kept = self.features.encoded(columns, lines.where)
            rows = np.flatnonzero(kept)
            lines = Lines([lines.numbers[row] for row in rows], [lines.texts[row] for row in rows])
            inputs, texts = inputs[rows], texts[rows]
            if not len(rows):
                return
            words = texts[:, table.targets[0]] if table.text else None
            answers = np.empty((len(rows), 0))
            if words is None:
                answers = np.stack([table.numbers(lines, column, texts[:, column]) for column in table.targets], axis=1)
            elif "" in words:
                row = int(np.flatnonzero(words == "")[0])
                raise UserError(f"{table.path}: {lines.where(row)}: the label is missing; leave the line out")
            groups = None if self.owner is None else texts[:, self.owner].tolist()
        inputs *= scale
        if self.simple:
            table.check_finite(lines, inputs, table.inputs)
        if words is None:
            table.check_finite(lines, answers, table.targets)
        if writer.shape.target_size is None:
            labels = whole(table.path, answers[:, 0], lines.where) if words is None else words
            answers = labels if numbering is None else numbering.codes(labels.tolist(), lines.where)
        writer.append(inputs, answers, lines.where, groups)
