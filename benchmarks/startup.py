"""How long ``import dbmpi`` and every ``--help`` take.

They start no MPI and load neither NumPy nor Numba, so that a shell's completion, a batch script's check or a look at
the options is answered at once, also on a login node.  A value is the median of whole processes, from the start of
Python to its end; Python's own start is in it and is shown beside it.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
from collections.abc import Iterator

import common

MOST_SECONDS = 0.3
BARE, IMPORT = "python -c pass", "import dbmpi"


def main() -> None:
    """Measure all of them in turn."""
    options = common.options(__doc__)
    report = common.Report("startup", options.json)
    programs = {
        BARE: ["-c", "pass"],
        IMPORT: ["-c", "import dbmpi"],
        **{" ".join(["dbmpi", *words, "--help"]): ["-m", "dbmpi", *words, "--help"] for words in commands()},
    }
    seconds = common.in_turn(
        3 if options.quick else 15, **{name: functools.partial(run, words) for name, words in programs.items()}
    )
    rows = [(name, common.median(values), common.spread(values)) for name, values in seconds.items()]
    report.table("Whole processes, in turn (seconds)", ("what", "median", "quartiles"), rows)
    for name, median, _ in rows:
        if name != BARE:
            report.at_most(f"seconds: {name}", median, MOST_SECONDS)
    report.finish()


def run(words: list[str]) -> float:
    """Run Python once and return the seconds that it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def commands() -> Iterator[list[str]]:
    """Yield the words of every command, and of the commands below it."""
    from dbmpi.cli import main as program

    yield []
    for name in program.COMMANDS:
        yield from _below(_choices(program._parser([name]))[name], [name])


def _below(parser: argparse.ArgumentParser, words: list[str]) -> Iterator[list[str]]:
    yield words
    for name, child in _choices(parser).items():
        yield from _below(child, [*words, name])


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


if __name__ == "__main__":
    main()
