"""Recordings of speech to frames of log mel energies in their context, as the paper's speech network takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np

from dbmpi.checkpoint.untrusted import attribute, damage
from dbmpi.data import hdf5
from dbmpi.data.importers.mel import HOP_SECONDS, WINDOW_SECONDS, LogMel
from dbmpi.data.importers.parts import parts
from dbmpi.data.importers.reading import Progress, no_progress
from dbmpi.data.importers.recordings import HIGHEST_RATE, LOWEST_RATE, decoded, recordings, wav_files
from dbmpi.data.importers.transcript import FileNames, FolderNames, Transcript, TranscriptTable
from dbmpi.data.moments import Moments
from dbmpi.data.source import Source
from dbmpi.data.writer import GROUPS, LARGEST_SAMPLE_BYTES, DataWriter, Origin, Shape, Written, check_writable
from dbmpi.errors import UserError

FILTERS = 40
_Transcripts = FileNames | FolderNames | TranscriptTable
CONTEXT = 11
STATES = 3
"""States of a digit: its beginning, its middle and its end."""
MOST_STATES = 1000


def import_wav(
    source: Path,
    out: Path,
    *,
    test_out: Path | None = None,
    test_speakers: Collection[str] = (),
    table: Path | None = None,
    labels: Literal["names", "folders"] = "names",
    states: int | None = None,
    rate: int | None = None,
    context: int | None = None,
    classes: int | None = None,
    like: Path | None = None,
    per_file: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> list[Written]:
    """Write a data file of frames: float32 ``(samples, context, 40)`` and the class of the middle frame.

    Features are natural logarithms of 40 mel energies of 25 ms Hamming windows every 10 ms, minus the mean and divided
    by the deviation of the training frames, each energy its own.  Both are attributes of the files.  Beyond the ends
    of a recording the context repeats the first and the last frame.

    Parameters
    ----------
    source
        A WAV file, a directory of them, or a tar, plain or gzip.
    out
        Data file to write.
    test_out, test_speakers
        Second data file, and the speakers whose recordings go there and not to `out`.
    table
        CSV file with the columns file and label, if wanted start and end (seconds), and speaker; recordings that it
        does not name and frames outside all its stretches are left out.
    labels
        Without a table, where labels come from: names, ``label_speaker_number.wav``, or the folders of the source.
    states
        Parts of a label's stretch that are classes of their own (``label * states + part``); by default 3 for labels
        from names and 1 for those of a table.
    rate
        Samples a second to which other recordings are resampled; by default all must have the same.
    context
        Frames of a sample, an odd number; by default 11.
    classes
        Number of classes; by default the largest of both files plus one, or that of `like`.
    like
        An earlier data file, whose mean, deviation, rate, context, states and classes are used.
    per_file
        Recordings of each data file, for a directory, whose name then has a ``{}`` for the number of the file.  One
        that a run before has completed is not written again.
    force
        Replace existing files.
    progress
        Called with how much of the source has been read, and of how much, in two passes (with `like` in one).

    Raises
    ------
    UserError
        If a recording or the table is damaged or not as expected, a speaker does not occur, or nothing is left.
    """
    _check_options(source, out, test_out, test_speakers, rate, states, context, per_file)
    others = [path for path in (source, table, like) if path is not None]
    recorded = None if per_file is None else wav_files(source)
    way = (labels, states, rate, context, classes, [_state(path) for path in others[1:] + (recorded or [])])
    # What is in each data file depends on all recordings, by which it is normalised.
    files = list(parts(out, [source] if recorded is None else recorded, per_file, way))
    there = [part for part in files if part.is_there and not force]
    tests = [] if test_out is None else [test_out]
    for each in [part.out for part in files if part not in there] + tests:
        check_writable(each, force, others)
    transcripts: _Transcripts
    if table is not None:
        transcripts = TranscriptTable.read(table)
    else:
        transcripts = FolderNames(source) if labels == "folders" else FileNames()
    work = _Import(source, transcripts, frozenset(test_speakers), rate, resample=rate is not None, files=recorded)
    basis = like or (there[0].out if there else None)
    if basis is None:
        scaling = work.measure(
            context or CONTEXT, states or (STATES if isinstance(transcripts, FileNames) else 1), progress
        )
        found: int | None = work.classes
    else:
        scaling, found, known = _like(basis)
        _agree(basis, scaling, states, rate, context)
        if not isinstance(transcripts, FileNames) and transcripts.names:
            transcripts.number_as(known)
            transcripts.names = known
        work.rate = scaling.rate
    if there:
        with hdf5.open_file(there[0].out) as file:
            work.named = GROUPS in file
    shape = Shape((scaling.context, FILTERS), found if classes is None else classes)
    origin, written = Origin("wav", source, source if table is None else table), []
    done = 0 if basis else 1
    for number, part in enumerate(files):
        if part in there:
            continue
        some = None if per_file is None else range(number * per_file, number * per_file + len(part.sources))
        with contextlib.suppress(_Empty), contextlib.ExitStack() as stack:
            writers = [stack.enter_context(DataWriter(each, shape, origin, force)) for each in (part.out, *tests)]
            for writer in writers:
                writer.annotate(scaling.attributes() | part.attributes)
                if transcripts.names:
                    called = _parts(transcripts.names, scaling.states)
                    writer.number_labels(called, np.arange(len(called), dtype=np.int32))
            work.write(scaling, writers, progress, done, some)
            if per_file is not None and not writers[0].samples:
                raise _Empty
            stack.close()
            written += [writer.written for writer in writers]
    return written


class _Empty(Exception):
    """No recording of a data file has labelled frames: it is not written."""


def _state(path: Path) -> tuple[str, int, int]:
    """Return by what another state of a file at `path` is known."""
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Scaling:
    """How frames are made and normalised: what a test file must share with its training file."""

    rate: int
    context: int
    states: int
    mean: np.ndarray
    """float64 ``(FILTERS,)``, of the training frames before normalisation."""
    deviation: np.ndarray
    """float64 ``(FILTERS,)``, 1 where an energy never varies."""

    def samples(self, energies: np.ndarray) -> np.ndarray:
        """Return frames of `energies` (frames, FILTERS), normalised, in their context.

        They are float32 ``(frames, context, FILTERS)``, as a view.
        """
        normalised = ((energies - self.mean) / self.deviation).astype(np.float32)
        aside = self.context // 2
        padded = np.pad(normalised, ((aside, aside), (0, 0)), mode="edge")
        return np.lib.stride_tricks.sliding_window_view(padded, self.context, axis=0).swapaxes(1, 2)

    def attributes(self) -> dict[str, object]:
        """Return the attributes of the data file."""
        return {
            "rate": self.rate,
            "context": self.context,
            "states": self.states,
            "window_seconds": WINDOW_SECONDS,
            "hop_seconds": HOP_SECONDS,
            "mean": self.mean,
            "deviation": self.deviation,
        }


@dataclass(frozen=True)
class _Frames:
    origin: str
    test: bool
    speaker: str | None
    """None where that of some recordings is not known."""
    energies: np.ndarray
    classes: np.ndarray


@dataclass
class _Import:
    """One source, read once to measure it and once to write it."""

    source: Path
    transcripts: _Transcripts
    test_speakers: frozenset[str]
    rate: int | None
    """Samples a second; that of the first recording unless it is given."""
    resample: bool
    """Whether recordings may have other rates."""
    files: Sequence[Path] | None = None
    """Those of a directory, where they are known."""
    classes: int = 1
    """Largest class plus one of what has been measured."""
    named: bool | None = None
    """Whether speakers are known, as that of the first recording is."""

    def measure(self, context: int, states: int, progress: Progress) -> Scaling:
        """Find mean, deviation, rate and classes."""
        moments = Moments(FILTERS)
        for frames in self._frames(states, progress, 0, 2):
            used = frames.classes >= 0
            if not frames.test:
                moments.add(frames.energies[used])
            self.classes = max(self.classes, (int(frames.classes.max(initial=-1)) // states + 1) * states)
        if not moments.count.any() or self.rate is None:
            raise UserError(
                f"{self.source}: holds no labelled frames to learn from; expected recordings of at least "
                f"{WINDOW_SECONDS * 1000:g} ms{' that are not of the test speakers' * bool(self.test_speakers)}"
            )
        return Scaling(
            self.rate, context, states, moments.mean, np.where(moments.deviation > 0, moments.deviation, 1.0)
        )

    def write(
        self, scaling: Scaling, writers: list[DataWriter], progress: Progress, done: int, some: range | None
    ) -> None:
        """Write the frames of all or `some` recordings: to the second writer those of test speakers."""
        for frames in self._frames(scaling.states, progress, done, done + 1, some):
            writer = writers[int(frames.test)]
            samples = scaling.samples(frames.energies)
            used = np.flatnonzero(frames.classes >= 0)
            for start in range(0, len(used), writer.block_rows):
                rows = used[start : start + writer.block_rows]
                owners = None if frames.speaker is None else [frames.speaker] * len(rows)
                writer.append(samples[rows], frames.classes[rows], partial(_in, frames.origin), owners)

    def _frames(
        self, states: int, progress: Progress, done: int, passes: int, some: range | None = None
    ) -> Iterator[_Frames]:
        speakers = set()
        for recording in recordings(self.source, progress, done, passes, self.files, some):
            transcript = self.transcripts.of(recording.name, recording.origin)
            if transcript is None:
                continue
            speakers.add(transcript.speaker)
            test = self._is_test(transcript, recording.origin)
            signal, rate = decoded(recording, self.rate if self.resample else None)
            if self.rate not in (None, rate):
                raise UserError(
                    f"{recording.origin}: has {rate} samples a second, but others have {self.rate}; to resample, "
                    f"say --rate {self.rate}"
                )
            self.rate = rate
            energies = _mel(rate)(signal)
            yield _Frames(
                recording.origin,
                test,
                self._speaker(transcript),
                energies,
                transcript.labels(_mel(rate).centres(len(energies)), states),
            )
        if some is not None:
            return
        self.transcripts.check()
        missing = sorted(self.test_speakers - speakers)
        if missing:
            known = ", ".join(sorted(str(speaker) for speaker in speakers)[:12])
            raise UserError(f"{self.source}: no speaker is called {missing[0]!r}; the speakers are {known}")

    def _speaker(self, transcript: Transcript) -> str | None:
        if self.named is None:
            self.named = bool(transcript.speaker)
        return (transcript.speaker or "unknown") if self.named else None

    def _is_test(self, transcript: Transcript, origin: str) -> bool:
        if self.test_speakers and not transcript.speaker:
            raise UserError(
                f"{origin}: the table does not name the speakers; add a column speaker to split by speakers"
            )
        return transcript.speaker in self.test_speakers


def _check_options(
    source: Path,
    out: Path,
    test_out: Path | None,
    test_speakers: Collection[str],
    rate: int | None,
    states: int | None,
    context: int | None,
    per_file: int | None,
) -> None:
    if not source.exists():
        raise UserError(f"{source}: no such file or directory; expected WAV files, a directory of them, or a tar")
    if per_file is not None and (test_out is not None or not source.is_dir()):
        raise UserError(
            f"--per-file {per_file}: is for a directory, without --test-out; unpack an archive, and give the "
            "recordings of test speakers a directory of their own"
        )
    if context is not None and not (1 <= context <= 1001 and context % 2 == 1):
        raise UserError(f"a context of {context} frames was given; expected an odd number up to 1001, e.g. {CONTEXT}")
    if rate is not None and not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise UserError(f"a rate of {rate} was given; expected {LOWEST_RATE} to {HIGHEST_RATE} samples a second")
    if states is not None and not 1 <= states <= MOST_STATES:
        raise UserError(f"{states} states were given; expected 1 to {MOST_STATES}, e.g. {STATES}")
    if (test_out is None) != (not test_speakers):
        raise UserError("--test-out and --test-speakers go together: a file, and the speakers whose recordings it gets")
    if test_out is not None and test_out.absolute() == out.absolute():
        raise UserError(f"{out}: was given with --out and with --test-out; expected two files")


def _parts(names: Sequence[str], states: int) -> list[str]:
    """Return what the classes are called: labels, or parts of them."""
    return [f"{name} {part}" if states > 1 else name for name in names for part in range(states)]


def _like(like: Path) -> tuple[Scaling, int | None, tuple[str, ...]]:
    """Return how the frames of another data file were made and normalised, its number of classes, and its labels."""
    with Source.open(like, LARGEST_SAMPLE_BYTES >> 20) as source:
        classes, shape, labels = source.classes, source.input_shape, source.labels or ()
    with hdf5.open_file(like) as file, damage(like, "its attributes"):
        found = {name: attribute(file, name) for name in ("rate", "states", "mean", "deviation")}
        if any(value is None for value in found.values()):
            raise UserError(f"{like}: does not say how its frames were made; expected a file made from WAV")
        rate, states = (int(np.asarray(found[name]).item()) for name in ("rate", "states"))
        mean, deviation = (np.asarray(found[name], np.float64) for name in ("mean", "deviation"))
        right = (
            shape == (shape[0], FILTERS)
            and shape[0] % 2 == 1
            and LOWEST_RATE <= rate <= HIGHEST_RATE
            and 1 <= states <= MOST_STATES
            and all(vector.shape == (FILTERS,) and np.isfinite(vector).all() for vector in (mean, deviation))
            and deviation.min() > 0
        )
    if not right:
        raise UserError(f"{like}: its rate, states, mean or deviation are impossible: damaged?")
    whole = [str(label).rpartition(" ")[0] if states > 1 else str(label) for label in labels[::states]]
    return Scaling(rate, shape[0], states, mean, deviation), classes, tuple(whole)


def _agree(like: Path, scaling: Scaling, states: int | None, rate: int | None, context: int | None) -> None:
    """Raise UserError if something else is asked for than what the other file has."""
    for name, given in (("states", states), ("rate", rate), ("context", context)):
        theirs = getattr(scaling, name)
        if given is not None and given != theirs:
            raise UserError(f"--{name} {given} was given, but {like} has {theirs}; leave it out")


def _in(recording: str, row: int) -> str:
    return f"in {recording}"


@cache
def _mel(rate: int) -> LogMel:
    return LogMel(rate, FILTERS)
