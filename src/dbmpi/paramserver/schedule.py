"""Schedules: the learning rate as a function of the samples that have been learned from, and of staleness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dbmpi.config import OptimizerSection


class Moment(NamedTuple):
    """When a shard applies a push, as it counts."""

    update: int = 1
    """Number of the push since the rule's state was begun, from 1."""
    samples: int = 0
    """Samples behind all pushes that were applied before."""
    pushed: int = 0
    """Samples behind this push."""
    staleness: int = 0
    """Pushes that were applied between the fetch from which this one was computed and now."""


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate at a moment of the run.

    With s samples before a push of p samples, the factor of a warm-up over w samples is ``min(1, (s + p) / w)``: it
    is never 0, and 1 for the push that ends the warm-up.  It is multiplied by one of these, with ``u = max(0, s - w)``
    for the samples after the warm-up, the period d and the factor f::

        constant       1
        step           f ** floor(u / d)
        cosine         f + (1 - f) * (1 + cos(pi * min(1, u / d))) / 2
        inverse_root   sqrt(d / (d + u))

    The cosine is that of Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017,
    equation (5), without restarts.  With d = w the inverse root is that of Vaswani et al., "Attention is all you
    need", NIPS 2017, equation (3): ``sqrt(w / s)``.

    With `by_staleness`, the factor of a push of staleness t is divided by ``max(1, t)``: Zhang, Gupta, Lian, Liu,
    "Staleness-aware async-SGD for distributed deep learning", IJCAI 2016, equation (6).

    Examples
    --------
    >>> halves = Schedule("step", period=1000, factor=0.5)
    >>> [halves(Moment(samples=samples)) for samples in (0, 999, 1000, 2500)]
    [1.0, 1.0, 0.5, 0.25]
    >>> aware = Schedule(by_staleness=True)
    >>> [aware(Moment(staleness=staleness)) for staleness in (0, 1, 2, 4)]
    [1.0, 1.0, 0.5, 0.25]
    """

    kind: str = "constant"
    """One of the above."""
    warmup: float = 0.0
    """Samples over which the rate grows to its full value."""
    period: float = 1.0
    """Samples from one step to the next, of half a cosine, or after which the inverse root is ``sqrt(1/2)``."""
    factor: float = 0.1
    """What a step multiplies the rate by, or what the cosine leaves of it."""
    by_staleness: bool = False
    """Whether stale pushes have a lower rate."""

    @classmethod
    def from_config(cls, section: OptimizerSection, samples: float) -> Schedule:
        """Return the schedule that the ``[optimizer]`` section describes.

        Parameters
        ----------
        section
            The section.
        samples
            Those of an epoch, in which the section counts.
        """
        return cls(
            section.schedule,
            section.warmup_epochs * samples,
            section.period * samples,
            section.decay_factor,
            section.staleness_rate == "inverse",
        )

    def __call__(self, moment: Moment) -> float:
        """Return the factor for the push at that `moment`."""
        rising = min(1.0, (moment.samples + moment.pushed) / self.warmup) if self.warmup else 1.0
        factor = rising * self._decayed(max(0.0, moment.samples - self.warmup) / self.period)
        return factor / max(1, moment.staleness) if self.by_staleness else factor

    def _decayed(self, periods: float) -> float:
        if self.kind == "step":
            return float(self.factor ** math.floor(min(periods, 2.0**53)))
        if self.kind == "cosine":
            return self.factor + (1 - self.factor) * (1 + math.cos(math.pi * min(1.0, periods))) / 2
        if self.kind == "inverse_root":
            return math.sqrt(1 / (1 + periods))
        return 1.0
