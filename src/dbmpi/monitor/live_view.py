"""The live view of a run on a terminal, drawn by Rich from its present state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dbmpi.monitor.display import Bar, digits, duration, short
from dbmpi.monitor.lines import Record
from dbmpi.monitor.live_run import LiveRun

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

# Colours of the 256 that terminals have, near those of the pictures.
_STYLES = {
    "compute": "color(26)",
    "exchange": "color(95)",
    "data": "color(175)",
    "fetch": "color(75)",
    "push": "color(214)",
    "wait": "color(245)",
    "apply": "color(35)",
    "serve": "color(221)",
    "idle": "color(240)",
}
_LETTERS = {"compute": "c", "exchange": "x", "data": "d", "fetch": "f", "push": "p", "apply": "a", "serve": "s"}
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*#%"
_BAR = 24
"""Columns of the bar that shows where a rank's time goes."""
_FIXED = 14
"""Lines of the view beside the tables of ranks."""


def view(
    live: LiveRun, name: str, status: str, *, working: bool, width: int, height: int, plain: bool = False
) -> Group:
    """Return the view.

    Parameters
    ----------
    live
        The state of the run.
    name
        Of the run.
    status
        What the run does now, in a few words.
    working
        Whether it is still at work.
    width, height
        Of the terminal, in characters; ranks that do not fit are left out.
    plain
        Whether to do without colours and block characters.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    head = Text.assemble((_clean(name), "bold"), "  ", (status, "" if plain else "green"))
    lines: list[RenderableType] = [head]
    if (facts := _facts(live, "  -  " if plain else "  ·  ")) and live.session:
        lines.append(Text(facts, style="dim"))
    if not live.workers and not live.shards and not live.evaluations:
        return Group(*lines)
    state = live.display(working=working)
    lines.append(Padding(Bar(lambda: state), 0))  # type: ignore[arg-type]  # it has no end of line of its own
    lines += _curves(live, width, plain)
    lines += _results(live)
    room = max(4, height - _FIXED - len(live.evaluations))
    shards = min(len(live.shards), max(1, room // 3))
    workers = min(len(live.workers), max(1, room - shards))
    if live.workers:
        lines += [Text(""), _table("worker", live.workers, workers, plain)]
    if live.shards:
        lines += [Text(""), _table("shard", live.shards, shards, plain)]
    return Group(*lines)


def sparkline(values: Sequence[float], columns: int, letters: str = _BLOCKS) -> str:
    """Return a curve as a line of characters.

    Parameters
    ----------
    values
        From left to right.
    columns
        At most so many characters; neighbours are averaged.
    letters
        From the lowest to the highest.
    """
    if len(values) > columns > 0:
        edges = [round(column * len(values) / columns) for column in range(columns + 1)]
        groups = (values[first:last] for first, last in pairwise(edges))
        values = [sum(group) / len(group) for group in groups]
    low, high = min(values, default=0.0), max(values, default=0.0)
    # A loss falls by decades; what happens late can be seen on a logarithmic scale only.
    logarithmic = 0 < low < high / 10

    def level(value: float) -> int:
        share = (value - low) / (high - low) if high > low else 0.0
        if logarithmic:
            share = math.log(value / low) / math.log(high / low)
        return min(int(share * len(letters)), len(letters) - 1)

    return "".join(letters[level(value)] for value in values)


def shares_bar(seconds: Mapping[str, float | None], columns: int) -> list[tuple[str, int]]:
    """Return how many columns each activity has in a bar; together exactly `columns`, unless no time is known.

    Parameters
    ----------
    seconds
        By activity.
    columns
        Width of the bar.
    """
    known = {name: value for name, value in seconds.items() if value is not None and value > 0}
    total = sum(known.values())
    if not total or not math.isfinite(total):
        return []
    bars, done, edge = [], 0.0, 0
    for name in sorted(known, key=lambda one: (list(_STYLES).index(one) if one in _STYLES else len(_STYLES), one)):
        done += known[name]
        last = round(columns * min(1.0, done / total))
        if last > edge:
            bars.append((name, last - edge))
        edge = last
    return bars


def _facts(live: LiveRun, between: str) -> str:
    start = live.start
    if start is None:
        return f"session {live.session}"
    parts = [f"session {live.session}"] if live.session > 1 else []
    parts.append(_count(start["ranks"], "rank"))
    parts.append(f"{_count(start['shards'], 'shard')}, {_count(start['replicas'], 'replica')}")
    if start["partitions"] > 1:
        parts[-1] += f" of {start['partitions']} partitions"
    parts += [f"{start['parameters']:,} parameters", _clean(start["method"])]
    return between.join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _curves(live: LiveRun, width: int, plain: bool) -> list[Text]:
    from rich.text import Text

    letters, columns = (_PLAIN if plain else _BLOCKS), max(10, min(60, width - 44))
    replicas = len(live.replicas)
    lines = []
    for label, values, shown, unit in (
        ("loss", live.loss.means(), digits, ""),
        ("rate", [replicas * value for value in live.rate.means()], short, " samples/s"),
    ):
        if values:
            curve = (sparkline(values, columns, letters), "" if plain else "color(75)")
            ends = f"  {shown(values[0]).strip()} {'to' if plain else '→'} {shown(values[-1]).strip()}"
            lines.append(
                Text.assemble((f"{label:>5} ", "dim"), curve, ends, (unit, "dim"), no_wrap=True, overflow="crop")
            )
    return lines


def _results(live: LiveRun) -> list[RenderableType]:
    from rich.text import Text

    lines: list[RenderableType] = []
    for one in list(live.evaluations)[-3:]:
        accuracy = "" if one["accuracy"] is None else f"   accuracy {100 * one['accuracy']:.2f} %"
        best = "   best" if one is live.best else ""
        lines.append(
            Text.assemble(
                (" test ", "dim"),
                f"epoch {one['epoch'] or 0:<6.4g} loss {digits(one['loss'])}{accuracy}",
                (best, "bold"),
            )
        )
    if live.checkpoint is not None:
        saved = live.checkpoint
        what = f"{_clean(saved['name'])}, {saved['bytes'] / 2**20:,.1f} MiB after {duration(saved['elapsed'])}"
        lines.append(Text.assemble(("saved ", "dim"), what))
    for what, numbers in (("replica", live.lost), ("shard", live.rescued)):
        if numbers:
            some = ", ".join(map(str, sorted(numbers)[:8])) + (", ..." if len(numbers) > 8 else "")
            lines.append(Text(f" lost {what}{'s' if len(numbers) > 1 else ''} {some}", style="bold red"))
    return lines


def _table(role: str, ranks: Mapping[int, Record], most: int, plain: bool) -> Table:
    """Return the table of a role; of many ranks, those that are slowest."""
    from rich.table import Table

    shown = sorted(ranks)
    if len(shown) > most:
        key = _slowness if role == "worker" else _load
        shown = sorted(sorted(shown, key=lambda number: key(ranks[number]))[:most])
    title = role
    if len(shown) < len(ranks):
        title = f"{'slowest' if role == 'worker' else 'busiest'} {len(shown)} of {len(ranks):,}"
    columns = ("steps", "samples/s", "loss") if role == "worker" else ("pushes", "staleness", "queue")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(_legend(ranks, plain), no_wrap=True)
    for number in shown:
        report = ranks[number]
        cells = _worker_cells(report) if role == "worker" else _shard_cells(report)
        table.add_row(f"{number:>4}", *cells, _shares(report["seconds"], plain))
    return table


def _worker_cells(report: Record) -> list[str]:
    loss = "-" if report["loss"] is None else digits(report["loss"]).strip()
    return [f"{report['step']:,}", f"{report['samples_per_second'] or 0:,.0f}", loss]


def _shard_cells(report: Record) -> list[str]:
    mean = report["staleness"].get("mean")
    return [f"{report['pushes']:,}", "-" if mean is None else f"{mean:.2f}", f"{report['queue'] or 0:g}"]


def _slowness(report: Record) -> float:
    return float(report["samples_per_second"] or 0.0)


def _load(report: Record) -> float:
    return -float((report["seconds"].get("apply") or 0.0) + (report["seconds"].get("serve") or 0.0))


def _shares(seconds: Mapping[str, float | None], plain: bool) -> Text:
    from rich.text import Text

    text = Text(no_wrap=True)
    for name, columns in shares_bar(seconds, _BAR):
        letter = _LETTERS.get(name, ".")
        text.append(letter * columns if plain else "█" * columns, style="" if plain else _STYLES.get(name, ""))
    return text


def _legend(ranks: Mapping[int, Record], plain: bool) -> Text:
    """Return the names of the activities, as the head of the column with the bars."""
    from rich.text import Text

    used = {name for report in ranks.values() for name, value in report["seconds"].items() if value}
    text = Text(no_wrap=True, overflow="ellipsis")
    for name in [*filter(used.__contains__, _STYLES), *sorted(used - set(_STYLES))][:8]:
        if plain:
            text.append(f"{_LETTERS.get(name, '.')}={_clean(name)} ")
        else:
            text.append("█", style=f"not dim {_STYLES.get(name, '')}").append(f" {_clean(name)} ", style="not dim")
    return text


def _clean(text: Any) -> str:
    """Return a text of strangers without what could control the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text)[:200])
