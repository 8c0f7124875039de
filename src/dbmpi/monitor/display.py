"""The progress of a run as a line of text, and as a bar drawn by Rich."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DisplayState:
    """The state to show; see :meth:`dbmpi.monitor.progress.RunProgress.update`."""

    total: int
    epochs: float | None
    samples: int = 0
    loss: float = math.nan
    accuracy: float | None = None
    rate: float = 0.0
    staleness: float | None = None
    elapsed: float = 0.0

    @property
    def fraction(self) -> float:
        """How much is done, 0 to 1."""
        return min(max(self.samples / self.total, 0.0), 1.0) if self.total > 0 else 1.0

    @property
    def remaining(self) -> float | None:
        """Seconds that the rest will take at the present rate, if it is known."""
        left = self.total - self.samples
        return left / self.rate if self.rate > 0 and math.isfinite(self.rate) and left > 0 else None

    @property
    def position(self) -> str:
        """The epoch, or else the percentage."""
        if self.epochs is None:
            return f"{100 * self.fraction:3.0f} %"
        total, decimals = f"{self.epochs:g}", 1 if self.epochs < 100 else 0
        return f"epoch {self.epochs * self.fraction:{len(total) + 2 * decimals}.{decimals}f}/{total}"


def line(state: DisplayState) -> str:
    """Return the state as plain text of at most 80 columns in all usual cases.

    Parameters
    ----------
    state
        What is shown.
    """
    facts = [label + value for label, value in _facts(state, wide=True)]
    return "  ".join([f"{duration(state.elapsed):>7}", state.position, *facts])


class Bar:
    """The bar as Rich draws it: one line, so that another rank's output can never be drawn over.

    Parameters
    ----------
    state
        Returns what is to be drawn now.
    """

    def __init__(self, state: Callable[[], DisplayState]) -> None:
        self._state = state

    def __rich_console__(self, console: object, options: object) -> Iterator[object]:
        from rich.console import Console, ConsoleOptions
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        assert isinstance(console, Console)
        assert isinstance(options, ConsoleOptions)
        state = self._state()
        columns = max(1, options.max_width - 1)  # a full last column makes some terminals begin a new line
        position, width, facts = fit(state, columns)
        text = Text(position, no_wrap=True, overflow="crop", end="")
        if width:
            bar = ProgressBar(total=1.0, completed=state.fraction, width=width)
            drawn = Text.assemble(*((part.text, part.style or "") for part in console.render(bar, options)))
            drawn.truncate(width, pad=True)
            text.append(" ").append_text(drawn)
        for label, value in facts:
            text.append("  ").append(label, style="dim").append(value)
        text.truncate(columns)
        yield text


def _facts(state: DisplayState, *, wide: bool) -> list[tuple[str, str]]:
    """Return label and value of all that is known, the most important one first; words are written out if `wide`."""
    facts = [("loss ", digits(state.loss))]
    if state.accuracy is not None:
        percentage = f"{100 * state.accuracy:.1f}"
        facts.append(("accuracy ", f"{percentage} %") if wide else ("acc ", f"{percentage}%"))
    facts.append(("", f"{_grouped(state.rate)} samples/s" if wide else f"{short(state.rate)}/s"))
    if state.staleness is not None:
        facts.append(("staleness " if wide else "stale ", f"{state.staleness:.1f}"))
    return facts


def fit(state: DisplayState, columns: int) -> tuple[str, int, list[tuple[str, str]]]:
    """Return the position, the bar's width and the facts (label, value) of a `state` that fit into a line of `columns`.

    In narrower lines facts go from the last to the first, then the time that is left, then the bar.
    """
    remaining = state.remaining
    clock = ("", f"{duration(remaining)} left" if remaining is not None else f"in {duration(state.elapsed)}")
    narrow, percentage = _facts(state, wide=False), f"{100 * state.fraction:3.0f} %"
    choices = [(state.position, [*_facts(state, wide=True), clock], 20), (state.position, [*narrow, clock], 8)]
    choices += [(percentage, [*narrow[:count], clock], 8) for count in range(len(narrow), -1, -1)]
    for position, facts, least in [*choices, (percentage, [], 8)]:
        width = columns - len(position) - 1 - sum(2 + len(label) + len(value) for label, value in facts)
        if width >= least:
            return position, min(width, 60), facts
    return percentage.strip(), 0, []


def digits(value: float) -> str:
    """Return a loss in six columns, with as many digits as they hold: 0.1234, 12.346, 9.0e-4.

    Parameters
    ----------
    value
        The loss.
    """
    if not math.isfinite(value):
        return f"{value:6}"
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:.4f}"[:6].rstrip(".").rjust(6)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".rjust(6)


def _grouped(value: float) -> str:
    """Return a rate as 12,345."""
    return f"{value:,.0f}" if math.isfinite(value) else "?"


def short(value: float) -> str:
    """Return a rate, the `value`, in five columns: 12.3k."""
    if not math.isfinite(value):
        return "    ?"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip(".").rjust(4) + unit
    return f"{value:5.0f}"


def duration(seconds: float) -> str:
    """Return a time in `seconds` as 0:42, 12:34, 1:02:03 or 3 d 04:05:06."""
    whole = int(min(seconds, 1e9))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours >= 100:
        return f"{hours // 24} d {hours % 24:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
