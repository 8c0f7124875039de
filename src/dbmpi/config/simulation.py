"""The section ``[simulation]``: how long everything takes in virtual time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from dbmpi.config.values import NotNegative, Section

if TYPE_CHECKING:
    from dbmpi.config.sections import Run


class TimesSection(Section):
    """A distribution of times; it is never negative."""

    distribution: Literal["constant", "exponential", "uniform", "gamma", "lognormal", "normal"] = "constant"
    """``constant``: always the mean; ``normal``, which can be negative, is refused with the numbers of others that have
    its mean and deviation."""
    mean: NotNegative = 0.0
    """Mean, in seconds."""
    deviation: NotNegative | None = None
    """Standard deviation, in seconds: of ``uniform`` at most the mean divided by the root of 3; that of ``constant`` is
    0, and that of ``exponential`` the mean."""

    @model_validator(mode="after")
    def _is_never_negative(self) -> TimesSection:
        kind, mean, deviation = self.distribution, self.mean, self.deviation
        own = {"constant": 0.0, "exponential": mean}.get(kind)
        if own is not None:
            if deviation not in (None, own):
                raise ValueError(
                    f"a time that is {kind} with a mean of {mean:g} s has a deviation of {own:g} s, not {deviation:g}: "
                    "leave deviation out, or set distribution = 'gamma'"
                )
            return self
        if deviation is None or (mean == 0 < deviation):
            raise ValueError(
                f"distribution = {kind!r} needs a mean and a deviation (given: mean = {mean:g}): set e.g. mean = "
                f"{mean or 0.1:g}, deviation = {(mean or 0.1) / 4:g}"
            )
        would_do = f"distribution = 'gamma' or 'lognormal' with mean = {mean:g}, deviation = {deviation:g}"
        if kind == "normal" and deviation:
            raise ValueError(
                f"a normal distribution with mean = {mean:g}, deviation = {deviation:g} can be negative, and a time "
                f"cannot: set {would_do}"
            )
        most = mean / math.sqrt(3)
        if kind == "uniform" and deviation > most:
            low, high = mean - math.sqrt(3) * deviation, mean + math.sqrt(3) * deviation
            raise ValueError(
                f"a uniform distribution with mean = {mean:g}, deviation = {deviation:g} is from {low:.3g} to "
                f"{high:.3g} s and can be negative, and a time cannot: set deviation to {_floor(most)} or less, or "
                f"{would_do}"
            )
        return self

    def __str__(self) -> str:
        if self.distribution == "constant" or self.deviation == 0:
            return f"{self.mean:g}"
        of = "" if self.deviation is None else f", deviation {self.deviation:g}"
        return f"{self.distribution}, mean {self.mean:g}{of}"


class SimulationSection(Section):
    """Times of a run in virtual time, ``dbmpi simulate``; runs in real time have their own.

    The numbers of replicas and shards are those of ``[topology]``.
    """

    compute: TimesSection = TimesSection(distribution="lognormal", mean=0.1, deviation=0.02)
    """What a replica computes in one step: loss and gradient of a batch."""
    network: TimesSection = TimesSection()
    """A message between a replica and a shard: one way of a gradient, or parameters on their way back."""
    service: TimesSection = TimesSection()
    """What a shard takes for one push; others wait in line meanwhile."""
    slowness: TimesSection = TimesSection(mean=1.0)
    """Drawn once for each replica: a factor of all its times to compute.  Its mean and deviation are plain numbers."""

    @model_validator(mode="after")
    def _time_passes(self) -> SimulationSection:
        for name in ("compute", "slowness"):
            if getattr(self, name).mean == 0:
                raise ValueError(
                    f"simulation.{name}.mean = 0: no time would pass, and any number of steps would fit into it; set "
                    f"simulation.{name}.mean above 0"
                )
        return self


def mistakes(run: Run) -> Iterator[str]:
    """Yield the messages about settings of a `run` that virtual time does not have."""
    server, topology = run.server, run.topology
    if run.optimizer.method != "downpour":
        yield (
            f'optimizer.method = "{run.optimizer.method}": only Downpour is simulated, as a batch method does not '
            'depend on when gradients come: set optimizer.method = "downpour"'
        )
    if run.optimizer.exchange != "asynchronous":
        yield (
            f'optimizer.exchange = "{run.optimizer.exchange}": virtual replicas push gradients without waiting for '
            'each other: set optimizer.exchange = "asynchronous"'
        )
    if server.overlap != "none":
        yield (
            f'server.overlap = "{server.overlap}": a virtual replica fetches, computes and pushes in turn: set '
            'server.overlap = "none"'
        )
    if server.fetch != "copied":
        yield (
            f'server.fetch = "{server.fetch}": a virtual replica computes on what it has fetched, and not on memory '
            'that changes meanwhile: set server.fetch = "copied"'
        )
    if server.wire != "float32":
        yield (
            f'server.wire = "{server.wire}": between virtual replicas and shards nothing travels that could be '
            'rounded: set server.wire = "float32"'
        )
    if server.gradients != "whole":
        yield (
            f'server.gradients = "{server.gradients}": a virtual replica pushes all of a gradient at once: set '
            'server.gradients = "whole"'
        )
    if topology.spares:
        yield f"topology.spares = {topology.spares}: no virtual replica dies, so that none is needed: set it to 0"
    if topology.evaluators:
        yield (
            f"topology.evaluators = {topology.evaluators}: an evaluation takes no virtual time, so that none is "
            "needed: set it to 0"
        )
    if run.optimizer.warmstart_loss is not None or run.optimizer.release_samples:
        yield (
            "optimizer.warmstart_loss and release_samples: virtual replicas are released all at once, after a given "
            "number of steps or samples: set optimizer.warmstart or warmstart_samples, and leave these out"
        )


def _floor(number: float) -> str:
    """Return a number rounded down to three digits."""
    step = 10.0 ** (math.floor(math.log10(number)) - 2) if number > 0 else 1.0
    return f"{math.floor(number / step) * step:.3g}"
