"""Times that are drawn at random: how long a step, a message or an update takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dbmpi.config import TimesSection

_BLOCK = 256
"""Times that are drawn at once, because a call of NumPy takes longer than a number."""


class VirtualClock:
    """The virtual time.

    Attributes
    ----------
    seconds
        Since the beginning of the session.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.seconds


class Times:
    """Draws times from a distribution, one for each call.

    With a mean m and a deviation d, they are drawn from the normal distribution of their logarithms with the variance
    ``ln(1 + d^2 / m^2)``; from the gamma distribution of shape ``m^2 / d^2`` and scale ``d^2 / m``; or uniformly from
    ``m - sqrt(3) d`` to ``m + sqrt(3) d``.

    Parameters
    ----------
    section
        The distribution.
    random
        Source of the random numbers, which nothing else draws from.
    """

    def __init__(self, section: TimesSection, random: np.random.Generator) -> None:
        self._section, self._random = section, random
        self._drawn: list[float] = []
        constant = section.distribution == "constant" or section.mean == 0 or section.deviation == 0
        self._constant = section.mean if constant else None

    def __call__(self) -> float:
        """Return another time, in the unit of the section: not negative."""
        if self._constant is not None:
            return self._constant
        if not self._drawn:
            self._drawn = self._draw().tolist()[::-1]
        return self._drawn.pop()

    def _draw(self) -> np.ndarray:
        section, random = self._section, self._random
        mean, deviation = section.mean, section.deviation or 0.0
        match section.distribution:
            case "exponential":
                return random.exponential(mean, _BLOCK)
            case "uniform":
                half = math.sqrt(3) * deviation
                return random.uniform(max(0.0, mean - half), mean + half, _BLOCK)
            case "gamma":
                return random.gamma((mean / deviation) ** 2, deviation**2 / mean, _BLOCK)
            case _:
                variance = math.log1p((deviation / mean) ** 2)
                return random.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), _BLOCK)
