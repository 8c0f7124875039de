"""Checkpoints of Downpour: begun by the lead while no worker pushes, and written while they go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbmpi.checkpoint.attempts import Attempts
from dbmpi.checkpoint.lead_saver import LeadSaver
from dbmpi.config import CheckpointSection
from dbmpi.errors import DiskFailed
from dbmpi.monitor.records import Recorder
from dbmpi.monitor.reports import CheckpointReport


class LeadCheckpoints:
    """The checkpoints of a run, one after the other.

    Parameters
    ----------
    section
        When they are written.
    saver
        Writes them, together with the shards.
    version
        Of the lead's shard; the state at the start needs no checkpoint.
    recorder
        Writes a report of each.
    warn
        Shows a line to the user.

    Attributes
    ----------
    path
        The last checkpoint written; None before the first one.
    complete
        Whether the last one of the run is written.
    wanted
        Whether one is to be written as soon as possible, because an evaluation is the best so far.
    """

    def __init__(
        self,
        section: CheckpointSection,
        saver: LeadSaver,
        version: int,
        recorder: Recorder,
        warn: Callable[[str], None],
    ) -> None:
        self._saver, self._recorder = saver, recorder
        self._attempts = Attempts(section, section.retry_seconds, warn)
        self._version = self._saved_version = version
        self._event: tuple[Any, ...] = ()
        self._resting: list[float] = []
        """Since when each replica pauses."""
        self._rested = 0.0
        self._last = False
        self.path: Path | None = None
        self.complete = self.wanted = False

    def due(self, version: int) -> bool:
        """Return whether it is time for a checkpoint in the middle of the run, with the lead's shard at a `version`."""
        # Without the last condition, a tiny interval would keep the workers pausing for ever.
        return (self._attempts.due or self.wanted) and not self._saver.busy and version != self._saved_version

    @property
    def may_end(self) -> bool:
        """Whether it is time to try the last checkpoint."""
        return not self._saver.busy and self._attempts.ready_at_the_end

    @property
    def taken(self) -> bool:
        """Whether all shards have taken their vectors, or will not."""
        return self._saver.taken

    def begin(self, write: Callable[[], None], version: int, event: tuple[Any, ...], *, last: bool) -> None:
        """Begin a checkpoint.

        Parameters
        ----------
        write
            Lets all shards begin; a DiskFailed counts as a failed attempt.
        version
            Of the lead's shard.
        event
            Returned by :meth:`finished` when it is written.
        last
            Whether nothing is learned after it.
        """
        self._version, self._event, self._last, self.wanted = version, event, last, False
        try:
            write()
        except DiskFailed as error:
            self._fail(error)

    def poll(self) -> bool:
        """Return whether something moved."""
        return self._saver.poll()

    def rests(self) -> None:
        """Note that another replica pauses from now on."""
        self._resting.append(time.monotonic())

    def go(self) -> None:
        """Note that all of them go on."""
        now, resting, self._resting = time.monotonic(), self._resting, []
        self._rested = sum(now - since for since in resting) / max(len(resting), 1)

    def finished(self) -> tuple[Any, ...] | None:
        """Return the event of a checkpoint that is written by now, once; else None.

        Raises
        ------
        RunFailed
            If it must not be written, or the last one cannot be.
        """
        try:
            path = self._saver.result()
        except DiskFailed as error:
            self._fail(error)
            return None
        if path is None:
            return None
        self._attempts.succeed()
        saver, rested = self._saver, 0.0 if self._last else self._rested
        self._recorder.write(CheckpointReport(path.name, saver.size, saver.seconds, rested, saver.waited))
        self.path, self._saved_version, self.complete = path, self._version, self._last
        return self._event

    def _fail(self, error: DiskFailed) -> None:
        (self._attempts.fail_at_the_end if self._last else self._attempts.fail)(error)
