"""Several runs beside one another: curves in common panels, and their results as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.errors import UserError
from dbmpi.monitor.history import RunHistory, Summary
from dbmpi.monitor.panels import (
    anything,
    evaluation_points,
    rate_of,
    running_means,
    scale_losses,
    thousands,
    training_points,
)
from dbmpi.monitor.pictures import figures, make_folder, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#000000")
_STYLES = ("-", "--", ":")
MOST_RUNS = len(COLORS) * len(_STYLES)
"""Runs that can be told apart in a picture."""
_POINTS = 2000
"""Of a curve that are drawn."""
_WORST = 0.99
"""Share of the pushes that the panel of staleness shows."""


@dataclass(frozen=True)
class NamedRun:
    """A run, and what it is called among others."""

    name: str
    history: RunHistory


def names(directories: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that differ from one another.

    Parameters
    ----------
    directories
        The runs.

    Raises
    ------
    UserError
        If one is given twice.
    """
    parts = [path.resolve().parts for path in directories]
    for number, one in enumerate(parts):
        if one in parts[:number]:
            raise UserError(f"{directories[number]}: is given twice; expected runs that differ")

    def name(one: tuple[str, ...]) -> str:
        for length in range(1, len(one)):
            if sum(other[-length:] == one[-length:] for other in parts) == 1:
                return "/".join(one[-length:])
        return str(Path(*one))

    return [name(one) for one in parts]


def draw(runs: Sequence[NamedRun], out: Path) -> Path:
    """Draw several runs into ``comparison.png``, and return its path.

    Parameters
    ----------
    runs
        At most `MOST_RUNS`.
    out
        The folder for the picture.

    Raises
    ------
    UserError
        If there are too many, or the picture cannot be drawn or written.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(
            f"{len(runs)} runs are more than can be told apart in a picture; expected at most {MOST_RUNS}: compare "
            "them in several pictures"
        )
    figure_of, style = figures()
    make_folder(out)
    with style():
        figure = figure_of()
        figure.set_size_inches(14, 8.2 + 0.25 * -(-len(runs) // 3))
        panels = figure.subplots(2, 3)
        for row, key in enumerate(("loss", "accuracy")):
            for column, by in enumerate(("samples", "seconds")):
                _curves(panels[row, column], runs, key, by)
        _throughput(panels[0, 2], runs)
        _staleness(panels[1, 2], runs)
        handles = [panels[0, 0].plot([], [], lw=2.5, **_look(number))[0] for number in range(len(runs))]
        labels = [plain(_label(run), 90) for run in runs]
        columns = min(len(runs), 3 if max(map(len, labels)) < 50 else 2)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=10)
        return save(figure, out / "comparison.png")


def table(runs: Sequence[NamedRun]) -> tuple[list[str], list[list[str]]]:
    """Return heading and rows of a table of the results.

    Parameters
    ----------
    runs
        The runs.
    """
    heading = ["run", "epochs", "samples", "seconds", "samples/s", "staleness", "train loss", "test loss", "accuracy"]
    return heading, [[run.name, *_cells(run.history.summary())] for run in runs]


def _cells(result: Summary) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    accuracy = number(None if result.test_accuracy is None else 100 * result.test_accuracy, ".2f")
    return [
        number(result.epochs, ".4g"),
        f"{result.samples:,}",
        number(result.seconds, ",.1f"),
        number(result.samples_per_second, ",.0f"),
        number(result.mean_staleness, ".2f"),
        number(result.train_loss, ".4g"),
        number(result.test_loss, ".4g"),
        accuracy if accuracy == "-" else f"{accuracy} %",
    ]


def _label(run: NamedRun) -> str:
    """Return the name of a run and its result, for the legend."""
    result = run.history.summary()
    if result.test_accuracy is not None:
        return f"{run.name}: test accuracy {100 * result.test_accuracy:.2f} %"
    return run.name if result.test_loss is None else f"{run.name}: test loss {result.test_loss:.4g}"


def _look(number: int) -> dict[str, Any]:
    return {"color": COLORS[number % len(COLORS)], "linestyle": _STYLES[number // len(COLORS)]}


def _curves(axes: Axes, runs: Sequence[NamedRun], key: str, by: str) -> None:
    """Draw the running mean of training lightly, and the evaluations on it."""
    factor = 100.0 if key == "accuracy" else 1.0
    drawn = []
    for number, run in enumerate(runs):
        x, y, weights = training_points(run.history, key, by)
        test_x, test_y = evaluation_points(run.history, key, by)
        look = _look(number)
        if x.size:
            x, y = _thinned(*running_means(weights, x, factor * y))
            axes.plot(x, y, lw=1.0, alpha=0.6, **look)
            drawn.append(y)
        if test_x.size:
            axes.plot(test_x, factor * test_y, marker="o", ms=4, lw=1.6, mec="white", mew=0.5, **look)
            drawn.append(factor * test_y)
    label = "seconds of training" if by == "seconds" else "training samples"
    ylabel = "loss per sample" if key == "loss" else "correctly classified (%)"
    axes.set(title=f"{key} over {by}", xlabel=label, ylabel=ylabel)
    if not anything(axes, bool(drawn)):
        return
    axes.plot([], [], color="0.4", lw=1.0, alpha=0.6, label="training")
    axes.plot([], [], color="0.4", lw=1.6, marker="o", ms=4, label="test")
    axes.legend(loc="best")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(thousands())
    values = np.concatenate(drawn)
    if key == "loss":
        scale_losses(axes, float(values.min()), float(values.max()))
    else:  # the first reports would take all the room
        axes.set_ylim(max(0.0, float(np.quantile(values, 0.1)) - 3), min(101.0, float(values.max()) + 1))


def _throughput(axes: Axes, runs: Sequence[NamedRun]) -> None:
    axes.set(title="throughput", xlabel="seconds of training", ylabel="samples per second, all replicas")
    if not anything(axes, any(any(run.history.replicas.values()) for run in runs)):
        return
    for number, run in enumerate(runs):
        history = run.history
        if not any(history.replicas.values()):
            continue
        grid = np.linspace(0, history.duration, 600)
        total = np.sum([rate_of(history, reports, grid) for reports in history.replicas.values()], axis=0)
        axes.plot(grid, total, lw=1.4, **_look(number))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(thousands())


def _staleness(axes: Axes, runs: Sequence[NamedRun]) -> None:
    """Draw which share of the pushes was at most so stale."""
    from matplotlib.ticker import MaxNLocator

    axes.set(
        title="staleness of pushes", xlabel="versions between fetch and apply", ylabel="pushes at most so stale (%)"
    )
    largest = -1
    for number, run in enumerate(runs):
        histogram = run.history.staleness
        if not histogram.total:
            continue
        values = np.array(sorted(histogram.counts))
        counts = np.array([histogram.counts[value] for value in values.tolist()])
        x = np.concatenate([[0], values])
        y = np.concatenate([[0], 100 * np.cumsum(counts) / histogram.total])
        axes.step(x, y, where="post", lw=1.6, **_look(number))
        largest = max(largest, histogram.quantile(_WORST))
    if not anything(axes, largest >= 0):
        return
    axes.set(xlim=(-0.2, largest + 1), ylim=(0, 101))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.linspace(0, x.size - 1, min(x.size, _POINTS)).round().astype(int)
    return x[chosen], y[chosen]
