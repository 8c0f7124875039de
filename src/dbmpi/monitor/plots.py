"""Pictures of a run, drawn from its records as PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.panels import MOST_BARS, accuracy, loss, staleness, throughput, time_spent
from dbmpi.monitor.pictures import figures, make_folder, plain, save
from dbmpi.monitor.records import read_records
from dbmpi.monitor.timeline_panels import timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(directory: Path, out: Path | None = None) -> list[Path]:
    """Draw the run in `directory` and return the files written, the picture of everything first.

    Parameters
    ----------
    directory
        The run directory.
    out
        Directory for the pictures; by default ``plots`` in the run directory.

    Raises
    ------
    UserError
        If there are no records, Matplotlib is missing, or `out` cannot be written.
    """
    return draw_history(RunHistory(read_records(directory)), directory.resolve().name, out or directory / "plots")


def draw_history(history: RunHistory, name: str, out: Path) -> list[Path]:
    """Draw a history that has been read already, as :func:`draw` does.

    Parameters
    ----------
    history
        The records of the run.
    name
        The run's name, for the titles.
    out
        Directory for the pictures.
    """
    figure_of, style = figures()
    make_folder(out)
    written = []
    with style():
        for file, make in (
            ("run", _everything),
            ("loss", partial(_pair, loss)),
            ("accuracy", partial(_pair, accuracy)),
            ("throughput", partial(_one, throughput)),
            ("staleness", partial(_one, staleness)),
            ("time", _times),
            ("timeline", timeline),
        ):
            figure = figure_of()
            make(figure, history)
            shown = plain(name)
            figure.suptitle(headline(shown, history) if file == "run" else shown, fontsize=12)
            written.append(save(figure, out / f"{file}.png"))
    return written


def headline(name: str, history: RunHistory) -> str:
    """Return the title of the picture of everything: the `name`, and what came out of the `history`."""
    result = history.summary()
    facts = [f"{name}, in virtual time" if history.virtual else name]
    if result.test_accuracy is not None:
        facts.append(f"test accuracy {100 * result.test_accuracy:.2f} %")
    elif result.test_loss is not None:
        facts.append(f"test loss {result.test_loss:.4g}")
    facts.append(f"{result.epochs:.4g} epochs in {result.seconds:,.{1 if result.seconds < 100 else 0}f} s")
    if math.isfinite(result.samples_per_second):
        facts.append(f"{result.samples_per_second:,.0f} samples/s")
    if math.isfinite(result.mean_staleness):
        facts.append(f"mean staleness {result.mean_staleness:.2f}")
    if lost := len(history.lost):
        facts.append(f"{lost} replica{'s' if lost > 1 else ''} lost")
    if withheld := history.withheld:
        facts.append(f"pushes withheld: {withheld:,}")
    if discarded := history.discarded:
        facts.append(f"stale pushes dropped: {discarded:,}")
    return "   ·   ".join(facts)


def _everything(figure: Figure, history: RunHistory) -> None:
    figure.set_size_inches(13.5, 10)
    above, below = figure.subfigures(2, 1, height_ratios=(3.2, 1.15), hspace=0.02, squeeze=False)[:, 0]
    panels = above.subplots(2, 3)
    loss(panels[0, 0], history, "steps")
    loss(panels[0, 1], history, "seconds")
    throughput(panels[0, 2], history)
    accuracy(panels[1, 0], history, "steps")
    accuracy(panels[1, 1], history, "seconds")
    staleness(panels[1, 2], history)
    _times(below, history)


def _pair(panel: Callable[[Axes, RunHistory, str], None], figure: Figure, history: RunHistory) -> None:
    figure.set_size_inches(10, 4.3)
    for axes, by in zip(figure.subplots(1, 2), ("steps", "seconds"), strict=True):
        panel(axes, history, by)


def _one(panel: Callable[[Axes, RunHistory], None], figure: Figure, history: RunHistory) -> None:
    figure.set_size_inches(7, 4.5)
    panel(figure.subplots(), history)


def _times(figure: Any, history: RunHistory) -> None:
    """Draw both roles side by side, on a figure or a part of one."""
    if hasattr(figure, "set_size_inches"):
        bars = min(MOST_BARS, max(len(history.workers), len(history.shards), 1))
        figure.set_size_inches(10, 1.9 + 0.35 * bars)
    for axes, role in zip(figure.subplots(1, 2), ("worker", "shard"), strict=True):
        time_spent(axes, history, role)
