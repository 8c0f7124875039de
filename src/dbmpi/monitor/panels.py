"""The panels of a run's pictures: each draws one aspect of a history on the axes it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.lines import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

_TRAIN, _TEST, _QUIET = "#0072b2", "#d55e00", "0.55"
# Of the Okabe-Ito palette, which the colour-blind can tell apart; grey for doing nothing.
ACTIVITIES = {
    "compute": "#0072b2",
    "exchange": "#8c564b",
    "data": "#cc79a7",
    "fetch": "#56b4e9",
    "push": "#e69f00",
    "wait": "0.75",
    "apply": "#009e73",
    "serve": "#f0e442",
    "idle": "0.75",
}
_REPLICAS = ("#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#8c564b", "#7f7f7f", "#b5a642", "#5d4fa2")
MOST_BARS = 12
"""Ranks of a role that have a bar each; more are put together."""


def loss(axes: Axes, history: RunHistory, by: str) -> None:
    """Draw the loss of training and testing.

    Parameters
    ----------
    axes
        Where to draw.
    history
        The run.
    by
        What the horizontal axis shows, ``steps`` or ``seconds``.
    """
    lowest, highest = _curves(axes, history, "loss", by, 1.0)
    axes.set(title=f"loss over {by}", ylabel="loss per sample")
    scale_losses(axes, lowest, highest)


def scale_losses(axes: Axes, lowest: float, highest: float) -> None:
    """Choose the scale of losses: where they differ by more than a decade, late ones are seen on a logarithmic one.

    Parameters
    ----------
    axes
        Where they are drawn.
    lowest, highest
        Their range.
    """
    if 0 < lowest < highest / 10:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        if highest < 1000 * lowest:
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.yaxis.set_minor_formatter(NullFormatter())


def accuracy(axes: Axes, history: RunHistory, by: str) -> None:
    """Draw the accuracy of training and testing, in per cent.

    Parameters
    ----------
    axes
        Where to draw.
    history
        The run.
    by
        What the horizontal axis shows, ``steps`` or ``seconds``.
    """
    lowest, highest = _curves(axes, history, "accuracy", by, 100.0)
    axes.set(title=f"accuracy over {by}", ylabel="correctly classified (%)")
    if np.isfinite(highest):
        axes.set_ylim(max(0.0, lowest - 3), min(101.0, highest + 3))


def throughput(axes: Axes, history: RunHistory) -> None:
    """Draw the samples per second of each replica, and their sum.

    Parameters
    ----------
    axes
        Where to draw.
    history
        The run.
    """
    replicas = history.replicas
    axes.set(title="throughput", xlabel="training time (s)", ylabel="samples per second")
    if not anything(axes, any(replicas.values())):
        return
    grid = np.linspace(0, history.duration, 1000)
    rates = {replica: rate_of(history, reports, grid) for replica, reports in replicas.items()}
    total = np.sum(list(rates.values()), axis=0)
    named = len(replicas) <= len(_REPLICAS)
    for position, (replica, rate) in enumerate(rates.items()):
        label = f"replica {replica}" if named else "one replica" if position == 0 else None
        axes.plot(grid, rate, color=_REPLICAS[position] if named else _QUIET, lw=1.2 if named else 0.5, label=label)
    if len(replicas) > 1:
        axes.plot(grid, total, color="black", lw=1.6, label="all replicas")
    axes.yaxis.set_major_formatter(thousands())
    axes.set(xlim=(0, 1.03 * history.duration or 1), ylim=(0, 1.45 * float(total.max()) or 1))
    _mark_sessions(axes, history, "seconds")
    lost = history.lost
    for position, one in enumerate(lost):
        numbers = sorted({other.replica for other in lost})
        label = f"lost: {', '.join(map(str, numbers))}" if len(numbers) <= 4 else f"{len(numbers)} are lost"
        color = _REPLICAS[list(rates).index(one.replica)] if named and one.replica in rates else "black"
        axes.axvline(one.seconds, color=color, ls="--", lw=1, label=None if position else label)
    axes.legend(ncols=2, loc="upper center")


def staleness(axes: Axes, history: RunHistory) -> None:
    """Draw how many pushes were applied how many versions after the parameters they were computed from.

    Parameters
    ----------
    axes
        Where to draw.
    history
        The run.
    """
    histogram = history.staleness
    axes.set(title="staleness of pushes", xlabel="versions between fetch and apply", ylabel="pushes (%)")
    if not anything(axes, histogram.total > 0):
        return
    from matplotlib.ticker import MaxNLocator

    largest = histogram.max
    # One bar a value, or a whole number of values a bar where that would be too many bars.
    width = -(-(largest + 1) // 60)
    values, counts = np.array(list(histogram.counts.items())).T
    shares = 100 * np.bincount(values // width, counts) / histogram.total
    centers = np.arange(shares.size) * width + (width - 1) / 2
    axes.bar(centers, shares, width=0.9 * width, color="#56b4e9")
    axes.set_xlim(-0.7 * width, max(largest + 0.7 * width, 3.7))
    axes.set_ylim(0, 1.4 * float(shares.max()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axvline(histogram.mean, color=_TEST, lw=1.5, label=f"mean {histogram.mean:.2f}")
    facts = [f"{histogram.total:,} pushes"]
    facts += [f"{100 * q:.0f} %: at most {histogram.quantile(q)}" for q in (0.5, 0.9, 0.99)]
    facts.append(f"largest {largest}")
    axes.legend(title="\n".join(facts), title_fontsize=9, loc="upper right")


def time_spent(axes: Axes, history: RunHistory, role: str) -> None:
    """Draw where the time of each rank of a role goes, as stacked bars.

    Parameters
    ----------
    axes
        Where to draw.
    history
        The run.
    role
        ``worker`` or ``shard``.
    """
    ranks = history.workers if role == "worker" else history.shards
    axes.set(title=f"where the time of {role}s goes", xlabel="recorded time (%)")
    if not anything(axes, bool(ranks)):
        return
    labels, bars = grouped(
        role, {number: add_up(report["seconds"] for report in reports) for number, reports in ranks.items()}
    )
    activities = [name for name in ACTIVITIES if any(name in bar for bar in bars)]
    activities += sorted({name for bar in bars for name in bar} - set(activities))
    totals = np.array([max(sum(bar.values()), 1e-9) for bar in bars])
    left = np.zeros(len(bars))
    rows, size = np.arange(len(bars)), 9 if len(bars) <= 8 else 7
    for activity in activities:
        share = 100 * np.array([bar.get(activity, 0.0) for bar in bars]) / totals
        color = ACTIVITIES.get(activity, "#7f7f7f")
        drawn = axes.barh(rows, share, left=left, height=0.7, color=color, label=activity)
        numbers = [f"{value:.0f}" if value >= 6 else "" for value in share]
        ink = "white" if activity in ("compute", "apply", "exchange") else "black"
        axes.bar_label(drawn, numbers, label_type="center", fontsize=size, color=ink)
        left += share
    axes.set_yticks(rows, labels)
    middle, reach = (len(bars) - 1) / 2, max(len(bars), 3) / 2
    axes.set(xlim=(0, 100), ylim=(middle + reach, middle - reach))
    axes.grid(visible=False)
    axes.set_title(axes.get_title(), pad=24)
    axes.legend(ncols=len(activities), loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2)


def _curves(axes: Axes, history: RunHistory, key: str, by: str, factor: float) -> tuple[float, float]:
    """Draw a quantity of training (every report light, their running mean) and of testing; return its range."""
    x, y, weights = training_points(history, key, by)
    test_x, test_y = evaluation_points(history, key, by)
    y, test_y = factor * y, factor * test_y
    if by == "seconds":
        axes.set_xlabel("training time (s)")
    elif by == "samples":
        axes.set_xlabel("training samples")
        axes.xaxis.set_major_formatter(thousands())
    else:
        an_epoch = f" ({history.steps_per_epoch:,} an epoch)" if history.steps_per_epoch else ""
        axes.set_xlabel(f"steps of all replicas{an_epoch}")
        axes.xaxis.set_major_formatter(thousands())
    if not anything(axes, x.size + test_x.size > 0):
        return np.nan, np.nan
    values = test_y
    if x.size:
        smooth_x, smooth = running_means(weights, x, y)
        axes.plot(x, y, ".", ms=5, color=_TRAIN, alpha=0.3, mec="none", label="each report")
        axes.plot(smooth_x, smooth, color=_TRAIN, lw=1.8, label="training")
        values = np.concatenate([smooth, test_y])
    if test_x.size:
        axes.plot(test_x, test_y, "o-", ms=5, lw=1, color=_TEST, mec="white", mew=0.7, label="test")
    axes.set_xlim(0, 1.03 * float(np.concatenate([x, test_x]).max()) or 1)
    _mark_sessions(axes, history, by)
    axes.legend()
    return float(values.min()), float(values.max())


def training_points(history: RunHistory, key: str, by: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, y and the samples behind y of all replicas' reports, sorted by x.

    A report's mean stands in the middle of what it is about.

    Parameters
    ----------
    history
        The run.
    key
        ``loss`` or ``accuracy``.
    by
        What x is: ``steps``, ``samples`` or ``seconds``.
    """
    points = [
        (_position(history, span.report["session"], (span.begin + span.end) / 2, by), span.report[key], span.samples)
        for reports in history.replicas.values()
        for span in history.spans(reports)
        if span.report[key] is not None and _is_drawn(history, span.report, by)
    ]
    x, y, weights = np.array(sorted(points), dtype=np.float64).reshape(-1, 3).T
    return x, y, np.maximum(weights, 1)


def evaluation_points(history: RunHistory, key: str, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of all evaluations, sorted by x.

    Parameters
    ----------
    history
        The run.
    key
        ``loss`` or ``accuracy``.
    by
        What x is: ``steps``, ``samples`` or ``seconds``.
    """
    points = [
        (_position(history, record["session"], history.seconds(record), by), record[key])
        for record in history.evaluations
        if record[key] is not None and _is_drawn(history, record, by)
    ]
    x, y = np.array(sorted(points), dtype=np.float64).reshape(-1, 2).T
    return x, y


def _is_drawn(history: RunHistory, record: Record, by: str) -> bool:
    """Return whether a record counts: work that was repeated after a resume cost seconds, but counts as no steps."""
    return by == "seconds" or history.kept(record)


def _position(history: RunHistory, session: int, seconds: float, by: str) -> float:
    """Return where on the axis a time, in seconds of the run, of a session lies."""
    if by == "seconds":
        return seconds
    count = history.steps if by == "steps" else history.samples
    return count(session, seconds - history.starts[session])


def running_means(weights: np.ndarray, *rows: np.ndarray) -> list[np.ndarray]:
    """Return the means of each value of the `rows` and its neighbours, about a twentieth of all, by their `weights`.

    There are as many neighbours on either side.  Towards the ends the neighbourhood shrinks, so that a steep beginning
    is not bent.  All arrays are 1-D and alike.
    """
    index = np.arange(weights.size)
    widest = min(max(1, weights.size // 40), 500)
    reach = np.minimum(widest, np.minimum(index, weights.size - 1 - index))
    # Sums over windows one by one: differences of running sums would lose small values behind large ones.
    edges = np.column_stack([index - reach, index + reach + 1]).ravel()
    weights = weights / weights.max()

    def windows(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.add.reduceat(np.append(values, 0.0), edges)[::2])

    return [windows(row * weights) / windows(weights) for row in rows]


def rate_of(history: RunHistory, reports: list[Record], grid: np.ndarray) -> np.ndarray:
    """Return a replica's samples per second at some times: each report speaks for the time before it.

    Parameters
    ----------
    history
        The run.
    reports
        Those of the replica.
    grid : (times,) array
        Seconds of the run.
    """
    rate = np.zeros_like(grid)
    for span in history.spans(reports):
        rate[(grid > span.begin) & (grid <= span.end)] = span.report["samples_per_second"] or 0.0
    return rate


def add_up(bars: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """Return the sums of seconds by activity.

    Parameters
    ----------
    bars
        Seconds by activity, None where they are not known.
    """
    seconds: dict[str, float] = {}
    for bar in bars:
        for activity, value in bar.items():
            seconds[activity] = seconds.get(activity, 0.0) + (value or 0.0)
    return seconds


def grouped(role: str, ranks: dict[int, dict[str, float]]) -> tuple[list[str], list[dict[str, float]]]:
    """Return labels and bars of a `role`: one a rank, or the sums of neighbours where there are many `ranks`."""
    numbers = list(ranks)
    size = -(-len(numbers) // MOST_BARS)
    groups = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    labels = [f"{role} {one[0]}" if len(one) == 1 else f"{role}s {one[0]}-{one[-1]}" for one in groups]
    return labels, [add_up(ranks[number] for number in group) for group in groups]


def _mark_sessions(axes: Axes, history: RunHistory, by: str) -> None:
    """Mark where the run went on from a checkpoint."""
    for count, session in enumerate(history.sessions[1:]):
        start = history.starts[session] if by == "seconds" else _position(history, session, history.starts[session], by)
        axes.axvline(start, color="black", ls=":", lw=1, label=None if count else "resumed")


def thousands() -> Formatter:
    """Return what writes 200000 as 200k."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def anything(axes: Axes, there_is: bool) -> bool:
    """Say so on the `axes` where nothing was recorded; return whether `there_is` something."""
    if not there_is:
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", va="center", color=_QUIET)
        axes.set(xticks=[], yticks=[])
    return there_is
