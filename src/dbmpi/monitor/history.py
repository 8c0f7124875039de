"""The history of a run from its records: its sessions one after another, and its results in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from dbmpi.monitor.lines import Record
from dbmpi.monitor.measures import StalenessHistogram
from dbmpi.monitor.records import read_records


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
    """Time spent training, from the first step to the last report; without the time between two sessions."""
    steps: int
    """Mini-batches of all replicas, including those that a later session repeated."""
    samples: int
    """Training samples of those mini-batches."""
    epochs: float
    """Passes through the training samples, all replicas together."""
    sessions: int
    """How often the run was started."""


@dataclass(frozen=True, slots=True)
class Span:
    """The time that one report of a worker is about."""

    report: Record
    begin: float
    """Seconds of the run."""
    end: float
    """Seconds of the run."""
    samples: int
    """Training samples since the report before."""


@dataclass(frozen=True)
class LostReplica:
    """A replica, or an evaluator, that died while its session continued."""

    replica: int
    session: int
    iteration: int
    """Iterations of the session that were finished when it was first missing; of Downpour, steps of all replicas."""
    seconds: float
    """That time, in seconds of the run."""
    unit: str = "iteration"
    """What is counted: ``iteration``, or ``step``."""
    role: str = "replica"
    """What it was: ``replica``, or ``evaluator``, which are numbered behind the replicas."""

    def __str__(self) -> str:
        return f"{self.role} {self.replica} since {self.unit} {self.iteration:,} of session {self.session}"


def summary(directory: Path) -> Summary:
    """Return the results of the run in `directory`, from its records.

    Raises
    ------
    UserError
        If there are no records, see :func:`dbmpi.monitor.records.read_records`.
    """
    return RunHistory(read_records(directory)).summary()


class RunHistory:
    """The records of a run, sorted by the ranks that wrote them, on one clock that stands still between two sessions.

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
        self.batches: list[Record] = []
        """Passes of Sandblaster over a batch, in the order of time."""
        self.losses: list[Record] = []
        """Replicas of Downpour that were given up, in the order of time."""
        self.checkpoints: list[Record] = []
        """Checkpoints that were written, in the order of time."""
        self.rescues: list[Record] = []
        """Shards that have died and were replaced by their mirrors, in the order of time."""
        self.traces: list[Record] = []
        """Single phases of ranks, in the order of time."""
        self.early_ends: list[Record] = []
        """Why sessions have ended before their epochs were learned, in the order of time."""
        self.session_starts: list[Record] = []
        """What each session began with, in the order of time; earlier versions have not recorded it."""
        self.steps_per_epoch = 0
        """Mini-batches of all replicas together in one epoch; 0 where the records do not say."""
        self._ends: dict[int, float] = {}
        self._steps_before: dict[int, int] = {}
        others = {
            "evaluation": self.evaluations,
            "batch": self.batches,
            "loss": self.losses,
            "checkpoint": self.checkpoints,
            "rescue": self.rescues,
            "trace": self.traces,
            "start": self.session_starts,
            "end": self.early_ends,
        }
        for record in records:
            session = record["session"]
            self._ends[session] = max(self._ends.get(session, 0.0), record["elapsed"])
            if (before := record.get("steps_before")) is not None:
                self._steps_before[session] = before
            self.steps_per_epoch = record.get("steps_per_epoch") or self.steps_per_epoch
            if record["kind"] in ("worker", "shard"):
                role = self.workers if record["kind"] == "worker" else self.shards
                role.setdefault(record["number"], []).append(record)
            else:
                others[record["kind"]].append(record)
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

    def spans(self, reports: Iterable[Record]) -> Iterator[Span]:
        """Yield when the work behind each report was done, and how many samples it was.

        Parameters
        ----------
        reports
            Of one worker, in the order of time.
        """
        previous: Record = {"session": None}
        for report in reports:
            if previous["session"] == report["session"]:
                begin, samples = self.seconds(previous), report["samples"] - previous["samples"]
            else:
                begin, samples = self.starts[report["session"]] + _begin(report), report["samples"]
            yield Span(report, begin, self.seconds(report), samples)
            previous = report

    @property
    def lost(self) -> list[LostReplica]:
        """Replicas that have died, in the order of time; one entry for each session."""
        found: dict[tuple[int, int], LostReplica] = {}
        for batch in self.batches:
            session, iteration, seconds = batch["session"], batch["iteration"], self.seconds(batch)
            for replica in batch["lost"]:
                found.setdefault((session, replica), LostReplica(replica, session, iteration, seconds))
        for loss in self.losses:
            found_at = loss["session"], loss["step"], self.seconds(loss)
            one = LostReplica(loss["lost"], *found_at, "step", loss["role"])
            found[one.session, one.replica] = one
        return list(found.values())

    @property
    def withheld(self) -> int:
        """Pushes that replicas have withheld, in all sessions."""
        last = {
            (replica, report["session"]): report["withheld"]
            for replica, reports in self.replicas.items()
            for report in reports
        }
        return sum(last.values())

    @property
    def discarded(self) -> int:
        """Stale pushes that shards have dropped, in all sessions; each shard counts its own."""
        last = {
            (shard, report["session"]): report["discarded"]
            for shard, reports in self.shards.items()
            for report in reports
        }
        return sum(last.values())

    @property
    def virtual(self) -> bool:
        """Whether the run was simulated, so that its seconds are virtual."""
        return any(start["virtual"] for start in self.session_starts)

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

    def steps(self, session: int, elapsed: float) -> float:
        """Return the steps behind the parameters `elapsed` seconds after a session's start, all replicas together.

        Between two reports of a worker its steps are assumed to be evenly spread.  Work that a later session
        repeated is in the steps of its own session, and not in those of the later one.
        """
        return float(np.interp(elapsed, *self._counts[session]))

    def samples(self, session: int, elapsed: float) -> float:
        """Return the training samples behind the parameters, as :meth:`steps` returns the steps.

        Parameters
        ----------
        session, elapsed
            When: seconds after the start of a session.
        """
        return float(np.interp(elapsed, *self._sample_counts[session]))

    def kept(self, record: Record) -> bool:
        """Return whether the work up to a record is part of the result, and was not repeated by a later session.

        Parameters
        ----------
        record
            A report of any kind.
        """
        limit = self._limits[record["session"]]
        return self.steps(record["session"], record["elapsed"]) <= limit + 0.5

    @cached_property
    def _limits(self) -> dict[int, float]:
        """Up to which step each session's work was kept: where the later ones began."""
        limits, limit = {}, math.inf
        for session in reversed(self.sessions):
            limits[session] = limit
            limit = min(limit, self.begins[session])
        return limits

    @cached_property
    def begins(self) -> dict[int, int]:
        """Steps of all replicas that were in the parameters when each session began.

        If the records do not say, a session is assumed to begin where the one before it ended.
        """
        begins: dict[int, int] = {}
        end = 0
        for session in self.sessions:
            begins[session] = self._steps_before.get(session, end)
            end = begins[session] + sum(own[-1]["step"] for own in self._by_session.get(session, {}).values())
        return begins

    @cached_property
    def _counts(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """When reports were written, in seconds of their session, and the steps of all replicas then, by session."""
        counts = {}
        for session in self.sessions:
            times, total = self._total(session, "step")
            counts[session] = (times, self.begins[session] + total)
        return counts

    @cached_property
    def _sample_counts(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """The same of samples.

        Where the records do not say how many a session began with, they follow from its steps in the sessions before.
        """
        said = {start["session"]: start["samples_before"] for start in self.session_starts}
        counts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        steps = samples = np.zeros(1)
        for session in self.sessions:
            times, total = self._total(session, "samples")
            begin = self.begins[session]
            before = said.get(session)
            if before is None:
                before = float(np.interp(begin, steps, samples))
            counts[session] = (times, before + total)
            kept = steps <= begin
            steps = np.append(steps[kept], self._counts[session][1])
            samples = np.append(samples[kept], counts[session][1])
        return counts

    def _total(self, session: int, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Return when reports of a session were written, and a count of all replicas together then."""
        curves = [
            (
                np.array([_begin(own[0]), *(report["elapsed"] for report in own)], np.float64),
                np.array([0, *(report[field] for report in own)], np.float64),
            )
            for own in self._by_session.get(session, {}).values()
        ]
        times = np.unique(np.concatenate([[0.0], *(times for times, _ in curves)]))
        return times, sum((np.interp(times, *curve) for curve in curves), np.zeros_like(times))

    @cached_property
    def _by_session(self) -> dict[int, dict[int, list[Record]]]:
        """Reports by session and replica."""
        sessions: dict[int, dict[int, list[Record]]] = {}
        for replica, reports in self.replicas.items():
            for report in reports:
                sessions.setdefault(report["session"], {}).setdefault(replica, []).append(report)
        return sessions

    @property
    def staleness(self) -> StalenessHistogram:
        """Staleness of all pushes to all shards."""
        histogram = StalenessHistogram()
        for report in chain(*self.shards.values()):
            histogram.merge(StalenessHistogram.from_json(report["staleness_histogram"]))
        return histogram

    def summary(self) -> Summary:
        """Return the results of the run."""
        steps = samples = 0
        seconds = 0.0
        last: list[Record] = []
        for _, replicas in sorted(self._by_session.items()):
            last = [own[-1] for own in replicas.values()]
            steps += sum(report["step"] for report in last)
            samples += sum(report["samples"] for report in last)
            begin = min(_begin(own[0]) for own in replicas.values())
            seconds += max(report["elapsed"] for report in last) - begin
        losses = [report["loss"] for report in last if report["loss"] is not None]
        epochs = max((report["epoch"] or 0.0 for report in last), default=0.0)
        if self.steps_per_epoch:  # the fastest replica is ahead of the mean
            epochs = min(epochs, self.steps(self.sessions[-1], math.inf) / self.steps_per_epoch)
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
            epochs=epochs,
            sessions=len(self.sessions),
        )


def _begin(first: Record) -> float:
    """Return the seconds of the session after which that began which a worker's first report is about."""
    rate, elapsed = first["samples_per_second"] or 0.0, float(first["elapsed"])
    return max(0.0, elapsed - first["samples"] / rate) if rate > 0 else elapsed
