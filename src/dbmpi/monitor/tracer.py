"""Single phases of a rank, recorded in short windows: enough for a timeline, and bounded however long a run is."""

from __future__ import annotations

import time

from dbmpi.monitor.records import Recorder
from dbmpi.monitor.reports import TraceReport

MOST_PHASES = 2000
"""Phases of a window; later ones are not recorded."""
_GAP = 1e-5
"""Seconds between two phases of an activity that are recorded as one."""


class Tracer:
    """Records the phases of one rank in windows.

    Windows open 1, 2, 4, 8, ... times `every` seconds after the session has started: on all ranks alike, so that their
    phases can be compared, and few in a long run.  A window contains at least a whole step.

    Parameters
    ----------
    recorder
        Takes the windows, and has the session's clock.
    every
        When the first window opens, in seconds.
    seconds
        Length of a window; 0 for none at all.
    """

    def __init__(self, recorder: Recorder, every: float, seconds: float) -> None:
        self._recorder, self._length = recorder, seconds
        self._due = max(every, 1e-3)
        self._phases: list[tuple[str, float, float]] = []
        self._end = 0.0
        self.open = False
        """Whether phases are recorded now."""

    def add(self, activity: str, begin: float, end: float) -> None:
        """Record a phase.

        Parameters
        ----------
        activity
            What was done.
        begin, end
            By ``time.perf_counter``.
        """
        if self._phases and self._phases[-1][0] == activity and begin - self._phases[-1][2] < _GAP:
            self._phases[-1] = (activity, self._phases[-1][1], end)
        elif len(self._phases) < MOST_PHASES:
            self._phases.append((activity, begin, end))

    def step(self) -> bool:
        """Open or close a window, if it is time; to be called after each step.  Return `open`."""
        if not self._length:
            return False
        elapsed = self._recorder.elapsed
        if self.open:
            if elapsed >= self._end or len(self._phases) >= MOST_PHASES:
                self.close()
        elif elapsed >= self._due:
            self.open, self._end = True, elapsed + self._length
        return self.open

    def close(self) -> None:
        """Write the window that is open, if there is one."""
        if not self.open:
            return
        self.open, phases = False, sorted(self._phases, key=lambda phase: (phase[1], -phase[2]))
        self._phases = []
        elapsed = self._recorder.elapsed
        while self._due <= elapsed:
            self._due *= 2
        if not phases:
            return
        first, names = phases[0][1], list(dict.fromkeys(activity for activity, _, _ in phases))
        numbers = {name: number for number, name in enumerate(names)}
        flat = [
            value
            for activity, begin, end in phases
            for value in (numbers[activity], round(1e6 * (begin - first)), round(1e6 * end) - round(1e6 * begin))
        ]
        begun = max(0.0, elapsed - (time.perf_counter() - first))
        self._recorder.write(TraceReport(round(begun, 6), numbers, flat))
