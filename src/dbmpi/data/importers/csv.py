"""CSV files, plain or gzip: one sample a line, one or more of the columns the target, the others numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from dbmpi.data.importers.classes import Classes, whole
from dbmpi.data.importers.csv_table import CsvTable, Header, find_table
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
        table = find_table(
            file, first, targets=targets, drop=drop, classes=kind == "classes", header=header, delimiter=delimiter
        )
        if table.names is not None:
            first = Lines(first.numbers[1:], first.texts[1:])
        known, numbering = _classes(table, classes, like)
        shape = Shape((len(table.inputs),), known, len(targets) if kind == "values" else None)
        with DataWriter(out, shape, Origin("csv", file, file), force) as writer:
            if table.names is not None:
                answers = [table.names[column] for column in table.targets] if kind == "values" else []
                writer.name_columns([table.names[column] for column in table.inputs], answers)
            while first is not None:
                if first.texts:
                    _append(writer, table, numbering, first, scale)
                progress(text.position, text.file_bytes)
                first = next(blocks, None)
            if numbering is not None:
                numbering.conclude(writer)
    return writer.written


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


def _classes(table: CsvTable, asked: int | None, like: Path | None) -> tuple[int | None, Classes | None]:
    """Return the number of classes, if it is known, and their labels, unless those are numbers taken as they are."""
    if like is None:
        return (None, Classes(table.path, most=asked)) if table.text else (asked, None)
    with Source.open(like, LARGEST_SAMPLE_BYTES >> 20, "required") as source:
        if source.classes is None or source.input_shape != (len(table.inputs),):
            raise UserError(
                f"{like}: has samples of shape {source.input_shape} and {source.classes or 'no'} classes, but "
                f"{table.path} has {len(table.inputs)} columns of inputs; expected a file made from such a table"
            )
        labels = source.labels
        if table.text != isinstance((labels or (0,))[0], str):
            raise UserError(
                f"{like}: its labels are {some(labels or range(source.classes))}, but those of {table.path} are "
                f"{'text' if table.text else 'numbers'}; expected labels of one kind"
            )
        return source.classes, None if labels is None else Classes(table.path, (like, labels))


def _append(writer: DataWriter, table: CsvTable, numbering: Classes | None, lines: Lines, scale: float) -> None:
    inputs, answers, words = table.read(lines)
    inputs *= scale
    table.check_finite(lines, inputs, table.inputs)
    if words is None:
        table.check_finite(lines, answers, table.targets)
    if writer.shape.target_size is None:
        labels = whole(table.path, answers[:, 0], lines.where) if words is None else words
        answers = labels if numbering is None else numbering.codes(labels.tolist(), lines.where)
    writer.append(inputs, answers, lines.where)
