"""``dbmpi sweep``: train every combination of some settings, several at a time, on the ranks of one job."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.data.importers.table import count
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import Run
    from dbmpi.config.grid import Combination
    from dbmpi.machine.signals import StopSignal
    from dbmpi.runs.sweep import SweptRun

SUMMARY = "train every combination of some settings, several at a time, on the ranks of one job"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="description of the runs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE,...",
        dest="overrides",
        help="values of a setting, e.g. optimizer.learning_rate=0.01,0.03,0.1 (may be repeated)",
    )
    parser.add_argument(
        "--ranks",
        type=count,
        metavar="N",
        help="ranks of each run (default: as many as [topology] needs, or else so many that most runs go on at a time)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train all combinations with these `arguments`, print a table of the results, and return the exit code."""
    from dbmpi.machine.signals import StopSignal

    with StopSignal() as stop:
        return _sweep(arguments, stop)


def _sweep(arguments: argparse.Namespace, stop: StopSignal) -> int:
    from dbmpi.machine.endings import note_message
    from dbmpi.mpi import world

    with world.ranks() as comm:
        directory, combinations, runs = _described(arguments, comm)
        from dbmpi.runs.sweep import SweepBlocks, check_runs

        each = check_runs(runs, comm, arguments.ranks)

        def say(swept: SweptRun) -> None:
            print(f"{combinations[swept.number].name}: {_line(swept)}", flush=True)

        sweep = SweepBlocks(runs, comm, each, stop, say)
        if comm.rank == 0:
            left = comm.size - sweep.blocks * each
            idle = f"; {left} of {comm.size} ranks are left over" if left else ""
            print(
                f"{len(runs)} runs, {sweep.blocks} at a time on {each} rank{'s' if each > 1 else ''} each{idle}",
                flush=True,
            )
        outcomes = sweep.run()
        code = 0
        if comm.rank == 0:
            code = _shown(directory, combinations, runs, outcomes, stop)
            if code:
                note_message(code)
        code = sweep.conclude(code)
        sweep.free()
    return code


def _described(arguments: argparse.Namespace, comm: MPI.Intracomm) -> tuple[Path, list[Combination], list[Run]]:
    """Read all descriptions on one rank, so that all have the same; return also the directory of all (collective)."""
    from dbmpi.config import Run
    from dbmpi.config.grid import Combination, combinations
    from dbmpi.config.reading import read
    from dbmpi.mpi import waiting, world

    text = ""
    with world.together(comm, "reading the configuration"):
        if comm.rank == 0:
            found = combinations(arguments.overrides)
            runs = [read(arguments.config, each.overrides) for each in found]
            if runs[0].data.train is None:
                raise UserError(f"{arguments.config}: 'data.train' is missing: HDF5 file with the training samples")
            directory = runs[0].run.directory
            if any(each.run.directory != directory for each in runs):
                raise UserError(
                    "--set run.directory: a sweep makes a directory for each run below one run.directory; give one"
                )
            quiet = "progress" not in runs[0].monitor.model_fields_set
            for number, (each, one) in enumerate(zip(found, runs, strict=True)):
                section = one.run.model_copy(update={"directory": directory / each.name})
                monitor = one.monitor.model_copy(update={"progress": "none"} if quiet else {})
                runs[number] = one.model_copy(update={"run": section, "monitor": monitor})
            text = json.dumps([str(directory), found, [one.to_json() for one in runs]])
    where, points, texts = json.loads(waiting.broadcast_text(comm, text, 0, "the configurations"))
    named = [Combination(name, tuple(map(tuple, settings)), tuple(words)) for name, settings, words in points]
    return Path(where), named, [Run.from_json(each) for each in texts]


def _line(swept: SweptRun) -> str:
    """Return what has become of a run, on one line."""
    if swept.error:
        return f"{swept.status} after {swept.seconds:.1f} s: {' '.join(swept.error.split())}"
    found = [f"{swept.status} in {swept.seconds:.1f} s"]
    found += [] if swept.loss is None else [f"test loss {swept.loss:.4f}"]
    found += [] if swept.accuracy is None else [f"test accuracy {100 * swept.accuracy:.2f} %"]
    return ", ".join(found)


def _shown(
    directory: Path, combinations: list[Combination], runs: list[Run], outcomes: list[SweptRun], stop: StopSignal
) -> int:
    """Print the table, best first, write it beside the runs, and return the exit code."""
    from dbmpi.cli.tables import table
    from dbmpi.formats.sweep_table import SweepRow, cells, heading, ranked, write

    rows = ranked([SweepRow(*each) for each in zip(combinations, runs, outcomes, strict=True)])
    names = heading(rows)
    print()
    for line in table(names, list(cells(rows)), [*range(len(combinations[0].settings)), len(names) - 1]):
        print(line)
    done = sum(swept.status == "done" for swept in outcomes)
    paths = write(rows, directory)
    print(f"\n{done} of {len(outcomes)} runs done; {' and '.join(map(str, paths))}", flush=True)
    if stop.number:
        return 128 + stop.number
    return 0 if done == len(outcomes) else 1
