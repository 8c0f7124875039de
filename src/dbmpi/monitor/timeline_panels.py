"""The picture of a timeline: what each rank did over the whole run, and single phases in one window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.panels import ACTIVITIES, anything
from dbmpi.monitor.timeline import Interval, Phase, RankTimeline, timelines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 24
"""Ranks that are drawn; of more, as many that are evenly spaced."""
_COLUMNS, _LINES = 900, 20
"""Pixels of a row."""
_PHASES = 60
"""Phases of a rank that can be told apart."""
_OTHER = "#7f7f7f"


def timeline(figure: Figure, history: RunHistory) -> None:
    """Draw the timeline on a figure.

    Parameters
    ----------
    figure
        Where to draw; its size is set.
    history
        The run.
    """
    ranks = timelines(history)
    shown = evenly(ranks, MOST_ROWS)
    figure.set_size_inches(12, 3.0 + 0.5 * max(2, len(shown)))
    above, below = figure.subplots(2, 1)
    some = f" ({len(shown)} of {len(ranks):,} ranks)" if len(shown) < len(ranks) else ""
    whole_run(above, shown, history.duration)
    above.set_title(f"the whole run: shares of each rank's time{some}")
    window(below, shown)
    used = {name for rank in shown for one in rank.intervals for name in one.seconds}
    used |= {phase.activity for rank in shown for one in rank.windows for phase in one}
    if used:
        handles, labels = _keys(used)
        figure.legend(handles, labels, ncols=len(labels), loc="outside lower center", fontsize=9)


def whole_run(axes: Axes, ranks: Sequence[RankTimeline], duration: float) -> None:
    """Draw the shares of each activity over the whole run, a row for each rank.

    Parameters
    ----------
    axes
        Where to draw.
    ranks
        Not too many.
    duration
        Of the run, in seconds.
    """
    axes.set_xlabel("time of the run (s)")
    if not anything(axes, any(rank.intervals for rank in ranks)):
        return
    rows = [_picture(rank.intervals, duration) for rank in ranks]
    gap = np.ones((_LINES // 5, _COLUMNS, 3))
    image = np.concatenate([part for row in rows for part in (row, gap)])
    height = len(ranks)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, duration, height, 0))
    _name_rows(axes, ranks, 0.5 * _LINES / (_LINES + _LINES // 5))


def window(axes: Axes, ranks: Sequence[RankTimeline]) -> None:
    """Draw the single phases of the beginning of the last window, a row for each rank.

    Parameters
    ----------
    axes
        Where to draw.
    ranks
        Not too many.
    """
    axes.set_title("some steps in detail")
    traced = [rank for rank in ranks if rank.windows]
    if not anything(axes, bool(traced)):
        return
    begin, end = _extent(traced)
    for row, rank in enumerate(ranks):
        phases = [phase for one in rank.windows for phase in one if phase.begin < end]
        for activity, bars in _by_activity(phases, begin).items():
            nested = activity == "apply"
            height, color = 0.4 if nested else 0.8, ACTIVITIES.get(activity, _OTHER)
            axes.broken_barh(bars, (row + 0.5 - height / 2, height), facecolors=color, lw=0, zorder=3 + nested)
    axes.set(xlim=(0, 1000 * (end - begin)), ylim=(len(ranks), 0))
    axes.set_xlabel(f"milliseconds after {begin:,.3f} s of the run")
    _name_rows(axes, ranks, 0.5)


def evenly(ranks: Sequence[RankTimeline], most: int) -> list[RankTimeline]:
    """Return at most so many ranks, evenly spaced, the first and the last among them.

    Parameters
    ----------
    ranks
        All of them.
    most
        How many, at least 2.
    """
    if len(ranks) <= most:
        return list(ranks)
    return [ranks[number] for number in np.linspace(0, len(ranks) - 1, most).round().astype(int)]


def shares(intervals: Sequence[Interval], duration: float, columns: int) -> dict[str, np.ndarray]:
    """Return which share of each of some equal times went to each activity; they add up to at most 1.

    Parameters
    ----------
    intervals
        Of a rank.
    duration
        Of all these times together, in seconds, from 0.
    columns
        How many times.

    Returns
    -------
    dict
        A (columns,) array for each activity.
    """
    width = duration / columns
    edges = np.linspace(0, duration, columns + 1)
    found: dict[str, np.ndarray] = {}
    for one in intervals:
        first, last = max(0, int(one.begin / width)), min(columns, int(np.ceil(one.end / width)))
        covered = np.minimum(edges[first + 1 : last + 1], one.end) - np.maximum(edges[first:last], one.begin)
        covered = np.clip(covered, 0, None) / width
        for activity, seconds in one.seconds.items():
            share = min(1.0, seconds / max(one.end - one.begin, sum(one.seconds.values())))
            found.setdefault(activity, np.zeros(columns))[first:last] += share * covered
    return found


def _picture(intervals: Sequence[Interval], duration: float) -> np.ndarray:
    """Return the shares of a rank as colours, one above the other: (lines, columns, 3)."""
    from matplotlib.colors import to_rgb

    found = shares(intervals, duration, _COLUMNS)
    image = np.full((_LINES, _COLUMNS, 3), 0.94)
    top = np.zeros(_COLUMNS)
    lines = (np.arange(_LINES)[::-1, None] + 0.5) / _LINES
    for activity in _ordered(found):
        bottom, top = top, top + found[activity]
        image[(lines >= bottom) & (lines < top)] = to_rgb(ACTIVITIES.get(activity, _OTHER))
    return image


def _extent(ranks: Sequence[RankTimeline]) -> tuple[float, float]:
    """Return begin and end of the part of the last window that is drawn: some steps of the rank with the most phases.

    It begins when the last rank that is in this window has begun it, so that all can be seen.
    """
    latest = max(rank.windows[-1][0].begin for rank in ranks)
    present = [rank.windows[-1] for rank in ranks if rank.windows[-1][-1].begin >= latest]
    densest = max(present, key=lambda phases: sum(phase.begin >= latest for phase in phases))
    after = [phase for phase in densest if phase.begin >= latest]
    last = after[:_PHASES][-1]
    return latest, max(last.begin + last.seconds, latest + 1e-6)


def _by_activity(phases: Sequence[Phase], begin: float) -> dict[str, list[tuple[float, float]]]:
    """Return begin and length of the phases of each activity, in milliseconds after `begin`."""
    found: dict[str, list[tuple[float, float]]] = {}
    for phase in phases:
        if phase.begin + phase.seconds > begin:
            found.setdefault(phase.activity, []).append((1000 * (phase.begin - begin), 1000 * phase.seconds))
    return found


def _ordered(names: Any) -> list[str]:
    """Return activities in the order of the legend."""
    return [name for name in ACTIVITIES if name in names] + sorted(set(names) - set(ACTIVITIES))


def _keys(used: set[str]) -> tuple[list[Any], list[str]]:
    """Return the keys of the legend and their names."""
    from matplotlib.patches import Patch

    names = _ordered(used)
    return [Patch(color=ACTIVITIES.get(name, _OTHER)) for name in names], names


def _name_rows(axes: Axes, ranks: Sequence[RankTimeline], middle: float) -> None:
    axes.set_yticks(np.arange(len(ranks)) + middle, [rank.name for rank in ranks], fontsize=9 if len(ranks) < 16 else 7)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
