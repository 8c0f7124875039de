"""What the records of a run say: its sessions put one behind the other, and its results in a few numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dbmpi.monitor.measures import StalenessHistogram
from dbmpi.monitor.records import Record, read_records


@dataclass(frozen=True)
class Summary:
    """The results of a run, over all its sessions; NaN or None where nothing was recorded."""

    test_accuracy: float | None
    """Fraction of the held-out samples classified correctly at the last evaluation, 0 to 1."""
    test_loss: float | None
    """Loss at the last evaluation."""
    train_loss: float
    """Loss of the last report of each replica, averaged."""
    samples_per_second: float
    """Training samples of all replicas over `seconds`."""
    mean_staleness: float
    """Over all pushes to all shards."""
    seconds: float
    """Time spent training, from the first step to the last report; the time between two sessions is left out."""
    steps: int
    """Mini-batches of all replicas, those included that a later session took again."""
    samples: int
    """Training samples of those mini-batches."""
    epochs: float
    """Passes through the training samples."""
    sessions: int
    """How often the run was started."""


def summary(directory: Path) -> Summary:
    """Return the results of the run in `directory`, from its records.

    Raises
    ------
    UserError
        If there are no records, see :func:`dbmpi.monitor.records.read_records`.
    """
    return History(read_records(directory)).summary()


class History:
    """The records of a run, sorted by who wrote them, on one clock that stands still between two sessions.

    Parameters
    ----------
    records
        As :func:`dbmpi.monitor.records.read_records` returns them.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.workers: dict[int, list[Record]] = {}
        """Reports of each worker by its number."""
        self.shards: dict[int, list[Record]] = {}
        """Reports of each shard by its number."""
        self.evaluations: list[Record] = []
        """Evaluations, in the order of time."""
        self._ends: dict[int, float] = defaultdict(float)
        for record in records:
            session = record["session"]
            self._ends[session] = max(self._ends[session], record["elapsed"])
            if record["kind"] == "evaluation":
                self.evaluations.append(record)
            else:
                role = self.workers if record["kind"] == "worker" else self.shards
                role.setdefault(record["number"], []).append(record)
        self.workers, self.shards = dict(sorted(self.workers.items())), dict(sorted(self.shards.items()))
        self.sessions = sorted(self._ends)
        """Numbers of the sessions."""

    @cached_property
    def starts(self) -> dict[int, float]:
        """When each session starts, in seconds of the run: at the end of the one before."""
        starts, end = {}, 0.0
        for session in self.sessions:
            starts[session] = end
            end += self._ends[session]
        return starts

    @property
    def duration(self) -> float:
        """Seconds of all sessions together."""
        return sum(self._ends.values())

    def seconds(self, record: Record) -> float:
        """Return when a record was written, in seconds of the run."""
        return self.starts[record["session"]] + float(record["elapsed"])

    @property
    def replicas(self) -> dict[int, list[Record]]:
        """The reports that speak for each replica: those of its partition 0."""
        replicas: dict[int, list[Record]] = {}
        for number, reports in self.workers.items():
            for report in reports:
                if report["partition"] == 0:
                    replica = number if report["replica"] is None else report["replica"]
                    replicas.setdefault(replica, []).append(report)
        return dict(sorted(replicas.items()))

    @cached_property
    def rollbacks(self) -> dict[int, float]:
        """Up to which epoch each session's work was kept: where the next session that trained began again."""
        kept, limit = {}, math.inf
        for session in reversed(self.sessions):
            kept[session] = limit
            epochs = [
                report["epoch"]
                for reports in self.replicas.values()
                for report in reports
                if report["session"] == session and report["epoch"] is not None
            ]
            limit = min([limit, *epochs])
        return kept

    def kept(self, record: Record) -> bool:
        """Whether what a record speaks of is part of the result, and was not taken again by a later session."""
        epoch = record["epoch"]
        return epoch is not None and epoch < self.rollbacks[record["session"]]

    @cached_property
    def steps_per_epoch(self) -> float:
        """Mini-batches of all replicas together in one epoch, as far as the last session shows it; 0 if it does not."""
        steps = 0.0
        for reports in self.replicas.values():
            own = [
                report for report in reports if report["session"] == self.sessions[-1] and report["epoch"] is not None
            ]
            if own and own[-1]["epoch"] > own[0]["epoch"]:
                steps += (own[-1]["step"] - own[0]["step"]) / (own[-1]["epoch"] - own[0]["epoch"])
        return steps

    @property
    def staleness(self) -> StalenessHistogram:
        """Staleness of all pushes to all shards."""
        histogram = StalenessHistogram()
        for reports in self.shards.values():
            for report in reports:
                histogram.merge(StalenessHistogram.from_json(report["staleness_histogram"]))
        return histogram

    def summary(self) -> Summary:
        """Return the results of the run."""
        steps = samples = 0
        epoch = 0.0
        losses = []
        spans: dict[int, tuple[float, float]] = {}
        for reports in self.replicas.values():
            for session, own in _by_session(reports).items():
                first, last = own[0], own[-1]
                steps += last["step"]
                samples += last["samples"]
                begin, end = spans.get(session, (math.inf, 0.0))
                spans[session] = min(begin, first["elapsed"] - _interval(first)), max(end, last["elapsed"])
            epoch = max([epoch, *(report["epoch"] or 0.0 for report in reports if self.kept(report))])
            if reports[-1]["loss"] is not None and reports[-1]["session"] == self.sessions[-1]:
                losses.append(reports[-1]["loss"])
        seconds = sum(end - begin for begin, end in spans.values())
        last_evaluation = self.evaluations[-1] if self.evaluations else {}
        return Summary(
            test_accuracy=last_evaluation.get("accuracy"),
            test_loss=last_evaluation.get("loss"),
            train_loss=sum(losses) / len(losses) if losses else math.nan,
            samples_per_second=samples / seconds if seconds > 0 else math.nan,
            mean_staleness=self.staleness.mean,
            seconds=seconds,
            steps=steps,
            samples=samples,
            epochs=epoch,
            sessions=len(self.sessions),
        )


def _by_session(reports: Iterable[Record]) -> dict[int, list[Record]]:
    """Return reports by their session, in order."""
    sessions: dict[int, list[Record]] = {}
    for report in reports:
        sessions.setdefault(report["session"], []).append(report)
    return sessions


def _interval(first: Record) -> float:
    """Return the seconds that a worker's first report of a session is about, from the samples it counts."""
    rate = first["samples_per_second"]
    return min(float(first["samples"] / rate), float(first["elapsed"])) if rate else 0.0
