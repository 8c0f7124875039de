"""How many samples a second are learned from, lately."""

from __future__ import annotations

import math


class Rate:
    """A mean over the recent past, in which older samples and the time they took count less and less.

    Time without samples belongs to those that come next: a step that takes many reports counts all of their time.

    Parameters
    ----------
    memory
        Seconds after which something counts 1/e.
    """

    def __init__(self, memory: float = 5.0) -> None:
        self._memory = memory
        self._samples = self._seconds = self._since = 0.0

    def add(self, samples: int, seconds: float) -> None:
        """Count samples that came in the last `seconds`."""
        self._since += seconds
        if samples:
            fade = math.exp(-self._since / self._memory)
            self._samples = fade * self._samples + samples
            self._seconds = fade * self._seconds + self._since
            self._since = 0.0

    @property
    def per_second(self) -> float:
        """Samples a second; 0 before there were any."""
        return self._samples / self._seconds if self._seconds > 0 else 0.0
