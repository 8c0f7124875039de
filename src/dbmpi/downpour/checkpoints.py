"""Checkpoints of Downpour: begun by the lead while no worker pushes, and written while they go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbmpi.checkpoint.account import Account
from dbmpi.checkpoint.attempts import Attempts
from dbmpi.checkpoint.lead_saver import LeadSaver
from dbmpi.checkpoint.schema import CheckpointInfo
from dbmpi.config import CheckpointSection
from dbmpi.errors import DiskFailed
from dbmpi.monitor.records import CheckpointReport, Recorder
from dbmpi.replica.own_state import OwnState


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """Where and how the lead writes checkpoints."""

    section: CheckpointSection
    """When, and how many are kept."""
    saver: LeadSaver
    """Writes them, together with the shards."""
    info: Callable[..., CheckpointInfo]
    """Describes a checkpoint: :class:`CheckpointInfo` with everything that is the same in all of a run's."""
    account: Account
    """What they say beside the position."""
    state: OwnState | None = None
    """What an objective of the user's own has beside its parameters."""


class LeadCheckpoints:
    """The checkpoints of a run, one after the other.

    Parameters
    ----------
    plan
        Where and how they are written.
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
    """

    def __init__(self, plan: CheckpointPlan, version: int, recorder: Recorder, warn: Callable[[str], None]) -> None:
        self._saver, self._recorder = plan.saver, recorder
        self._attempts = Attempts(plan.section, plan.section.retry_seconds, warn)
        self._version = self._saved_version = version
        self._event: tuple[Any, ...] = ()
        self._resting: list[float] = []
        """Since when each replica pauses."""
        self._rested = 0.0
        self._last = False
        self.path: Path | None = None
        self.complete = False

    def due(self, version: int) -> bool:
        """Return whether it is time for a checkpoint in the middle of the run, with the lead's shard at a `version`."""
        # Without the last condition, a tiny interval would keep the workers pausing for ever.
        return self._attempts.due and not self._saver.busy and version != self._saved_version

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
        self._version, self._event, self._last = version, event, last
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
