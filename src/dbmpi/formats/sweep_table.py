"""What has become of the runs of a sweep, best first: for a terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dbmpi.checkpoint.judge import Criterion
from dbmpi.config import Run
from dbmpi.config.grid import Combination
from dbmpi.formats.whole_file import whole_file
from dbmpi.runs.sweep import SweptRun

_ERROR_SHOWN = 80


class SweepRow(NamedTuple):
    """A run of a sweep."""

    combination: Combination
    run: Run
    swept: SweptRun

    @property
    def value(self) -> float | None:
        """The metric by which runs are compared, on the test data; None where there is none."""
        monitor, swept = self.run.monitor, self.swept
        if swept.status != "done":
            return None
        return Criterion(monitor.metric, monitor.higher).value(swept.loss, swept.accuracy, dict(swept.metrics))

    @property
    def fields(self) -> dict[str, Any]:
        """Everything by name: the settings that vary, then what came out."""
        swept = self.swept
        rate = swept.samples / swept.seconds if swept.seconds else 0.0
        return {
            "run": self.combination.name,
            **dict(self.combination.settings),
            "status": swept.status,
            "test_loss": swept.loss,
            "test_accuracy": swept.accuracy,
            **{f"test_{name}": mean for name, mean in swept.metrics},
            "steps": swept.steps,
            "samples": swept.samples,
            "seconds": round(swept.seconds, 3),
            "samples_per_second": round(rate, 1),
            "checkpoint": swept.checkpoint,
            "error": swept.error,
        }


def ranked(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Return rows with the best value of the test metric first; those without one stay in their order, at the end."""

    def order(row: SweepRow) -> float:
        value = row.value
        return math.inf if value is None else -value if row.run.monitor.higher else value

    return sorted(rows, key=order)


def heading(rows: Sequence[SweepRow]) -> list[str]:
    """Return the names of the columns of :func:`cells`, which is given the same `rows`."""
    settings = [key for key, _ in rows[0].combination.settings]
    metrics = dict.fromkeys(name for row in rows for name, _ in row.swept.metrics)
    return [
        *settings,
        "test loss",
        "test accuracy",
        *(f"test {name}" for name in metrics),
        "steps",
        "seconds",
        "status",
    ]


def cells(rows: Sequence[SweepRow]) -> Iterator[list[str]]:
    """Yield the cells of each of the `rows`, for people."""
    metrics = dict.fromkeys(name for row in rows for name, _ in row.swept.metrics)
    for row in rows:
        swept, own = row.swept, dict(row.swept.metrics)
        error = " ".join(swept.error.split())
        status = f"{swept.status}: {error[:_ERROR_SHOWN]}" if error else swept.status
        yield [
            *(value for _, value in row.combination.settings),
            "" if swept.loss is None else f"{swept.loss:.4f}",
            "" if swept.accuracy is None else f"{100 * swept.accuracy:.2f} %",
            *(f"{own[name]:.6g}" if name in own else "" for name in metrics),
            f"{swept.steps:,}" if swept.steps else "",
            f"{swept.seconds:.1f}" if swept.seconds else "",
            status,
        ]


def write(rows: Sequence[SweepRow], directory: Path) -> list[Path]:
    """Write ``sweep.csv`` and ``sweep.json`` into a directory, and return their paths.

    Parameters
    ----------
    rows
        In the order in which they are to be written.
    directory
        Made if missing.

    Raises
    ------
    UserError, DiskFailed
        If a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fields = [row.fields for row in rows]
    names = list(dict.fromkeys(name for each in fields for name in each))
    text = io.StringIO()
    table = csv.DictWriter(text, names, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(fields)
    document = json.dumps({"metric": rows[0].run.monitor.metric, "runs": fields}, indent=1) + "\n"
    paths = []
    for name, content in (("sweep.csv", text.getvalue()), ("sweep.json", document)):
        paths.append(directory / name)
        with whole_file(paths[-1]) as file:
            file.write(content.encode())
    return paths
