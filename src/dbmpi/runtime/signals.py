"""Signals that ask a run to end; only the standard library, so that they are noted from the first moment on."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Notes signals instead of dying, so that the run can end with a checkpoint; a second Ctrl-C is final.

    SIGTERM and Ctrl-C ask for the end, and so does SIGUSR2: Open MPI's mpirun relays that one to its ranks and lets
    them take their time, while after SIGTERM it kills them within a second.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
