"""Transcripts of recordings: from a table, or from the names of the files."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from dbmpi.data.importers.csv_table import is_number
from dbmpi.data.importers.reading import InputFile, line_blocks
from dbmpi.errors import UserError

COLUMNS = ("file", "start", "end", "label", "speaker")
NAME = re.compile(r"(\d{1,6})_([^_/]+)_(\d+)\.wav", re.IGNORECASE)
"""As in the Free Spoken Digit Dataset: ``{digit}_{speaker}_{index}.wav``."""
SPEAKER = re.compile(r"([0-9a-f]{8})_nohash_\d+\.wav", re.IGNORECASE)
"""As in Speech Commands: ``{speaker}_nohash_{index}.wav``."""
LARGEST_LABEL = 1_000_000


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording with one label."""

    start: float
    """Seconds from the beginning of the recording."""
    end: float
    label: int


@dataclass(frozen=True)
class Transcript:
    """The transcript of a recording."""

    speaker: str | None
    segments: tuple[Segment, ...]

    def labels(self, centres: np.ndarray, states: int) -> np.ndarray:
        """Return the class of each frame, int64 ``(frames,)``, or -1 for a frame without a label.

        The frames of a segment are cut evenly into `states`; the class is ``label * states + state``.

        Parameters
        ----------
        centres
            Seconds at which the frames have their middle, increasing, float64 ``(frames,)``.
        states
            States of a label.
        """
        classes = np.full(len(centres), -1, np.int64)
        for segment in self.segments:
            first, last = np.searchsorted(centres, (segment.start, segment.end))
            count = last - first
            classes[first:last] = segment.label * states + np.arange(count) * states // max(count, 1)
        return classes


class FileNames:
    """Transcripts from file names: one label for all of a recording."""

    names: tuple[str, ...] = ()
    """What the labels are called; none, as they are numbers."""

    def of(self, name: str, position: str) -> Transcript | None:
        """Return the transcript of the recording called `name`; `position` is for messages."""
        match = NAME.fullmatch(PurePosixPath(name).name)
        if match is None:
            raise UserError(
                f"{position}: the name holds neither label nor speaker; expected label_speaker_number.wav, e.g. "
                f"7_jackson_32.wav, or a table of labels (--table)"
            )
        return Transcript(match[2], (Segment(0.0, math.inf, int(match[1])),))

    def check(self) -> None:
        """Do nothing: a name always belongs to a recording."""


class FolderNames:
    """Transcripts from the names of the folders in which recordings lie: one label for all of a recording.

    Parameters
    ----------
    source
        The directory with a folder for each label.

    Raises
    ------
    UserError
        If it is no directory with folders.
    """

    def __init__(self, source: Path) -> None:
        inner = sorted(path.name for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
        self.names = tuple(name for name in inner if not name.startswith((".", "_")))
        if not self.names:
            raise UserError(
                f"{source}: holds no folders whose names are labels; expected e.g. {source / 'yes' / 'one.wav'}, or a "
                "table of labels (--table)"
            )
        self._codes = {name: code for code, name in enumerate(self.names)}

    def of(self, name: str, position: str) -> Transcript | None:
        """Return the transcript of the recording called `name`, at `position`; None where no label is its folder."""
        del position
        folder, _, last = name.partition("/")
        if not last or folder not in self._codes:
            return None
        match = SPEAKER.match(PurePosixPath(last).name)
        return Transcript(match[1] if match else None, (Segment(0.0, math.inf, self._codes[folder]),))

    def check(self) -> None:
        """Do nothing: a folder always belongs to a recording."""

    def number_as(self, names: Sequence[str]) -> None:
        """Take the labels for the classes that have these `names` in another file; UserError where one is unknown."""
        self._codes = _as_in(self.names, names)


@dataclass
class TranscriptTable:
    """Transcripts from a table with the columns file and label, and if wanted start and end (seconds), and speaker.

    Labels are whole numbers, or if some are texts, texts, which are numbered in their order.
    """

    path: Path
    names: tuple[str, ...] = ()
    """What the labels are called, where they are texts."""
    words: list[tuple[str, str, float, float]] = field(default_factory=list)
    """Of each line the recording, the label as it is written, start and end."""
    rows: dict[str, list[Segment]] = field(default_factory=dict)
    speakers: dict[str, str] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> TranscriptTable:
        """Read the CSV file `path`, whose first line names the columns.

        Raises
        ------
        UserError
            If a column is missing or unknown, or a line has no file, no whole label, or no stretch of time.
        """
        table = cls(path)
        header: list[str] | None = None
        with InputFile(path) as text:
            for lines in line_blocks(text):
                for number, line in zip(lines.numbers, lines.texts, strict=True):
                    fields = [value.strip() for value in next(csv.reader([line]))]
                    if header is None:
                        header = _header(path, fields)
                        continue
                    if len(fields) != len(header):
                        raise UserError(
                            f"{path}: line {number} has {len(fields)} columns; expected {len(header)} as in the first"
                        )
                    table._add(f"{path}: line {number}", dict(zip(header, fields, strict=True)))
        table._number()
        if not table.rows:
            raise UserError(f"{path}: names no recordings; expected lines of {', '.join(header or COLUMNS[::3])}")
        for name, segments in table.rows.items():
            segments.sort(key=lambda segment: segment.start)
            for before, after in pairwise(segments):
                if after.start < before.end:
                    raise UserError(
                        f"{path}: segments of {name} overlap: one ends at {before.end:g} s, the next starts at "
                        f"{after.start:g} s"
                    )
        return table

    def of(self, name: str, position: str) -> Transcript | None:
        """Return the transcript of a recording, by its whole `name` or the last part of it; None if it has none.

        `position` is that of the recording, for messages.
        """
        key = name if name in self.rows else PurePosixPath(name).name
        if key not in self.rows:
            return None
        self.found.add(key)
        return Transcript(self.speakers.get(key), tuple(self.rows[key]))

    def check(self) -> None:
        """Raise UserError if recordings of the table have not been asked for."""
        missing = [name for name in self.rows if name not in self.found]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of its {len(self.rows)} recordings were not found, e.g. {missing[0]}; "
                f"expected names as in the directory or archive, or the last parts of them"
            )

    def _add(self, position: str, row: dict[str, str]) -> None:
        name = row["file"].removeprefix("./")
        if not name:
            raise UserError(f"{position}: the file is empty; expected the name of a recording")
        number = re.fullmatch(r"\d{1,7}", row["label"])
        if (
            not row["label"]
            or (number and int(row["label"]) > LARGEST_LABEL)
            or (not number and is_number(row["label"]))
        ):
            raise UserError(
                f"{position}: the label {row['label'][:40]!r} is not a class; expected a whole number from 0 to "
                f"{LARGEST_LABEL}, or a text"
            )
        start, end = (_seconds(position, row.get(key, value)) for key, value in (("start", "0"), ("end", "inf")))
        if not 0 <= start < end:
            raise UserError(f"{position}: goes from {start:g} s to {end:g} s; expected 0 <= start < end")
        speaker = row.get("speaker", "")
        if self.speakers.setdefault(name, speaker) != speaker:
            raise UserError(f"{position}: {name} is spoken by {speaker!r} here, before by {self.speakers[name]!r}")
        self.rows.setdefault(name, [])
        self.words.append((name, row["label"], start, end))

    def _number(self) -> None:
        """Make segments of the lines, with numbers for labels that are texts."""
        found = {label for _, label, _, _ in self.words}
        if not all(map(str.isdecimal, found)):
            self.names = tuple(sorted(found))
        self._place({name: code for code, name in enumerate(self.names)})

    def _place(self, codes: Mapping[str, int]) -> None:
        for name in self.rows:
            self.rows[name] = []
        for name, label, start, end in self.words:
            self.rows[name].append(Segment(start, end, codes[label] if codes else int(label)))

    def number_as(self, names: Sequence[str]) -> None:
        """Take the labels for the classes that have these `names` in another file; UserError where one is unknown."""
        self._place(_as_in(self.names, names))
        for segments in self.rows.values():
            segments.sort(key=lambda segment: segment.start)


def _as_in(mine: Sequence[str], theirs: Sequence[str]) -> dict[str, int]:
    codes = {name: code for code, name in enumerate(theirs)}
    unknown = [name for name in mine if name not in codes]
    if unknown:
        raise UserError(
            f"the label {unknown[0]!r} does not occur in the training file; expected {', '.join([*theirs][:8])}"
        )
    return codes


def _header(path: Path, fields: list[str]) -> list[str]:
    names = [name.lower() for name in fields]
    wrong = set(names) - set(COLUMNS) or not {"file", "label"} <= set(names) or ("start" in names) != ("end" in names)
    if wrong or len(set(names)) != len(names):
        raise UserError(
            f"{path}: its first line is {','.join(fields)[:80]!r}; expected the names of the columns: file,label or "
            f"file,start,end,label (start and end in seconds), and if wanted speaker"
        )
    return names


def _seconds(position: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise UserError(f"{position}: {text[:40]!r} is not a time; expected seconds, e.g. 1.25")
    return value
