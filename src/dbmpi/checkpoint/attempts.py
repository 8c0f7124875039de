"""When checkpoints are due, and the retries where the disk does not take one, of which the user hears once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dbmpi.errors import RunFailed

if TYPE_CHECKING:
    from dbmpi.config import CheckpointSection
    from dbmpi.errors import DiskFailed

_SOONER = 30.0
"""Seconds after which a checkpoint in the middle of a run is tried again, unless the next one is due before."""
_FIRST, _LONGEST = 1.0, 15.0
"""Seconds before the last checkpoint is tried again: the first time, and at most; each time twice as long."""


class Attempts:
    """Counts the attempts to write checkpoints on the lead's rank.

    A disk that is full for a while costs nothing but checkpoints in the middle of a run.  The last one is tried for
    `patience` seconds, because everything learned since the one before would be lost with it.

    Parameters
    ----------
    section
        Says when checkpoints are due.
    patience
        Seconds for which the last checkpoint is tried.
    warn
        Shows a line to the user.
    clock
        Seconds, for tests.
    """

    def __init__(
        self,
        section: CheckpointSection,
        patience: float,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every, self._patience, self._warn, self._clock = section.every_seconds, patience, warn, clock
        self._next = clock() + self._every
        self._gives_up: float | None = None
        """When the last checkpoint is given up, once it has failed."""
        self.failed = 0
        """Attempts that have failed since the last checkpoint."""

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint in the middle of the run."""
        return self._every > 0 and self._clock() >= self._next

    @property
    def ready_at_the_end(self) -> bool:
        """Whether it is time to try the last checkpoint, the first time or again."""
        return self._gives_up is None or self._clock() >= self._next

    def succeed(self) -> None:
        """Note a checkpoint that is written."""
        if self.failed:
            times = "attempt" if self.failed == 1 else "attempts"
            self._warn(f"a checkpoint is written again, after {self.failed} failed {times}")
        self.failed, self._next, self._gives_up = 0, self._clock() + self._every, None

    def fail(self, error: DiskFailed) -> None:
        """Note the `error` of a checkpoint in the middle of the run, which continues."""
        self.failed += 1
        wait = min(self._every, _SOONER)
        self._next = self._clock() + wait
        if self.failed == 1:
            self._warn(
                f"{error}; the run goes on without a new checkpoint, and tries again every {wait:g} s until one is "
                "written"
            )

    def fail_at_the_end(self, error: DiskFailed) -> None:
        """Note the `error` of the last checkpoint.

        Raises
        ------
        RunFailed
            If it has been tried for long enough.
        """
        now = self._clock()
        first = self._gives_up is None
        self._gives_up = now + self._patience if self._gives_up is None else self._gives_up
        if now >= self._gives_up:
            raise RunFailed(f"the last checkpoint was given up after {self._patience:g} s: {error}") from error
        self.failed = 1 if first else self.failed + 1
        self._next = min(now + min(_FIRST * 2 ** (self.failed - 1), _LONGEST), self._gives_up)
        left = self._gives_up - now
        if first:
            self._warn(
                f"{error}; what has been learned since would be lost, so the last checkpoint is tried again for "
                f"{left:.0f} s (checkpoint.retry_seconds)"
            )
        else:
            self._warn(f"the last checkpoint still cannot be written; it is tried for another {left:.0f} s")
