"""``dbmpi plot``: draw a run, or several beside one another, from their records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.cli import options
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from dbmpi.monitor.history import RunHistory

SUMMARY = "draw loss, accuracy, throughput, staleness and where the time goes, from the records of runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument(
        "directories",
        metavar="RUN_DIR",
        type=Path,
        nargs="+",
        help="directory of a run (run.directory); several are drawn beside one another",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to put the pictures (default: RUN_DIR/plots; of several runs: plots in the current directory)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE.json",
        type=Path,
        help="write the timeline of all ranks, too, in Chrome's trace format, for ui.perfetto.dev (of one run)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw with these `arguments`, print the paths of the pictures, and return the exit code."""
    directories = arguments.directories
    for directory in directories:
        options.refuse_configuration(directory, "plot", "the directory of a run")
    if len(directories) > 1:
        return _compare(arguments)

    from dbmpi.monitor.plots import draw_history

    (directory,), name = directories, directories[0].resolve().name
    history = read(directory)
    if arguments.trace is not None:
        from dbmpi.monitor import chrome_trace

        chrome_trace.write(history, name, arguments.trace)
    for path in draw_history(history, name, arguments.out or directory / "plots"):
        print(path)
    if arguments.trace is not None:
        print(arguments.trace)
    return 0


def read(directory: Path) -> RunHistory:
    """Return the history of the run in a `directory`; lines that are no records are counted on standard error."""
    from dbmpi.monitor.history import RunHistory
    from dbmpi.monitor.records import read_records

    records = read_records(directory)
    if records.skipped:
        print(f"{directory}: skipped {records.skipped} lines that are torn or no records", file=sys.stderr)
    return RunHistory(records)


def _compare(arguments: argparse.Namespace) -> int:
    """Draw several runs, and print a table of their results."""
    if arguments.trace is not None:
        raise UserError(
            f"--trace: given {len(arguments.directories)} runs, and a trace is the timeline of one; name one run"
        )
    from dbmpi.cli.tables import printable, table
    from dbmpi.monitor import run_comparison

    called = run_comparison.names(arguments.directories)
    runs = [run_comparison.NamedRun(name, read(path)) for name, path in zip(called, arguments.directories, strict=True)]
    path = run_comparison.draw(runs, arguments.out or Path("plots"))
    heading, rows = run_comparison.table(runs)
    for line in table(heading, [[printable(row[0]), *row[1:]] for row in rows], left=(0,)):
        print(line)
    print(path)
    return 0
