"""What each rank of a run did when: from the sums of its reports, and from the single phases of short windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.lines import Record


class Interval(NamedTuple):
    """The time between two reports of a rank."""

    begin: float
    """Seconds of the run."""
    end: float
    """Seconds of the run."""
    seconds: Mapping[str, float]
    """How much of it went to each activity."""


class Phase(NamedTuple):
    """A single phase of a rank."""

    activity: str
    begin: float
    """Seconds of the run."""
    seconds: float


@dataclass
class RankTimeline:
    """What one role of one rank did."""

    role: str
    number: int
    intervals: list[Interval] = field(default_factory=list)
    """All of its time, in order."""
    windows: list[list[Phase]] = field(default_factory=list)
    """The phases of each window that was recorded, in the order of their beginnings."""

    @property
    def name(self) -> str:
        """For people: ``worker 0``."""
        return f"{self.role} {self.number}"


def timelines(history: RunHistory) -> list[RankTimeline]:
    """Return what each rank did, shards first.

    Parameters
    ----------
    history
        The run.
    """
    ranks: dict[tuple[str, int], RankTimeline] = {}
    for role, reports in (("shard", history.shards), ("worker", history.workers)):
        for number, own in reports.items():
            ranks[role, number] = RankTimeline(role, number, list(_intervals(history, own)))
    for trace in history.traces:
        key = (trace["role"], trace["number"])
        if phases := list(phases_of(trace, history.starts[trace["session"]])):
            ranks.setdefault(key, RankTimeline(*key)).windows.append(phases)
    return sorted(ranks.values(), key=lambda one: (one.role, one.number))


def phases_of(trace: Record, start: float) -> Iterator[Phase]:
    """Yield the phases of a window.

    Parameters
    ----------
    trace
        A record of the kind ``trace``; phases in it that make no sense are left out.
    start
        When its session started, in seconds of the run.
    """
    names = {number: name for name, number in trace["activities"].items()}
    begin, flat = start + (trace["begin"] or 0.0), trace["phases"]
    for number, after, micros in zip(flat[::3], flat[1::3], flat[2::3], strict=False):
        if number in names and after >= 0 and micros >= 0:
            yield Phase(names[number], begin + 1e-6 * after, 1e-6 * micros)


def _intervals(history: RunHistory, reports: list[Record]) -> Iterator[Interval]:
    """Yield the times between reports of a rank; the first of a session begins where its activities did."""
    previous: Record = {"session": None}
    for report in reports:
        seconds = {name: value for name, value in report["seconds"].items() if value is not None and value > 0}
        end = history.seconds(report)
        if previous["session"] == report["session"]:
            begin = history.seconds(previous)
        else:
            begin = max(history.starts[report["session"]], end - sum(seconds.values()))
        if end > begin:
            yield Interval(begin, end, seconds)
        previous = report
