"""Whether a run is at work in a directory, as a bystander that writes nothing there sees it."""

from __future__ import annotations

import time
from pathlib import Path

from dbmpi.checkpoint.run_lock import LEASE, lock_file, lock_numbers, read_lock
from dbmpi.machine import processes


class RunPresence:
    """Looks at the lock of a run directory again and again.

    Parameters
    ----------
    directory
        The run directory; it need not be there yet.
    lease
        Seconds after which a run on another host counts as gone, if its lock has not been renewed meanwhile.
    """

    def __init__(self, directory: Path, *, lease: float = LEASE) -> None:
        self._directory, self._lease = directory, lease
        self._renewed = ("", "")
        self._since = time.monotonic()

    def look(self) -> bool:
        """Return whether a run is at work there; one of another host counts as such until its lease has run out."""
        try:
            number = max(lock_numbers(self._directory), default=0)
            holder = read_lock(lock_file(self._directory, number)) if number else None
        except OSError:
            return False
        if holder is None or holder["released"]:
            return False
        if holder["system"] == processes.system():
            return processes.lives(holder["process"], holder["started"])
        renewed = (holder["token"], holder["renewals"])
        if renewed != self._renewed:
            self._renewed, self._since = renewed, time.monotonic()
        return time.monotonic() - self._since < self._lease
