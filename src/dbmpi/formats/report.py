"""A report on a run: one HTML file with everything in it, for a browser without a network."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dbmpi
from dbmpi.errors import UserError
from dbmpi.formats.evaluation_section import evaluation_section
from dbmpi.formats.html import Html, table, tag
from dbmpi.formats.report_style import GLOSSARY, STYLE
from dbmpi.monitor import panels
from dbmpi.monitor.display import duration
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.lines import Record
from dbmpi.monitor.pictures import figures
from dbmpi.monitor.timeline_panels import timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_ROWS = 40
"""Of a table; of more, the first and the last ones are shown."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing but what is in it."""


def write(history: RunHistory, name: str, path: Path, *, working: bool, evaluation: Any = None) -> None:
    """Write the report.

    Parameters
    ----------
    history
        The run.
    name
        Of the run.
    path
        The file, which is replaced when the new one is complete.
    working
        Whether the run still goes on.
    evaluation
        What ``dbmpi evaluate --details --json`` has printed about it, as read from JSON.

    Raises
    ------
    UserError
        If Matplotlib is missing, the evaluation is something else, or the file cannot be written.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():  # before it is drawn, which takes seconds
        what = "is a directory" if path.is_dir() else "is in a directory that does not exist"
        raise UserError(f"{path}: {what}; expected the name of a file to write, e.g. --out report.html")
    content = page(history, name, working=working, evaluation=evaluation).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write the report: {error.strerror}") from None


def page(history: RunHistory, name: str, *, working: bool, evaluation: Any = None) -> str:
    """Return the report as text; the arguments are those of :func:`write`.

    Parameters
    ----------
    history, name, working, evaluation
        As there.
    """
    sections = [
        ("learning", "What it learned", _learning(history)),
        ("by-class", "Evaluation in detail", evaluation_section(evaluation)),
        ("speed", "How fast it was", _speed(history)),
        ("timeline", "What each rank did when", _timeline(history)),
        ("events", "What happened", _events(history)),
        ("ranks", "The ranks", _ranks(history)),
        ("configuration", "Configuration", _configuration(history)),
    ]
    there = [(anchor, title, parts) for anchor, title, parts in sections if parts]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in there]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name} - dbmpi report"),
        tag("style", Html(STYLE)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", name),
            tag("p", _sentence(history, working=working), class_="lead"),
            _cards(history),
            tag("nav", *links),
        ),
        tag("main", *(tag("section", tag("h2", title), *parts, id=anchor) for anchor, title, parts in there)),
        tag("footer", f"Made on {made} by dbmpi {dbmpi.__version__} from the records of the run."),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def _sentence(history: RunHistory, *, working: bool) -> str:
    """Return in a sentence what this is about."""
    starts, summary = history.session_starts, history.summary()
    parts = []
    if starts:
        one = starts[-1]
        method = "Sandblaster" if one["method"] == "sandblaster" else "Downpour SGD"
        parts.append(
            f"A training by {method} of {one['parameters']:,} parameters on {_count(one['ranks'], 'rank')}: "
            f"{_count(one['shards'], 'shard')} with the parameters, {_count(one['replicas'], 'replica')} of the model"
            + (f", each cut over {one['partitions']} ranks" if one["partitions"] > 1 else "")
            + (f"; and {_count(one['evaluators'], 'evaluator')}." if one["evaluators"] else ".")
        )
    else:
        parts.append(
            f"A training on {_count(len(history.workers), 'worker')} and {_count(len(history.shards), 'shard')}."
        )
    if history.sessions:
        began = min((record["time"] - record["elapsed"] for record in _all(history)), default=None)
        when = "" if began is None else f" on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(began))}"
        parts.append(f"It began{when}" + (" and still goes on." if working else "."))
    if summary.sessions > 1:
        parts.append(f"It was started {summary.sessions} times, and each time went on from its last checkpoint.")
    if lost := [one for one in history.lost if one.role == "replica"]:
        parts.append(f"{_count(len(lost), 'replica')} died on the way.")
    return " ".join(parts)


def _cards(history: RunHistory) -> Html:
    """Return the results in large numbers."""
    found = history.summary()
    cards = []

    def card(label: str, value: str, note: str = "") -> None:
        cards.append(tag("div", tag("b", value), tag("span", label), tag("small", note), class_="card"))

    if found.test_accuracy is not None:
        best = max((one["accuracy"] for one in history.evaluations if one["accuracy"] is not None), default=0.0)
        card("test accuracy", f"{100 * found.test_accuracy:.2f} %", f"best {100 * best:.2f} %")
    if found.test_loss is not None:
        card("test loss", f"{found.test_loss:.4g}", f"training {_number(found.train_loss, '.4g')}")
    total = history.session_starts[-1]["epochs"] if history.session_starts else None
    card("epochs", f"{found.epochs:.4g}", "" if total is None else f"of {total:g}")
    card("training time", duration(found.seconds), f"{found.samples:,} samples")
    card("samples a second", _number(found.samples_per_second, ",.0f"), "all replicas together")
    if history.shards:
        card("mean staleness", _number(found.mean_staleness, ".2f"), "updates by others between fetch and push")
    return tag("div", *cards, class_="cards")


def _learning(history: RunHistory) -> list[Html]:
    parts = [
        tag(
            "p",
            "Points are the reports of single replicas, the blue line is their running mean, and the orange points are "
            "evaluations on samples that are held out. Training that goes on while the test result gets worse is "
            "overfitting.",
        )
    ]
    made = []
    for key, panel in (("loss", panels.loss), ("accuracy", panels.accuracy)):
        if key == "accuracy" and not any(one[key] is not None for one in [*history.evaluations, *_workers(history)]):
            continue
        made += [
            _picture(partial(_single, partial(panel, history=history, by="samples")), f"{key} over training samples"),
            _picture(partial(_single, partial(panel, history=history, by="seconds")), f"{key} over training time"),
        ]
    parts.append(tag("div", *made, class_="grid"))
    if history.evaluations:
        rows = [
            (
                f"{one['epoch'] or 0:.4g}",
                duration(history.seconds(one)),
                _number(one["loss"], ".5g"),
                "" if one["accuracy"] is None else f"{100 * one['accuracy']:.2f} %",
                f"{one['samples']:,}",
                ", ".join(f"{key} {_number(value, '.5g')}" for key, value in (one["metrics"] or {}).items()),
            )
            for one in history.evaluations
        ]
        heading = ("epoch", "time", "test loss", "test accuracy", "samples", "other metrics")
        parts.append(tag("details", tag("summary", f"{len(rows)} evaluations"), table(heading, _some(rows), left=(5,))))
    return parts


def _speed(history: RunHistory) -> list[Html]:
    pictures = [
        _picture(partial(_single, partial(panels.throughput, history=history)), "samples per second over time"),
        _picture(partial(_single, partial(panels.staleness, history=history)), "histogram of the staleness of pushes"),
    ]
    pictures += [
        _picture(partial(_bars, history, role), f"where the time of {role}s goes")
        for role, ranks in (("worker", history.workers), ("shard", history.shards))
        if ranks
    ]
    return [
        tag("div", *pictures, class_="grid"),
        tag(
            "details",
            tag("summary", "What the words mean"),
            tag("dl", *(part for word, meaning in GLOSSARY for part in (tag("dt", word), tag("dd", meaning)))),
        ),
    ]


def _timeline(history: RunHistory) -> list[Html]:
    if not history.workers and not history.shards and not history.traces:
        return []
    return [
        tag(
            "p",
            "Above, the whole run: at each time the height of a colour is that activity's share of a rank's time. "
            "Below, a few steps, phase by phase. The same for every rank, to zoom into: ",
            tag("code", "dbmpi plot RUN_DIR --trace trace.json"),
            ", and open that file at ui.perfetto.dev.",
        ),
        tag("div", _picture(lambda figure: timeline(figure, history), "timeline of the ranks"), class_="scroll wide"),
    ]


def _events(history: RunHistory) -> list[Html]:
    rows: list[tuple[float, str, str]] = []
    for one in history.session_starts:
        again = "begins" if one["session"] == 1 else "goes on"
        rows.append(
            (history.seconds(one), f"session {one['session']} {again}", f"{one['samples_before']:,} samples so far")
        )
    for one in history.checkpoints:
        size = f"{one['bytes'] / 2**20:,.1f} MiB in {one['seconds'] or 0:.2f} s"
        rows.append((history.seconds(one), "checkpoint", f"{one['name']}: {size}"))
    rows += [(lost.seconds, "a loss", str(lost)) for lost in history.lost]
    for one in history.rescues:
        about = f"shard {one['shard']}; its mirror is in {one['name']}, without {one['updates']:,} updates"
        rows.append((history.seconds(one), "a shard is lost", about))
    rows += [
        (history.seconds(one), f"session {one['session']} ends early", one["reason"]) for one in history.early_ends
    ]
    facts = []
    if history.withheld:
        facts.append(tag("p", f"{history.withheld:,} pushes were withheld, because their gradients were not finite."))
    if history.discarded:
        facts.append(tag("p", f"{history.discarded:,} pushes were dropped by shards, because they came too late."))
    if not rows:
        return facts
    shown = [(duration(at), what, about) for at, what, about in sorted(rows)]
    return [*facts, table(("time", "event", ""), _some(shown), left=(0, 1, 2))]


def _ranks(history: RunHistory) -> list[Html]:
    parts = []
    for role, ranks in (("worker", history.workers), ("shard", history.shards)):
        if not ranks:
            continue
        counts = (
            ("steps", "samples", "samples/s") if role == "worker" else ("pushes", "mean staleness", "longest queue")
        )
        rows = []
        for number, reports in ranks.items():
            seconds = panels.add_up(report["seconds"] for report in reports)
            total = max(sum(seconds.values()), 1e-9)
            main = sorted(seconds.items(), key=lambda one: -one[1])[:3]
            shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in main)
            cells = _worker(reports) if role == "worker" else _shard(reports)
            rows.append((f"{role} {number}", *cells, shares))
        parts.append(table((role, *counts, "most of its time"), _some(rows), left=(0, 4)))
    return parts


def _worker(reports: Sequence[Record]) -> tuple[str, str, str]:
    ends = _last_of_sessions(reports)
    busy = sum(value or 0.0 for report in reports for value in report["seconds"].values())
    samples = sum(report["samples"] for report in ends)
    rate = samples / busy if busy > 0 else math.nan
    return f"{sum(report['step'] for report in ends):,}", f"{samples:,}", _number(rate, ",.0f")


def _shard(reports: Sequence[Record]) -> tuple[str, str, str]:
    pushes = sum(report["pushes"] for report in _last_of_sessions(reports))
    counts = [(int(key), count) for report in reports for key, count in report["staleness_histogram"].items()]
    total = sum(count for _, count in counts)
    mean = sum(key * count for key, count in counts) / total if total else math.nan
    return f"{pushes:,}", _number(mean, ".2f"), f"{max(report['queue'] or 0 for report in reports):g}"


def _configuration(history: RunHistory) -> list[Html]:
    known = [one["configuration"] for one in history.session_starts if one["configuration"]]
    if not known:
        return [
            tag("p", "The records do not hold it; ", tag("code", "dbmpi inspect RUN_DIR"), " reads a checkpoint's.")
        ]
    try:
        shown = json.dumps(json.loads(known[-1]), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        shown = known[-1]
    return [tag("details", tag("summary", "All settings of the last session"), tag("pre", shown))]


def _single(panel: Callable[..., None], figure: Figure) -> None:
    figure.set_size_inches(6.2, 4.2)
    panel(figure.subplots())


def _bars(history: RunHistory, role: str, figure: Figure) -> None:
    bars = min(panels.MOST_BARS, max(len(history.workers), len(history.shards), 1))
    figure.set_size_inches(6.2, max(2.4, 1.9 + 0.3 * bars))
    panels.time_spent(figure.subplots(), history, role)


def _picture(draw: Callable[[Figure], None], what: str) -> Html:
    """Return a picture that is in the page itself."""
    figure_of, style = figures()
    out = io.BytesIO()
    with style():
        figure = figure_of()
        draw(figure)
        figure.savefig(out, format="png", dpi=130)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return tag("img", src=f"data:image/png;base64,{data}", alt=what)


def _some(rows: Sequence[Sequence[object]]) -> list[Sequence[object]]:
    """Return the rows, of many the first and the last."""
    if len(rows) <= _MOST_ROWS:
        return list(rows)
    half = _MOST_ROWS // 2
    between = (f"… {len(rows) - 2 * half:,} more …", *[""] * (len(rows[0]) - 1))
    return [*rows[:half], between, *rows[-half:]]


def _last_of_sessions(reports: Sequence[Record]) -> list[Record]:
    return list({report["session"]: report for report in reports}.values())


def _workers(history: RunHistory) -> Iterable[Record]:
    return (report for reports in history.workers.values() for report in reports)


def _all(history: RunHistory) -> Iterable[Record]:
    yield from _workers(history)
    yield from (report for reports in history.shards.values() for report in reports)
    yield from history.evaluations
    yield from history.session_starts


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
