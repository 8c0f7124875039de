"""WAV recordings: a file, a directory of them, or a tar, read one after the other without unpacking it."""

from __future__ import annotations

import io
import math
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io.wavfile
import scipy.signal

from dbmpi.data.importers.reading import InputFile, Progress
from dbmpi.errors import UserError

LARGEST_RECORDING = 64 << 20
"""Bytes of a recording, and samples of it at the rate that is wanted."""
HEADER_BYTES = 1 << 20
"""Bytes that the headers of a tar may take before a member."""
LOWEST_RATE, HIGHEST_RATE = 4_000, 384_000

TAR_FAULTS = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, IndexError, KeyError, TypeError)


@dataclass(frozen=True)
class Recording:
    """The bytes of a WAV file."""

    name: str
    """Relative to the directory or archive; never used as a path."""
    origin: str
    """For messages."""
    content: bytes


def wav_files(folder: Path) -> list[Path]:
    """Return the WAV files of a `folder` and the folders within, sorted by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".wav" and path.is_file())


def recordings(
    source: Path,
    progress: Progress,
    done: int = 0,
    passes: int = 1,
    files: Sequence[Path] | None = None,
    some: range | None = None,
) -> Iterator[Recording]:
    """Yield the WAV files of a directory (sorted by name) or a tar, plain or gzip (in its order), or the one file.

    Parameters
    ----------
    source
        Where they lie; of a tar or a directory, everything that is not named ``*.wav`` is passed over.
    progress
        Called with how much of the source has been read, and of how much.
    done, passes
        How many of how many equal passes over the source are complete.
    files
        Those of a directory, where they are known, see :func:`wav_files`.
    some
        Which of them, if not all, by their position.

    Raises
    ------
    UserError
        If the source cannot be read, is damaged, or a file is larger than LARGEST_RECORDING.
    """
    if source.is_dir():
        paths = wav_files(source) if files is None else files
        for position in range(len(paths)) if some is None else some:
            path = paths[position]
            with InputFile(path) as file:
                yield Recording(path.relative_to(source).as_posix(), str(path), _bounded(str(path), file))
            progress(done * len(paths) + position + 1, passes * len(paths))
        return
    with InputFile(source) as file:
        if source.suffix.lower() == ".wav":
            yield Recording(source.name, str(source), _bounded(str(source), file))
        else:
            for recording in _members(file):
                yield recording
                progress(done * file.file_bytes + file.position, passes * file.file_bytes)
        progress((done + 1) * file.file_bytes, passes * file.file_bytes)


def decoded(recording: Recording, rate: int | None) -> tuple[np.ndarray, int]:
    """Return a recording as float32 ``(samples,)`` in -1 ... 1, and its samples a second.

    PCM of 8 to 64 bits and floating samples are read; channels are averaged.  With `rate` the recording is resampled
    where it has another one.

    Raises
    ------
    UserError
        If it is not a WAV file, torn, of another encoding, not finite, or its rate is out of bounds.
    """
    found, samples = _samples(recording)
    if not LOWEST_RATE <= found <= HIGHEST_RATE:
        raise UserError(
            f"{recording.origin}: has {found} samples a second; expected {LOWEST_RATE} to {HIGHEST_RATE}: damaged?"
        )
    signal = _scaled(samples)
    if signal.ndim == 2:
        signal = signal.mean(axis=1, dtype=np.float32)
    if not np.isfinite(signal).all():
        raise UserError(f"{recording.origin}: holds NaN, infinity or a number too large; expected finite samples")
    if rate is None or rate == found:
        return signal, found
    if len(signal) * rate > LARGEST_RECORDING * found:
        raise UserError(
            f"{recording.origin}: has more than {LARGEST_RECORDING} samples at {rate} a second; cut it into pieces"
        )
    divisor = math.gcd(rate, found)
    return scipy.signal.resample_poly(signal, rate // divisor, found // divisor).astype(np.float32), rate


class _Metered:
    """The input file of a tar, which ends with an error where its headers do not end."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self.allowance = 0

    def read(self, size: int) -> bytes:
        if self.allowance <= 0:
            raise UserError(f"{self._file.path}: the headers before byte {self._file.offset} do not end: damaged")
        found = self._file.read(size)
        self.allowance -= len(found)
        return found


class _Member(tarfile.TarInfo):
    """A header of a tar that raises where tarfile would take damage for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the mark of the end
            raise tarfile.ReadError(str(error)) from None


def _members(file: InputFile) -> Iterator[Recording]:
    source = _Metered(file)
    source.allowance = HEADER_BYTES
    found = 0
    try:
        # As a stream: a header can then not send the reader backwards, and gzip is undone by InputFile.
        with tarfile.open(fileobj=source, mode="r|", tarinfo=_Member) as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members.clear()  # a list of all members, which is not needed
                origin = f"{file.path}: {member.name[:200]!r}"
                if not 0 <= member.size <= LARGEST_RECORDING:
                    raise UserError(
                        f"{origin} has {member.size} bytes; expected at most {LARGEST_RECORDING >> 20} MiB: cut the "
                        f"recording into pieces, and leave other large files out of the archive"
                    )
                source.allowance = member.size + HEADER_BYTES
                if member.isreg() and member.name.lower().endswith(".wav"):
                    content = archive.extractfile(member)
                    assert content is not None
                    found += 1
                    yield Recording(member.name, origin, content.read())
    except TAR_FAULTS as error:
        hint = "" if found else "; expected WAV files, a directory of them, or a tar (plain or gzip)"
        after = f"after {found} recordings " if found else ""
        raise UserError(f"{file.path}: {after}cannot be read as a tar: {error}{hint}") from None


def _bounded(origin: str, file: InputFile) -> bytes:
    content = file.read(LARGEST_RECORDING + 1)
    if len(content) > LARGEST_RECORDING:
        raise UserError(f"{origin}: is larger than {LARGEST_RECORDING >> 20} MiB; cut the recording into pieces")
    return content


def _samples(recording: Recording) -> tuple[int, np.ndarray]:
    """Return the rate and the samples as they are stored, ``(samples,)`` or ``(samples, channels)``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.io.wavfile.WavFileWarning)  # chunks of other programs
            warnings.filterwarnings("error", "Reached EOF prematurely", scipy.io.wavfile.WavFileWarning)
            rate, samples = scipy.io.wavfile.read(io.BytesIO(recording.content))
    except scipy.io.wavfile.WavFileWarning as warning:
        raise UserError(f"{recording.origin}: is torn: {warning}") from None
    except Exception as error:  # SciPy's reader computes with damaged headers, and raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{recording.origin}: cannot be read as WAV with integer or floating samples (torn, damaged, or of another "
            f"encoding): {reason}"
        ) from None
    return int(rate), samples


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Return samples as float32, full scale as -1 ... 1."""
    if samples.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return samples.astype(np.float32)
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    middle = half if samples.dtype.kind == "u" else 0.0
    return (samples.astype(np.float32) - np.float32(middle)) * np.float32(1 / half)
