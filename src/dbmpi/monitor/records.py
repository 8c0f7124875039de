"""Records of a run: the reports of every worker and shard, one line of JSON each.

A run directory holds ``records/<role>-<number>.jsonl``, one file for each worker and each shard.  A file has one writer
and only ever grows: a resumed run appends with a new session number.  A line is written by one system call, so that
a reader beside the running job sees whole lines; what a crash has torn is skipped by the reader and closed by the
next line.  Any tool that reads JSON lines reads the files (numbers that are not finite are written as null).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from dbmpi.errors import UserError
from dbmpi.monitor.lines import FORMAT, Record, parse, session_of, split
from dbmpi.monitor.reports import Report

_TAIL = 1 << 16
_COMMON = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT, errno.EACCES)
"""Errors of a directory that all ranks write to."""


class Recorder:
    """Appends the reports of one rank's role to its file.

    A disk that fills up later costs records, not the run: the first failure is warned about, and every later report
    is tried again.  If the file or its directory has been removed or moved, it is created again.

    Parameters
    ----------
    directory
        The run directory; made if missing.
    role, number
        The role that writes the file, and its number, e.g. ``"worker", 0``.
    session
        Number of this start of the run, the same on all ranks: :func:`next_session`, called by one rank and sent to
        the others.  By default one more than the last session in this file.
    started
        Start of the session in unix seconds, the same on all ranks; by default now.
    steps_before
        Mini-batches of all replicas that were in the parameters when the session began.
    steps_per_epoch
        Mini-batches of all replicas together in an epoch.

    Attributes
    ----------
    clock
        Returns the seconds since the session started, where they are not real ones; the time of a line follows from it.

    Raises
    ------
    UserError
        If the file cannot be made or opened.
    """

    def __init__(
        self,
        directory: Path,
        role: str,
        number: int,
        *,
        session: int | None = None,
        started: float | None = None,
        steps_before: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        if not re.fullmatch(r"[a-z]+", role) or number < 0:
            raise ValueError(f"a role is a word and its number is not negative, got {role!r} and {number}")
        self.role, self.number = role, number
        self.path = directory / "records" / f"{role}-{number}.jsonl"
        try:
            self._descriptor = self._open()
            tail = _tail(self._descriptor)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot write the records of the run there ({error.strerror}); "
                "choose another run.directory or make this one writable"
            ) from None
        self.session = _last_session(tail) + 1 if session is None else session
        self._steps = {"steps_before": steps_before, "steps_per_epoch": steps_per_epoch}
        # A clock that is set while the run is going must not bend the curves: only the start is read from it.
        self._started = time.time() if started is None else started
        self._zero = time.monotonic() - (time.time() - self._started)
        self.clock: Callable[[], float] | None = None
        self._torn = bool(tail) and not tail.endswith(b"\n")
        self._closed = self._removed = False
        self.lost = 0
        """Reports that could not be written."""

    @property
    def elapsed(self) -> float:
        """Seconds since the session started."""
        return time.monotonic() - self._zero if self.clock is None else self.clock()

    def write(self, report: Report, number: int | None = None) -> None:
        """Append one line.

        Parameters
        ----------
        report
            What the line says.
        number
            That of the role, where the file has the lines of several; by default that of the file.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the recorder is closed")
        record: Record = {
            "format": FORMAT,
            "kind": report.kind,
            "role": self.role,
            "number": self.number if number is None else number,
            "session": self.session,
            "time": round(time.time() if self.clock is None else self._started + self.elapsed, 3),
            "elapsed": round(self.elapsed, 3),
            **self._steps,
        }
        for field in dataclasses.fields(report):
            record[field.name] = _jsonable(getattr(report, field.name))
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            self._renew()
            self._append(line)
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                self._warn(f"records are being lost: {error.strerror}", error.errno)
        else:
            if self.lost:
                self._warn(f"{self.lost} records were lost; they are written again", errno.ENOSPC)
            self.lost = 0

    def _append(self, line: bytes) -> None:
        if self._torn:
            line = b"\n" + line
        written = os.write(self._descriptor, line)
        self._torn = written < len(line)
        if self._torn:  # a full disk takes what fits; the rest of the line says why
            os.write(self._descriptor, line[written:])
            self._torn = False

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def _renew(self) -> None:
        """Create the file again if it has been removed or replaced: lines written to the old one would be lost."""
        try:
            here = os.fstat(self._descriptor)
            if os.path.samestat(here, self.path.stat()):
                return
        except OSError:  # also of a file that another host has removed
            pass
        before, self._descriptor, self._torn = self._descriptor, self._open(), False
        with suppress(OSError):  # as one that another host has removed
            os.close(before)
        if not self._removed:
            self._warn("the records were removed or moved during the run; they are started again", errno.ENOENT)
        self._removed = True

    def _warn(self, text: str, number: int | None) -> None:
        """Warn; about errors that all ranks share only on the first rank of a role."""
        if self.number == 0 or number not in _COMMON:
            warnings.warn(f"{self.path}: {text}", RuntimeWarning, stacklevel=3)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Records(list[Record]):
    """The records of a run in the order of time, and in `skipped` the number of lines that were not records."""

    skipped: int = 0


def read_records(directory: Path) -> Records:
    """Read all records of the run in `directory`, sorted by session and time.

    Lines that are torn, longer than `LONGEST_LINE`, not JSON, or not a record are skipped and counted.

    Raises
    ------
    UserError
        If `directory` is not the directory of a run, or its records cannot be read, or are those of a newer version.
    """
    files = record_files(directory)
    if not files:
        raise UserError(without_records(directory))
    records = Records()
    for path in files:
        try:
            with path.open("rb") as file:
                for line in split(file):
                    record = parse(line, path)
                    if record is not None:
                        records.append(record)
                    elif line.strip():
                        records.skipped += 1
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    records.sort(key=lambda record: (record["session"], record["time"]))
    return records


def record_files(directory: Path) -> list[Path]:
    """Return the files with the records of the run in `directory`, sorted by name."""
    return sorted((directory / "records").glob("*.jsonl"))


def without_records(directory: Path) -> str:
    """Return what is wrong with a `directory` that holds no records."""
    what = "holds no records" if directory.is_dir() else "is not a directory" if directory.exists() else "is missing"
    return (
        f"{directory}: {what}; expected the directory of a run (run.directory of its configuration), "
        "with records/worker-0.jsonl and the like in it"
    )


def next_session(directory: Path) -> int:
    """Return the number of the session that starts now in a run directory: 1 in a new one.

    Called by one rank before the first recorder is made, so that all ranks use the same number.
    """
    last = 0
    for path in (directory / "records").glob("*.jsonl"):
        try:
            with path.open("rb") as file:
                last = max(last, _last_session(_tail(file.fileno())))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return last + 1


def _jsonable(value: Any) -> Any:
    """Return plain JSON values for texts and numbers, finite ones; 9 digits distinguish all float32 values."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(f"{float(value):.9g}") if math.isfinite(value) else None
    assert value is None, f"a report holds numbers and texts, not {value!r}"
    return None


def _tail(descriptor: int) -> bytes:
    """Return the last bytes of a file."""
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, _TAIL, max(0, size - _TAIL))


def _last_session(tail: bytes) -> int:
    """Return the session of the last whole record in `tail`, 0 if there is none."""
    return next(filter(None, map(session_of, reversed(tail.splitlines()))), 0)
