"""Text as whole numbers: samples are windows of characters or bytes, and the class is what follows."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dbmpi.data.importers.reading import InputFile, Progress, no_progress
from dbmpi.data.labels import MOST_LABELS, some
from dbmpi.data.source import Source
from dbmpi.data.writer import LARGEST_SAMPLE_BYTES, DataWriter, Origin, Shape, Written, check_writable
from dbmpi.errors import UserError

WINDOW = 16
_BLOCK_BYTES = 1 << 20
_BYTES = 256


def import_text(
    file: Path,
    out: Path,
    *,
    tokens: Literal["characters", "bytes"] = "characters",
    window: int = WINDOW,
    stride: int = 1,
    test_out: Path | None = None,
    test_fraction: float | None = None,
    like: Path | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> list[Written]:
    """Write a data file of windows of a text, each with the token that follows it as its class.

    Inputs are whole numbers ``(samples, window)`` whose attribute `one_hot` is the number of tokens: a network gets
    them as vectors, ``(window, tokens)``, an objective of one's own as they are.  The characters are recorded in the
    attribute `labels` of the targets, in their order in Unicode.

    Parameters
    ----------
    file
        UTF-8 text, or with ``bytes`` anything, plain or gzip.
    out
        Data file to write.
    tokens
        What is numbered.
    window
        Tokens of a sample.
    stride
        From the beginning of a sample to that of the next.
    test_out, test_fraction
        Second data file, and how much of the end of the text goes there: windows overlap, so that those drawn at
        random would be known from the training.  No window reaches from one part into the other.
    like
        An earlier data file, whose characters and window are used.
    force
        Replace existing files.
    progress
        Called with the number of bytes that have been read, and of all, in all passes.

    Raises
    ------
    UserError
        If the text is not UTF-8, too short, holds a character that `like` does not know, or too many.
    """
    if (test_out is None) != (test_fraction is None):
        raise UserError("the test file needs both: --test-out FILE.h5 --test-fraction 0.1")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise UserError(f"--test-fraction {test_fraction:g}: expected a number between 0 and 1, e.g. 0.1")
    outs = [out] if test_out is None else [out, test_out]
    for each in outs:
        check_writable(each, force, [path for path in (file, like) if path is not None])
    if like is not None:
        alphabet, window = _like(like, tokens)
        count = None if test_out is None else _counted(file, tokens, None, progress)[1]
    elif tokens == "bytes":
        alphabet, count = None, None if test_out is None else _counted(file, tokens, None, progress)[1]
    else:
        alphabet, count = _counted(file, tokens, MOST_LABELS, progress)
    size = _BYTES if alphabet is None else len(alphabet)
    if size < 2:
        raise UserError(f"{file}: holds {size} different characters; expected a text of at least two")
    shape = Shape((window,), size, None, 1.0, "uint8" if size <= _BYTES else "uint16", size)
    cut = None if test_fraction is None or count is None else count - round(count * test_fraction)
    origin = Origin("text", file, file)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(DataWriter(each, shape, origin, force)) for each in outs]
        for writer in writers:
            if alphabet is not None:
                writer.number_labels([*alphabet], np.arange(size, dtype=np.int32))
        # One behind the other, so that no window lies across.
        parts = [_Windows(writer, window, stride) for writer in writers]
        position = 0
        for codes in _coded(file, tokens, alphabet, like, progress):
            until = len(codes) if cut is None else min(max(cut - position, 0), len(codes))
            parts[0].append(codes[:until])
            if until < len(codes):
                parts[-1].append(codes[until:])
            position += len(codes)
        for part in parts:
            part.check(file)
    return [writer.written for writer in writers]


class _Windows:
    """Windows of what is appended to one file."""

    def __init__(self, writer: DataWriter, window: int, stride: int) -> None:
        self._writer, self._window, self._stride = writer, window, stride
        self._rest = np.empty(0, np.int32)
        self._skip = 0

    def append(self, codes: np.ndarray) -> None:
        text = np.concatenate([self._rest, codes])
        count = len(text) - self._window
        if count <= self._skip:
            self._rest = text
            return
        samples = np.lib.stride_tricks.sliding_window_view(text, self._window)[self._skip : count : self._stride]
        follows = text[self._window + self._skip :: self._stride]
        for start in range(0, len(samples), self._writer.block_rows):
            rows = slice(start, start + self._writer.block_rows)
            self._writer.append(samples[rows].astype(self._writer.shape.dtype), follows[rows])
        self._skip = self._skip + len(samples) * self._stride - count
        self._rest = text[count:]

    def check(self, file: Path) -> None:
        if not self._writer.samples:
            raise UserError(
                f"{file}: is too short for {self._writer.out.name}: {len(self._rest)} tokens; expected more than the "
                f"{self._window} of a window"
            )


def _pieces(file: InputFile, tokens: str) -> Iterator[str | bytes]:
    """Yield a text in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        block = file.read(_BLOCK_BYTES)
        if tokens == "bytes":
            if block:
                yield block
        else:
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file.path}: is not UTF-8 text near byte {file.offset - len(block) + error.start}; convert it, "
                    "or say --tokens bytes"
                ) from None
            if text:
                yield text
        if not block:
            return


def _counted(file: Path, tokens: str, most: int | None, progress: Progress) -> tuple[str, int]:
    """Return the characters of a text in order, and how many tokens it has."""
    found: set[str] = set()
    count = 0
    with InputFile(file) as text:
        for piece in _pieces(text, tokens):
            count += len(piece)
            if isinstance(piece, str):
                found.update(piece)
                if most is not None and len(found) > most:
                    raise UserError(f"{file}: holds more than {most} different characters; say --tokens bytes")
            progress(text.position, 2 * text.file_bytes)
    if "\0" in found:
        raise UserError(f"{file}: holds zero bytes, so that it is no text; say --tokens bytes")
    return "".join(sorted(found)), count


def _coded(
    file: Path, tokens: str, alphabet: Sequence[str] | None, like: Path | None, progress: Progress
) -> Iterator[np.ndarray]:
    """Yield the tokens of a text as whole numbers, int32."""
    known = None if alphabet is None else np.array([ord(letter) for letter in alphabet])
    with InputFile(file) as text:
        for piece in _pieces(text, tokens):
            if isinstance(piece, bytes):
                codes = np.frombuffer(piece, np.uint8).astype(np.int32)
            else:
                assert known is not None
                points = np.frombuffer(piece.encode("utf-32-le"), "<u4")
                codes = np.searchsorted(known, points).clip(max=len(known) - 1).astype(np.int32)
                wrong = np.flatnonzero(known[codes] != points)
                if len(wrong):
                    raise UserError(
                        f"{file}: the character {chr(points[wrong[0]])!r} does not occur in {like}; expected "
                        f"{some([*(alphabet or '')])}"
                    )
            progress(text.file_bytes + text.position, 2 * text.file_bytes)
            yield codes


def _like(path: Path, tokens: str) -> tuple[str | None, int]:
    """Return the characters and the window of another data file."""
    with Source.open(path, LARGEST_SAMPLE_BYTES >> 20) as source:
        labels, shape, size = source.labels, source.input_shape, source.encoding.one_hot
    text = labels is not None and all(isinstance(label, str) and len(label) == 1 for label in labels)
    if len(shape) != 2 or size not in (len(labels or ()), _BYTES) or (tokens == "characters") != text:
        raise UserError(f"{path}: was not made from a text of {tokens}; expected the file of the training text")
    return ("".join(map(str, labels)) if text and labels else None), shape[0]
