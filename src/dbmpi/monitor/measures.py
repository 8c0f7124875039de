"""What a rank measures of itself: how stale the pushes were, where the time went, how fast it learns."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence


class StalenessHistogram:
    """Exact counts of how stale the applied pushes were, in versions."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts)
        """Number of pushes by staleness."""

    @classmethod
    def from_json(cls, counts: Mapping[str, int]) -> StalenessHistogram:
        """Return the histogram of a record's ``staleness_histogram``.

        Parameters
        ----------
        counts
            Number of pushes by staleness; the keys are text in JSON.
        """
        return cls({int(staleness): count for staleness, count in counts.items()})

    def add(self, staleness: int, count: int = 1) -> None:
        """Count `count` pushes of one staleness."""
        assert staleness >= 0, f"a push was applied {-staleness} versions before the one it was computed from"
        self.counts[staleness] += count

    def merge(self, other: StalenessHistogram) -> None:
        """Add the counts of another histogram, e.g. of another shard.

        Parameters
        ----------
        other
            It stays as it is.
        """
        self.counts.update(other.counts)

    def clear(self) -> None:
        """Forget all counts."""
        self.counts.clear()

    @property
    def total(self) -> int:
        """Number of pushes counted."""
        return self.counts.total()

    @property
    def mean(self) -> float:
        """Mean staleness; NaN of no pushes."""
        total = self.total
        return sum(staleness * count for staleness, count in self.counts.items()) / total if total else math.nan

    @property
    def max(self) -> int:
        """Largest staleness; 0 of no pushes."""
        return max(+self.counts, default=0)

    def quantile(self, q: float) -> int:
        """Return the smallest staleness that at least a fraction `q` of the pushes did not exceed; 0 of no pushes."""
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is a fraction from 0 to 1, got {q}")
        needed, seen = max(1.0, q * self.total), 0
        for staleness in sorted(+self.counts):
            seen += self.counts[staleness]
            if seen >= needed:
                return staleness
        return 0

    def summary(self) -> dict[str, float]:
        """Return ``p50, p90, max, mean`` as a shard reports them; all NaN of no pushes."""
        if not self.total:
            return dict.fromkeys(("p50", "p90", "max", "mean"), math.nan)
        return {"p50": self.quantile(0.5), "p90": self.quantile(0.9), "max": self.max, "mean": self.mean}


class Stopwatch:
    """Seconds by activity: ``with watch("push"): ...``.

    Only one activity runs at a time.  An activity within another stops the outer one's clock, so that the seconds
    add up to time that has passed once: the waiting inside a push counts as waiting.  For one thread.

    Attributes
    ----------
    on_phase
        Called with each phase that ends or is interrupted: its activity, and its begin and end by
        ``time.perf_counter``; None: nothing is called.
    """

    def __init__(self) -> None:
        self.on_phase: Callable[[str, float, float], None] | None = None
        self._seconds: dict[str, float] = {}
        self._activities: dict[str, _Activity] = {}
        self._running: list[str] = []
        self._since = 0.0

    def __call__(self, activity: str) -> _Activity:
        """Return the context in which time counts for `activity`."""
        context = self._activities.get(activity)
        if context is None:
            context = self._activities[activity] = _Activity(self, activity)
            self._seconds.setdefault(activity, 0.0)
        return context

    @property
    def activity(self) -> str:
        """The activity that runs now; empty where none does.  Other threads may ask, too."""
        return next(iter(self._running[-1:]), "")

    def take(self, activities: Iterable[str] | None = None) -> dict[str, float]:
        """Return the seconds of these activities, or of all so far, and let them count from zero again."""
        if self._running:
            now = time.perf_counter()
            self._pass(self._running[-1], now)
            self._since = now
        taken = {}
        for activity in list(self._seconds) if activities is None else activities:
            taken[activity] = self._seconds.get(activity, 0.0)
            self._seconds[activity] = 0.0
        return taken

    def _pass(self, activity: str, now: float) -> None:
        """Count the time since the last change."""
        self._seconds[activity] += now - self._since
        if self.on_phase is not None:
            self.on_phase(activity, self._since, now)


class _Activity:
    """The context manager of one activity; made once, for entering it is done several times a step."""

    __slots__ = ("_activity", "_watch")

    def __init__(self, watch: Stopwatch, activity: str) -> None:
        self._watch, self._activity = watch, activity

    def __enter__(self) -> None:
        watch = self._watch
        now = time.perf_counter()
        if watch._running:
            watch._pass(watch._running[-1], now)
        watch._running.append(self._activity)
        watch._since = now

    def __exit__(self, *exception: object) -> None:
        watch = self._watch
        now = time.perf_counter()
        watch._pass(watch._running.pop(), now)
        watch._since = now


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


class LayerTimes:
    """How long each layer took in each phase since the last report."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}

    def take(self, so_far: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return the time since the last call, e.g. of ``forward 1``; phases and layers without any are left out.

        Parameters
        ----------
        so_far
            Seconds by phase, for each layer, since the beginning.
        """
        total = {f"{phase} {number}": taken for phase, each in so_far.items() for number, taken in enumerate(each, 1)}
        since = {name: taken - self._before.get(name, 0.0) for name, taken in total.items()}
        self._before = total
        return {name: taken for name, taken in since.items() if taken > 0}


def set_exchange_apart(seconds: dict[str, float], layers: Mapping[str, float]) -> None:
    """Of the time to compute, count as ``exchange`` what partitions of a replica spent on that, and on waiting.

    Parameters
    ----------
    seconds
        By activity; changed in place.
    layers
        By phase and layer, as :meth:`LayerTimes.take` returns them.
    """
    exchange = sum(taken for name, taken in layers.items() if name.startswith("exchange"))
    seconds["exchange"] = min(exchange, seconds["compute"])
    seconds["compute"] -= seconds["exchange"]
