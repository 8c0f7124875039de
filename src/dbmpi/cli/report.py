"""``dbmpi report``: everything about a run in one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from dbmpi.cli import options
from dbmpi.cli.plot import read

SUMMARY = "write one HTML file with everything about a run, for a browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument("directory", metavar="RUN_DIR", type=Path, help="directory of the run (run.directory)")
    parser.add_argument(
        "--out", metavar="FILE.html", type=Path, help="file to write, or replace (default: RUN_DIR/report.html)"
    )
    parser.add_argument(
        "--evaluation",
        metavar="FILE.json",
        type=Path,
        help="show this evaluation, too: what `dbmpi evaluate RUN_DIR --data FILE --details --json` has printed",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report with these `arguments`, print its path, and return the exit code."""
    directory = arguments.directory
    options.refuse_configuration(directory, "report", "the directory of a run")

    from dbmpi.checkpoint.run_presence import RunPresence
    from dbmpi.formats import evaluation_section, report

    evaluation = None if arguments.evaluation is None else evaluation_section.read(arguments.evaluation)
    out = arguments.out or directory / "report.html"
    working = RunPresence(directory).look()
    report.write(read(directory), directory.resolve().name, out, working=working, evaluation=evaluation)
    print(out)
    return 0
