"""``dbmpi data import``: other formats to data files."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dbmpi.data.importers.table import IMPORTERS, Importer

if TYPE_CHECKING:
    from dbmpi.data.importers.reading import Progress

SUMMARY = "convert data to the HDF5 files that dbmpi learns from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to `parser`: those that the importers declare."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "make a data file from another format"
    kinds = actions.add_parser("import", help=text, description=text).add_subparsers(
        title="kinds", metavar="KIND", required=True
    )
    for importer in IMPORTERS:
        summary = importer.summary
        _add(kinds.add_parser(importer.kind, help=summary, description=f"Make a data file from {summary}."), importer)


def run(arguments: argparse.Namespace) -> int:
    """Import as the parsed `arguments` say, print what was written, and return the exit code."""
    options = {name: getattr(arguments, name) for name in arguments.parameters}
    with _progress() as progress:
        written = arguments.importer.load()(**options, progress=progress)
    for each in written if isinstance(written, list) else [written]:
        print(each, flush=True)
    return 0


def _add(parser: argparse.ArgumentParser, importer: Importer) -> None:
    alternatives = None
    parameters = ["force"]
    for argument in importer.arguments:
        if argument.alternative:
            alternatives = alternatives or parser.add_mutually_exclusive_group()
        target = alternatives if argument.alternative and alternatives else parser
        parameters.append(target.add_argument(argument.name, **argument.settings).dest)
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.set_defaults(importer=importer, parameters=parameters)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Show a bar on a terminal; elsewhere the lines at the end are enough."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("importing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
