"""Parquet and Arrow (Feather) files, read by pyarrow in batches of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dbmpi.data.importers.classes import Classes, whole
from dbmpi.data.importers.features import Features, Gaps
from dbmpi.data.importers.features import like as features_like
from dbmpi.data.importers.reading import Progress, no_progress
from dbmpi.data.source import Source
from dbmpi.data.writer import LARGEST_SAMPLE_BYTES, DataWriter, Origin, Shape, Written, check_writable
from dbmpi.errors import UserError

_ROWS = 16_384


def import_parquet(
    file: Path,
    out: Path,
    *,
    targets: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    kind: Literal["classes", "values"] = "classes",
    like: Path | None = None,
    gaps: Gaps = "refuse",
    group: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Written:
    """Write a data file from the columns of a table.

    Columns of numbers and truth values are inputs as they are, lists of one length are as many inputs, and texts become
    one-hot.  Labels are numbered in increasing order and recorded in the attribute `labels`.

    Parameters
    ----------
    file
        Parquet, or Arrow's file format, which is also that of Feather 2.
    out
        Data file to write; inputs are float32.
    targets
        Columns of the targets; by default the last one.
    drop
        Columns to leave out.
    kind
        Whether the target is a class or values.
    like
        The training file, for a test file: its categories, labels and numbers for gaps are used.
    gaps
        What to do where a number is missing.
    group
        Column that says whose each sample is; it is recorded and no input.
    force
        Replace an existing file.
    progress
        Called with the number of rows that have been read, and of all, in all passes.

    Raises
    ------
    UserError
        If the file cannot be read, lacks a column, or a column holds something else; or pyarrow is not installed.
    """
    check_writable(out, force, (file,))
    with contextlib.ExitStack() as stack:
        table = _Table(file, stack)
        answers = [*targets] if targets else table.names[-1:]
        _check(table, [*answers, *drop, *([group] if group else [])])
        if kind == "classes" and len(answers) != 1:
            raise UserError(f"{file}: {len(answers)} targets were given, but a class is one column; or say --values")
        chosen = [name for name in table.names if name not in (*answers, *drop, group)]
        if not chosen:
            raise UserError(f"{file}: all of its columns are targets or left out; expected some inputs")
        texts = [table.is_text(name) for name in chosen]
        work = _Work(table, chosen, Features(file, _expanded(table, chosen), _spread(table, chosen, texts), gaps))
        passes = 1
        if like is not None:
            work.features = features_like(like, work.features)
        elif work.features.needs_measuring:
            passes = 2
            for batch, position in table.batches([*chosen], progress, 0, passes):
                work.features.measure(work.columns(batch, position))
        work.features.conclude()
        numbering = _classes(file, like) if kind == "classes" else None
        size = None if kind == "classes" else len(answers)
        shape = Shape((len(work.features.input_names),), None, size)
        with DataWriter(out, shape, Origin("parquet", file, file), force) as writer:
            work.features.record(writer, answers if kind == "values" else [])
            wanted = [*chosen, *answers, *([group] if group else [])]
            for batch, position in table.batches(wanted, progress, passes - 1, passes):
                work.append(writer, batch, position, answers, group, numbering)
            if numbering is not None:
                numbering.conclude(writer)
    return writer.written


class _Table:
    """An open file of Parquet or Arrow."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        try:
            import pyarrow
            import pyarrow.ipc
            import pyarrow.parquet
        except ImportError:
            raise UserError(
                "Parquet and Arrow are read by pyarrow, which is not installed: pip install 'dbmpi[parquet]'"
            ) from None
        if not path.is_file():
            raise UserError(
                f"{path}: {'is not a file' if path.exists() else 'no such file'}; expected Parquet or Arrow"
            )
        self.path, self._arrow = path, pyarrow
        with path.open("rb") as raw:
            begin = raw.read(6)
        self._parquet = self._stream = None
        try:
            if begin.startswith(b"PAR1"):
                self._parquet = stack.enter_context(pyarrow.parquet.ParquetFile(path))
                self.schema, self.rows = self._parquet.schema_arrow, self._parquet.metadata.num_rows
            elif begin == b"ARROW1":
                mapped = stack.enter_context(pyarrow.memory_map(str(path)))
                self._stream = stack.enter_context(pyarrow.ipc.open_file(mapped))
                self.schema = self._stream.schema
                self.rows = self._stream.num_record_batches
            else:
                raise UserError(f"{path}: is neither Parquet nor Arrow's file format; expected one of these")
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(error) from None
        self.names: list[str] = list(self.schema.names)
        if len(set(self.names)) < len(self.names):
            raise UserError(f"{path}: has two columns of one name; expected names that differ")

    def type(self, name: str) -> Any:
        """Return the type of a column, without its dictionary."""
        found = self.schema.field(name).type
        return found.value_type if self._arrow.types.is_dictionary(found) else found

    def is_text(self, name: str) -> bool:
        types = self._arrow.types
        return bool(types.is_string(self.type(name)) or types.is_large_string(self.type(name)))

    def width(self, name: str) -> int:
        """Return how many inputs a column is: 1, or for lists of a fixed length that."""
        types, kind = self._arrow.types, self.type(name)
        return int(kind.list_size) if types.is_fixed_size_list(kind) else 1

    def batches(self, names: list[str], progress: Progress, done: int, passes: int) -> Iterator[tuple[Any, int]]:
        """Yield batches of rows of some columns, and the number of their first row."""
        position = count = 0
        try:
            if self._parquet is not None:
                found: Any = self._parquet.iter_batches(_ROWS, columns=names)
            else:
                assert self._stream is not None
                stream = self._stream
                found = (stream.get_batch(number).select(names) for number in range(stream.num_record_batches))
            for batch in found:
                yield batch, position
                position, count = position + batch.num_rows, count + 1
                progress(done * self.rows + (position if self._parquet else count), passes * self.rows)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        return UserError(f"{self.path}: cannot be read (torn or damaged?): {reason}")


class _Work:
    """From batches of rows to samples."""

    def __init__(self, table: _Table, chosen: Sequence[str], features: Features) -> None:
        self._table, self._chosen, self.features = table, chosen, features

    def columns(self, batch: Any, position: int) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for name in self._chosen:
            if self._table.is_text(name):
                found.append(_texts(batch.column(name)))
                continue
            values = _numbers(self._table, batch, name, position)
            found += list(values.reshape(batch.num_rows, -1).T)
        return found

    def append(
        self,
        writer: DataWriter,
        batch: Any,
        position: int,
        answers: Sequence[str],
        group: str | None,
        numbering: Classes | None,
    ) -> None:
        def where(row: int) -> str:
            return f"row {position + row}"

        if not batch.num_rows:
            return
        inputs, kept = self.features.encoded(self.columns(batch, position), where)
        if numbering is None:
            targets = np.stack([_numbers(self._table, batch, name, position) for name in answers], axis=1)
        else:
            targets = _labels(self._table, batch, answers[0], where, numbering)
        owners = None if group is None else np.array([str(each) for each in batch.column(group).to_pylist()], object)
        rows = np.flatnonzero(kept)
        for start in range(0, len(rows), writer.block_rows):
            part = rows[start : start + writer.block_rows]
            owned = None if owners is None else owners[part].tolist()
            writer.append(inputs[part], targets[part], lambda row, part=part: where(int(part[row])), owned)  # type: ignore[misc]


def _numbers(table: _Table, batch: Any, name: str, position: int) -> np.ndarray:
    """Return a column as float64, NaN where a number is missing; lists as ``(rows, length)``."""
    types, column = table._arrow.types, batch.column(name)
    width = table.width(name)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_fixed_size_list(column.type):
        if column.null_count:
            raise UserError(f"{table.path}: column {name!r} lacks a list in rows {position} ff.; leave these rows out")
        column = column.flatten()
    kind = column.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)):
        raise UserError(
            f"{table.path}: column {name!r} is {kind}; expected numbers, truth values, text, or lists of one length: "
            f"leave it out with --drop {name}"
        )
    values = column.cast("float64") if not types.is_boolean(kind) else column.cast("int8").cast("float64")
    found = np.asarray(values.to_numpy(zero_copy_only=False), np.float64)
    return found.reshape(-1, width) if width > 1 else found


def _texts(column: Any) -> np.ndarray:
    found = np.empty(len(column), object)
    found[:] = ["" if text is None else text for text in column.to_pylist()]
    return found


def _labels(table: _Table, batch: Any, name: str, where: Any, numbering: Classes) -> np.ndarray:
    column = batch.column(name)
    if column.null_count:
        row = next(row for row, value in enumerate(column.to_pylist()) if value is None)
        raise UserError(f"{table.path}: {where(row)}: the label is missing in column {name!r}; leave such rows out")
    if table.is_text(name):
        return numbering.codes(_texts(column).tolist(), where)
    return numbering.codes(whole(table.path, _numbers(table, batch, name, 0), where).tolist(), where)


def _classes(file: Path, like: Path | None) -> Classes:
    if like is None:
        return Classes(file, hint="; are they values? Then say --values")
    with Source.open(like, LARGEST_SAMPLE_BYTES >> 20) as source:
        if source.classes is None:
            raise UserError(f"{like}: has no classes; expected the training file of {file}, or say --values")
        return Classes(file, (like, source.labels or tuple(range(source.classes))))


def _check(table: _Table, names: Sequence[str]) -> None:
    for name in names:
        if name not in table.names:
            some = ", ".join(table.names[:8]) + (" ..." if len(table.names) > 8 else "")
            raise UserError(f"{table.path}: has no column {name!r}; expected one of {some}")


def _expanded(table: _Table, names: Sequence[str]) -> list[str]:
    """Return the names of columns, with the number of the element for lists."""
    found = []
    for name in names:
        width = table.width(name)
        found += [name] if width == 1 else [f"{name}.{number}" for number in range(width)]
    return found


def _spread(table: _Table, names: Sequence[str], texts: Sequence[bool]) -> list[bool]:
    return [text for name, text in zip(names, texts, strict=True) for _ in range(table.width(name))]
