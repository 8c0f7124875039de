"""LIBSVM files, plain or gzip: ``label index:value index:value ...``, one sample a line, indices increasing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from dbmpi.data.importers.classes import Classes, whole
from dbmpi.data.importers.reading import InputFile, Lines, Progress, line_blocks, no_progress
from dbmpi.data.reading import Label
from dbmpi.data.source import Source
from dbmpi.data.writer import LARGEST_SAMPLE_BYTES, DataWriter, Origin, Shape, Written, check_writable
from dbmpi.errors import UserError

PROGRESS_LINES = 4096


def import_libsvm(
    file: Path,
    out: Path,
    *,
    features: int | None = None,
    like: Path | None = None,
    kind: Literal["classes", "values"] = "classes",
    first_index: int = 1,
    sparse: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> Written:
    """Write a data file with float32 inputs from a LIBSVM file.

    Labels are numbered from 0 in increasing order and recorded in the attribute `labels`.

    Parameters
    ----------
    file
        Text, plain or gzip.
    out
        Data file to write.
    features
        Number of inputs; by default the largest index of the file, which takes a pass of its own.
    like
        A data file whose number of inputs and whose labels are used: the training file, for a test file.
    kind
        Whether labels are classes or values.
    first_index
        Index of the first input: 1, or 0 in some files.
    sparse
        Whether inputs that are 0 are left out of the data file, which suits many inputs of which few are not.
    force
        Replace an existing file.
    progress
        Called with the number of bytes that have been read, and of all, in all passes.

    Raises
    ------
    UserError
        If a line is malformed, an index too large, a number not finite, or a label unknown.
    """
    check_writable(out, force, (file,))
    labels = Classes(file, hint="; are they values? Then say --values")
    passes = 1
    if like is not None:
        given, names = _like(like, kind)
        labels = Classes(file, (like, names))
        if features not in (None, given):
            raise UserError(f"{features} features were asked for, but the samples of {like} have {given}")
        features = given
    if features is None:
        passes = 2
        features = _count_features(file, first_index, progress)
    shape = Shape((features,), None, None if kind == "classes" else 1, sparse=sparse)
    with InputFile(file) as text, DataWriter(out, shape, Origin("libsvm", file, file), force) as writer:
        lines = _lines(text)
        while part := list(itertools.islice(lines, writer.block_rows)):
            block, answers = np.zeros((len(part), features)), np.empty((len(part), 1))
            for row, (number, line) in enumerate(part):
                answers[row], columns, values = _sample(f"{file}: line {number}", line, first_index, features)
                block[row, columns] = values
            where = Lines(*map(list, zip(*part, strict=True))).where
            if kind == "classes":
                answers = labels.codes(whole(file, answers[:, 0], where).tolist(), where)
            writer.append(block, answers, where)
            progress((passes - 1) * text.file_bytes + text.position, passes * text.file_bytes)
        progress(passes * text.file_bytes, passes * text.file_bytes)
        if kind == "classes":
            labels.conclude(writer)
    return writer.written


def _lines(text: InputFile) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that holds a sample, without comments."""
    for lines in line_blocks(text):
        for number, line in zip(lines.numbers, lines.texts, strict=True):
            sample = line.partition("#")[0].strip()
            if sample:
                yield number, sample


def _sample(position: str, line: str, first_index: int, features: int) -> tuple[float, list[int], list[float]]:
    """Return the label, the columns and the values of a line."""
    label, *pairs = line.split()
    columns, values = [], []
    previous = first_index - 1
    try:
        for pair in pairs:
            index_text, _, value_text = pair.partition(":")
            index, value = int(index_text), float(value_text)
            if index <= previous:
                if index < first_index:
                    raise UserError(
                        f"{position}: the index {index} is below {first_index}; expected indices from {first_index} "
                        f"(say --first-index 0 if the file counts from 0)"
                    )
                raise UserError(f"{position}: the index {index} follows {previous}; expected increasing indices")
            columns.append(index - first_index)
            values.append(value)
            previous = index
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{position}: {pair[:40]!r} is not an input; expected index:value, e.g. 3:0.5") from None
    if columns and columns[-1] >= features:
        raise UserError(f"{position}: the index {previous} is too large; expected at most {features - 1 + first_index}")
    return _number(position, label), columns, values


def _number(position: str, label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        raise UserError(
            f"{position}: the label {label[:40]!r} is not a number; expected label index:value ..."
        ) from None
    if not math.isfinite(value):
        raise UserError(f"{position}: the label {label[:40]!r} is not finite; expected a number")
    return value


def _count_features(file: Path, first_index: int, progress: Progress) -> int:
    """Return the number of inputs: the largest index of the file, which is the last one of some line."""
    features = 0
    with InputFile(file) as text:
        for number, line in _lines(text):
            last = line.rsplit(maxsplit=1)[-1]
            if ":" in last:
                _, columns, _ = _sample(f"{file}: line {number}", f"0 {last}", first_index, LARGEST_SAMPLE_BYTES // 4)
                features = max(features, columns[-1] + 1)
            if number % PROGRESS_LINES == 0:
                progress(text.position, 2 * text.file_bytes)
    if features == 0:
        raise UserError(f"{file}: has no inputs; expected lines of the form label index:value ...")
    return features


def _like(like: Path, kind: Literal["classes", "values"]) -> tuple[int, tuple[Label, ...]]:
    """Return the number of inputs and the labels of another data file."""
    with Source.open(like, memory_mib=LARGEST_SAMPLE_BYTES >> 20) as source:
        if len(source.input_shape) != 1:
            raise UserError(f"{like}: its samples have shape {source.input_shape}; expected a file made from LIBSVM")
        if kind == "classes" and not all(isinstance(label, int) for label in source.labels or ("",)):
            raise UserError(
                f"{like}: does not say which labels its classes stand for; expected a file made from LIBSVM"
            )
        return source.input_shape[0], source.labels or ()
