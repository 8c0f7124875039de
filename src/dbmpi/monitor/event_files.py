"""The records of a run as event files of TensorBoard, written by tensorboardX, which needs no TensorFlow."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dbmpi.errors import UserError
from dbmpi.monitor.lines import Record
from dbmpi.monitor.live_run import LiveRun

SUFFIX = ".dbmpi"
"""Of the event files."""
_LONGEST_NAME = 100


class EventFiles:
    """Writes records as scalars over the steps of all replicas; a context manager.

    A resumed session begins a file of its own, with which TensorBoard leaves out what the session repeats.

    Parameters
    ----------
    directory
        Where the files go; made if missing.

    Raises
    ------
    UserError
        If tensorboardX is not installed, or the directory cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "event files for TensorBoard need tensorboardX, which is not installed in this environment: pip "
                "install 'dbmpi[tensorboard]'"
            ) from None
        self._make = SummaryWriter
        self._directory = directory
        self._live = LiveRun()
        self._writer: Any = None
        self.written = 0
        """Scalars so far."""

    def add(self, records: Iterable[Record]) -> None:
        """Write records, sorted by their time here.

        Parameters
        ----------
        records
            New ones; those of sessions before the last one are left out.
        """
        for record in sorted(records, key=lambda each: (each["session"], each["time"])):
            if record["session"] < self._live.session:
                continue
            begins = record["session"] > self._live.session
            self._live.add([record])
            if begins:
                self._begin(record)
            self._write(record)

    def flush(self) -> None:
        """Let everything be seen by others."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> EventFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self, record: Record) -> None:
        self.close()
        step = record["steps_before"] or 0
        # Files are read in the order of their names; those of the same second must not be the same file.
        suffix = f".{record['session']:06d}.{secrets.token_hex(4)}{SUFFIX}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._writer = self._make(str(self._directory.resolve()), filename_suffix=suffix, purge_step=step or None)
        except OSError as error:
            raise UserError(f"{self._directory}: cannot write event files there: {error.strerror}") from None

    def _write(self, record: Record) -> None:
        live, kind = self._live, record["kind"]
        if kind == "worker" and record["partition"] == 0:
            self._scalars(
                record,
                live.steps,
                {
                    "train/loss": record["loss"],
                    "train/accuracy": record["accuracy"],
                    "train/samples_per_second": live.samples_per_second,
                    "train/epoch": live.epochs,
                    **_shares("worker", record),
                },
            )
        elif kind == "shard":
            values = {"shard/staleness": record["staleness"].get("mean"), "shard/queue": record["queue"]}
            self._scalars(record, live.steps, values | _shares("shard", record))
        elif kind == "evaluation":
            metrics = {f"test/{name}": value for name, value in (record["metrics"] or {}).items()}
            step = (record["steps_before"] or 0) + record["step"]
            self._scalars(record, step, metrics | {"test/loss": record["loss"], "test/accuracy": record["accuracy"]})
        elif kind == "batch":
            self._scalars(record, live.steps, {"batch/loss": record["loss"], "batch/seconds": record["seconds"]})
        elif kind == "checkpoint":
            self._scalars(record, live.steps, {"checkpoint/seconds": record["seconds"]})
        elif kind == "start" and record["configuration"]:
            self._writer.add_text("configuration", _indented(record["configuration"]), live.steps, record["time"])

    def _scalars(self, record: Record, step: int, values: dict[str, float | None]) -> None:
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag[:_LONGEST_NAME], value, step, record["time"])
                self.written += 1


def _shares(role: str, record: Record) -> dict[str, float | None]:
    """Return which share of a rank's time each activity took."""
    known = {name: value for name, value in record["seconds"].items() if value is not None}
    total = sum(known.values())
    return {f"time of {role}s/{name}": value / total for name, value in known.items()} if total > 0 else {}


def _indented(text: str) -> str:
    """Return a configuration as a block of code, as it is shown without being interpreted."""
    with suppress(ValueError, RecursionError):
        text = json.dumps(json.loads(text), indent=2)
    return "\n".join(f"    {line}" for line in text.splitlines())
