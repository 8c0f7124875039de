"""``dbmpi train``: train a network or an objective under mpirun, srun, or alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from dbmpi.cli import options
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import Run
    from dbmpi.machine.signals import StopSignal
    from dbmpi.result import Result

SUMMARY = "train the network, or your own objective, that a configuration describes (under mpirun or srun, or alone)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    options.add_configuration(parser, "description of the run", "optimizer.epochs=5")


def run(arguments: argparse.Namespace) -> int:
    """Train with these `arguments`, print the result, and return the exit code."""
    from dbmpi.machine.signals import StopSignal

    # A signal that comes while libraries are loaded and kernels are compiled ends the run, too, and not the process.
    with StopSignal() as stop:
        return _train(arguments, stop)


def _train(arguments: argparse.Namespace, stop: StopSignal) -> int:
    from dbmpi.mpi import world
    from dbmpi.mpi.replacement import Replacements
    from dbmpi.mpi.watch import RanksMissing

    with world.ranks() as started:
        replacements = Replacements(started)
        while True:
            comm = replacements.comm
            run = described(arguments, comm)
            from dbmpi.runs.training import train

            try:
                result = train(run, comm, stop, replacements=replacements)
                break
            except RanksMissing as error:
                missing = str(error)
            # Not before: with the error, everything goes that this attempt has held.
            world.go_on(replacements.renew(missing))
    if comm.rank == 0:
        print_result(result, run.run.directory)
    code = exit_code(result)
    if not replacements.first:
        world.leave(code, replacements.elder)
    return code


def described(arguments: argparse.Namespace, comm: MPI.Intracomm) -> Run:
    """Read the configuration on one rank, so that all have the same, and a mistake in it is reported once (collective).

    Parameters
    ----------
    arguments
        With the file and the settings that override it.
    comm
        All ranks.
    """
    from dbmpi.config import Run
    from dbmpi.config.reading import read
    from dbmpi.mpi import waiting, world

    text = ""
    with world.together(comm, "reading the configuration"):
        if comm.rank == 0:
            found = read(arguments.config, tuple(arguments.overrides))
            if found.data.train is None:
                raise UserError(
                    f"{arguments.config}: 'data.train' is missing: HDF5 file with the training samples; arrays are "
                    "given from Python, to dbmpi.train(run, data=...)"
                )
            text = found.to_json()
    return Run.from_json(waiting.broadcast_text(comm, text, 0, "the configuration"))


def exit_code(result: Result) -> int:
    """Return the exit code of a run that has come to this `result`."""
    if result.stopped_by:
        return 128 + result.stopped_by
    # The parameters are in the checkpoint; but the exit code warns that they are not usable.
    return 0 if result.test is None or result.test.are_numbers else 1


def print_result(result: Result, directory: Path, first: Mapping[str, str] = MappingProxyType({})) -> None:
    """Print what a run has come to.

    Parameters
    ----------
    result
        Its result.
    directory
        Of the run.
    first
        Lines before the others, by what they are about.
    """
    from dbmpi.checkpoint.directory import BEST, read_pointer

    lines = dict(first)
    if result.test is not None:
        accuracy, of = result.test.accuracy, f"({result.test.correct:,} of {result.test.samples:,})"
        lines["test loss"] = f"{result.test.mean_loss:.4f}"
        if accuracy is not None:
            lines["test accuracy"] = f"{100 * accuracy:.2f} %  {of}"
        lines |= {f"test {name}": f"{mean:.6g}" for name, mean in result.test.metrics.items()}
    if result.steps:
        lines["steps"] = f"{result.steps:,} in {result.seconds:.1f} s"
        lines["samples/s"] = f"{result.samples / max(result.seconds, 1e-9):,.0f}"
        if math.isfinite(result.staleness):
            lines["mean staleness"] = f"{result.staleness:.2f}"
    if result.withheld:
        lines["withheld"] = f"{result.withheld:,} (pushes of gradients that were not finite)"
    if result.discarded:
        lines["stale"] = f"{result.discarded:,} (pushes that shards have dropped)"
    lines |= {"ended": result.ended, "checkpoint": str(result.checkpoint)}
    best = read_pointer(result.checkpoint.parent, BEST)
    if best is not None and best != result.checkpoint:
        lines["best"] = str(best)
    lines["records"] = str(directory / "records")
    last = {"lost replicas": ", ".join(map(str, result.lost)), "advice": result.advice, "warning": result.warning}
    for name, value in (lines | last).items():
        if value:
            print(f"{name:>14}  {value}", flush=True)
