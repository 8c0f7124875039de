"""``dbmpi plot``: draw a run from its records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dbmpi.cli import options

SUMMARY = "draw loss, accuracy, throughput, staleness and where the time goes, from a run's records"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument("directory", metavar="RUN_DIR", type=Path, help="directory of the run (run.directory)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to put the pictures (default: RUN_DIR/plots)")


def run(arguments: argparse.Namespace) -> int:
    """Draw with these `arguments`, print the paths of the pictures, and return the exit code."""
    options.refuse_configuration(arguments.directory, "plot", "the directory of a run")

    from dbmpi.monitor.history import RunHistory
    from dbmpi.monitor.plots import draw_history
    from dbmpi.monitor.records import read_records

    records = read_records(arguments.directory)
    if records.skipped:
        print(f"{arguments.directory}: skipped {records.skipped} lines that are torn or no records", file=sys.stderr)
    out = arguments.out or arguments.directory / "plots"
    for path in draw_history(RunHistory(records), arguments.directory.resolve().name, out):
        print(path)
    return 0
