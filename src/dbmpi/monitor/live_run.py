"""The present state of a run, from its records as they come: memory for each rank, however long the run is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from dbmpi.monitor.display import DisplayState
from dbmpi.monitor.lines import Record

_EVALUATIONS = 4
"""Evaluations that are kept."""
_RECENT = 3.0
"""Reports of a rank after which one that has written none counts no more in the rate of the run."""


class TimeSeries:
    """The mean of a quantity over time, in at most twice as many bins as are asked for; the order does not matter.

    Parameters
    ----------
    bins
        How many are wanted at least, once there is enough time for them.
    """

    def __init__(self, bins: int = 60) -> None:
        self._bins, self._width = bins, 0.125
        self._sums: dict[int, tuple[float, float]] = {}

    def add(self, seconds: float, value: float, weight: float) -> None:
        """Add a value.

        Parameters
        ----------
        seconds
            When it was.
        value, weight
            What it was, and how much it counts: more than 0.
        """
        number = int(min(max(seconds, 0.0), 1e12) / self._width)
        while number >= 2 * self._bins:
            self._widen()
            number //= 2
        total, weights = self._sums.get(number, (0.0, 0.0))
        self._sums[number] = (total + weight * value, weights + weight)

    def means(self) -> list[float]:
        """Return the mean of each bin, from the first to the last that has one; an empty one has that before it."""
        means: list[float] = []
        for number in range(min(self._sums, default=0), max(self._sums, default=-1) + 1):
            total, weights = self._sums.get(number, (0.0, 0.0))
            means.append(total / weights if weights > 0 else means[-1])
        return means

    def _widen(self) -> None:
        wider: dict[int, tuple[float, float]] = {}
        for number, (total, weight) in self._sums.items():
            before, weights = wider.get(number // 2, (0.0, 0.0))
            wider[number // 2] = (before + total, weights + weight)
        self._sums, self._width = wider, 2 * self._width


class LiveRun:
    """The state of the last session of a run.

    Attributes
    ----------
    session
        Its number; 0 before there is one.
    start
        What it began with, if the records say so.
    workers, shards
        The last report of each, by number.
    evaluations
        The last ones, of all sessions.
    best
        The evaluation with the highest accuracy, or else the lowest loss.
    checkpoint
        The last one.
    batch
        The last pass of Sandblaster.
    lost
        Replicas that have died.
    rescued
        Shards that have died, and were saved from their mirrors.
    loss, rate
        Over the time of the session: the training loss, and the samples per second of a replica.
    """

    def __init__(self) -> None:
        self.evaluations: deque[Record] = deque(maxlen=_EVALUATIONS)
        self.best: Record | None = None
        self.checkpoint: Record | None = None
        self._begin(0)

    def _begin(self, session: int) -> None:
        self.session = session
        self.start: Record | None = None
        self.workers: dict[int, Record] = {}
        self.shards: dict[int, Record] = {}
        self.batch: Record | None = None
        self.lost: set[int] = set()
        self.rescued: set[int] = set()
        self.loss, self.rate = TimeSeries(), TimeSeries()
        self.elapsed = 0.0
        self._began = math.inf

    def add(self, records: Iterable[Record]) -> list[Record]:
        """Take new records; return those that tell more than progress, such as evaluations, checkpoints and losses.

        Parameters
        ----------
        records
            Those of a rank in their order; those of different ranks in any.
        """
        changes = []
        for record in records:
            if record["kind"] == "evaluation":
                self._evaluated(record)
            if record["session"] > self.session:
                self._begin(record["session"])
            if record["session"] == self.session:
                self.elapsed = max(self.elapsed, float(record["elapsed"]))
                self._take(record)
            if record["kind"] in ("evaluation", "checkpoint", "loss", "rescue", "start", "end"):
                changes.append(record)
        return changes

    def _take(self, record: Record) -> None:
        kind, number = record["kind"], record["number"]
        if kind == "worker":
            self.workers[number] = record
            spent = sum(value or 0.0 for value in record["seconds"].values())
            self._began = min(self._began, record["elapsed"] - spent)
            if record["partition"] == 0:
                rate = record["samples_per_second"] or 0.0
                self.rate.add(record["elapsed"], rate, 1.0)
                if record["loss"] is not None:
                    self.loss.add(record["elapsed"], record["loss"], max(rate, 1e-9))
        elif kind == "shard":
            self.shards[number] = record
        elif kind == "batch":
            self.batch = record
            self.lost |= set(record["lost"])
        elif kind == "loss" and record["role"] == "replica":
            self.lost.add(record["lost"])
        elif kind == "rescue":
            self.rescued.add(record["shard"])
        elif kind == "checkpoint":
            self.checkpoint = record
        elif kind == "start":
            self.start = record

    def _evaluated(self, record: Record) -> None:
        # A tail of several files, and the sessions in them, may come in another order.
        if record["loss"] is None:
            return
        self.evaluations.append(record)
        if self.best is None or _better(record, self.best):
            self.best = record

    @property
    def replicas(self) -> dict[int, Record]:
        """The last report of each replica, by its number: that of its first partition."""
        return {
            number if report["replica"] is None else report["replica"]: report
            for number, report in self.workers.items()
            if report["partition"] == 0
        }

    @property
    def samples(self) -> int:
        """Training samples of this session and those before it, as far as is known."""
        before = 0 if self.start is None else self.start["samples_before"]
        return int(before + sum(report["samples"] for report in self.replicas.values()))

    @property
    def steps(self) -> int:
        """Mini-batches of all replicas, those of earlier sessions included."""
        reports = self.replicas.values()
        before = next((report["steps_before"] or 0 for report in reports), 0)
        return int(before + sum(report["step"] for report in reports))

    @property
    def samples_per_second(self) -> float:
        """Of all replicas that have reported lately, together."""
        reports = self.replicas.values()
        latest = max((report["elapsed"] for report in reports), default=0.0)
        usual = [sum(value or 0.0 for value in report["seconds"].values()) for report in reports]
        patience = max(5.0, _RECENT * max(usual, default=0.0))
        recent = (report for report in reports if latest - report["elapsed"] <= patience)
        return sum(report["samples_per_second"] or 0.0 for report in recent)

    @property
    def mean_rate(self) -> float:
        """Samples per second of all replicas together, over the whole session."""
        samples = sum(report["samples"] for report in self.replicas.values())
        seconds = max((report["elapsed"] for report in self.workers.values()), default=0.0) - self._began
        return samples / seconds if seconds > 0 else 0.0

    @property
    def staleness(self) -> float | None:
        """Mean of the pushes in the last reports of all shards."""
        means = [report["staleness"].get("mean") for report in self.shards.values()]
        known = [mean for mean in means if mean is not None]
        return sum(known) / len(known) if known else None

    @property
    def epochs(self) -> float:
        """Passes through the training samples so far, all sessions and replicas together."""
        if self.batch is not None:
            return float(self.batch["epoch"] or 0.0)
        if self.start is not None and self.start["samples"] > 0:
            return float(self.samples / self.start["samples"])
        per_epoch = next((report["steps_per_epoch"] for report in self.workers.values()), None)
        return self.steps / per_epoch if per_epoch else 0.0

    @property
    def total_epochs(self) -> float | None:
        """After how many the run is complete, if the records say so."""
        return None if self.start is None else self.start["epochs"]

    @property
    def complete(self) -> bool:
        """Whether the run has learned from all samples that it was to learn from."""
        # The last reports may lack samples that count no more, such as those of a replica that has died.
        return self.total_epochs is not None and self.epochs >= 0.999 * self.total_epochs

    def display(self, *, working: bool = True) -> DisplayState:
        """Return the state as the run's own progress shows it.

        Parameters
        ----------
        working
            Whether the run is still at work; otherwise its rate is that of the whole session.
        """
        reports = [report for report in self.replicas.values() if report["loss"] is not None]
        loss = sum(report["loss"] for report in reports) / len(reports) if reports else math.nan
        known = [report["accuracy"] for report in reports if report["accuracy"] is not None]
        if self.batch is not None and self.batch["loss"] is not None:
            loss, known = self.batch["loss"], [one for one in (self.batch["accuracy"],) if one is not None]
        total, samples = self.total_epochs, 0
        if total is not None and self.start is not None:
            samples = self.start["samples"]
        return DisplayState(
            total=round(samples * (total or 0.0)),
            epochs=total,
            samples=round(samples * self.epochs),
            loss=loss,
            accuracy=sum(known) / len(known) if known else None,
            rate=self.samples_per_second if working else self.mean_rate,
            staleness=self.staleness,
            elapsed=self.elapsed,
        )


def _better(one: Record, other: Record) -> bool:
    if one["accuracy"] is not None and other["accuracy"] is not None:
        return bool(one["accuracy"] > other["accuracy"])
    return bool(one["loss"] < other["loss"])
