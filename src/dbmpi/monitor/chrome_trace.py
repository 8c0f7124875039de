"""A timeline as a file in Chrome's trace event format, for Perfetto (ui.perfetto.dev) and chrome://tracing.

One process for each role of a rank, and one for the marks of the run.  A rank's row ``phases`` has what was recorded
one by one, the row ``reports`` the sums between two reports, one activity behind the other.  Times are microseconds
since the run began.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dbmpi.errors import UserError
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.lines import Record
from dbmpi.monitor.timeline import Interval, RankTimeline, timelines

MOST_SLICES = 500_000
"""Of the sums; of more, neighbours are added up."""
_REPORTS, _PHASES = 1, 2
_COUNTERS = {"worker": ("loss", "accuracy", "samples_per_second"), "shard": ("queue",)}
_MARKS = {
    "evaluations": "evaluation",
    "checkpoints": "checkpoint",
    "losses": "a replica is lost",
    "rescues": "a shard is lost",
}
_ABOUT = ("step", "loss", "accuracy", "lost", "shard", "name", "bytes")

Event = dict[str, Any]


def write(history: RunHistory, name: str, path: Path) -> None:
    """Write the timeline of a run.

    Parameters
    ----------
    history
        The run.
    name
        Of the run.
    path
        The file, which is replaced when the new one is complete.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.write('{"displayTimeUnit": "ms", "otherData": ' + json.dumps({"run": name}) + ', "traceEvents": [')
            separator = "\n"
            for event in events(history):
                file.write(separator + json.dumps(event, allow_nan=False))
                separator = ",\n"
            file.write("\n]}\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write the trace: {error.strerror}") from None


def events(history: RunHistory) -> Iterator[Event]:
    """Yield the events: first the names of processes and their rows, then all others in the order of time.

    Parameters
    ----------
    history
        The run.
    """
    ranks = timelines(history)
    most = sum(len(one.seconds) for rank in ranks for one in rank.intervals) / MOST_SLICES
    timed: list[Event] = []
    processes: dict[tuple[str, int], int] = {}
    yield {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "run"}}
    for process, rank in enumerate(ranks, 1):
        processes[rank.role, rank.number] = process
        yield from _names(process, rank)
        timed += _sums(process, rank, math.ceil(most))
        for window in rank.windows:
            for phase in window:
                timed.append(_slice(process, _PHASES, phase.activity, phase.begin, phase.begin + phase.seconds))
    for role, reports in (("worker", history.workers), ("shard", history.shards)):
        for number, own in reports.items():
            for report in own[:: math.ceil(most)] if most > 1 else own:
                timed += _counters(history, processes[role, number], role, report)
    for attribute, label in _MARKS.items():
        for record in getattr(history, attribute):
            timed.append(_mark(history, label, record))
    # Of slices that begin together, the outer one comes first.
    timed.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    yield from timed


def _names(process: int, rank: RankTimeline) -> Iterator[Event]:
    def named(what: str, thread: int, **values: Any) -> Event:
        return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": values}

    yield named("process_name", 0, name=rank.name)
    yield named("process_sort_index", 0, sort_index=process)
    yield named("thread_name", _REPORTS, name="reports: sums, not the order of time")
    if rank.windows:
        yield named("thread_name", _PHASES, name="phases")


def _sums(process: int, rank: RankTimeline, together: int) -> Iterator[Event]:
    """Yield the activities of each interval, or of several neighbours, one behind the other."""
    for one in merged(rank.intervals, max(1, together)):
        begin, stretch = one.begin, (one.end - one.begin) / max(one.end - one.begin, sum(one.seconds.values()))
        for activity, seconds in one.seconds.items():
            yield _slice(process, _REPORTS, activity, begin, begin + stretch * seconds)
            begin += stretch * seconds


def merged(intervals: Sequence[Interval], together: int) -> Iterator[Interval]:
    """Yield the sums of so many neighbours; across a gap, such as that between two sessions, nothing is added up.

    Parameters
    ----------
    intervals
        Of a rank.
    together
        How many become one.
    """
    group: list[Interval] = []
    for one in [*intervals, None]:
        if group and (one is None or len(group) == together or one.begin - group[-1].end > 1e-9):
            seconds: dict[str, float] = {}
            for each in group:
                for activity, value in each.seconds.items():
                    seconds[activity] = seconds.get(activity, 0.0) + value
            yield Interval(group[0].begin, group[-1].end, seconds)
            group = []
        if one is not None:
            group.append(one)


def _slice(process: int, thread: int, name: str, begin: float, end: float) -> Event:
    # Begin and end are rounded alike, so that neighbours do not overlap.
    first = round(1e6 * begin)
    return {"ph": "X", "name": name, "pid": process, "tid": thread, "ts": first, "dur": round(1e6 * end) - first}


def _counters(history: RunHistory, process: int, role: str, report: Record) -> Iterator[Event]:
    at = round(1e6 * history.seconds(report))
    for name in _COUNTERS[role]:
        if report[name] is not None:
            yield {"ph": "C", "name": name, "pid": process, "tid": 0, "ts": at, "args": {name: report[name]}}


def _mark(history: RunHistory, label: str, record: Record) -> Event:
    """Return a mark across all processes; it belongs to that of the run itself, number 0."""
    about = {key: record[key] for key in _ABOUT if key in record}
    at = round(1e6 * history.seconds(record))
    return {"ph": "i", "s": "g", "name": label, "pid": 0, "tid": 0, "ts": at, "args": about}
