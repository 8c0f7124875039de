"""``dbmpi train``: train a network under mpirun, srun, or alone."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import Run
    from dbmpi.machine.signals import StopSignal
    from dbmpi.result import Result

SUMMARY = "train the network that a configuration describes (under mpirun or srun, or alone)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="description of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override a setting of the file, e.g. optimizer.epochs=5 (may be repeated)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train and print what came out."""
    from dbmpi.machine.signals import StopSignal

    # A signal that comes while libraries are loaded and kernels are compiled ends the run, too, and not the process.
    with StopSignal() as stop:
        return _train(arguments, stop)


def _train(arguments: argparse.Namespace, stop: StopSignal) -> int:
    from dbmpi.mpi import world

    with world.ranks() as comm:
        described = _described(arguments, comm)
        from dbmpi.runs.training import train

        result = train(described, comm, stop)
    if comm.rank == 0:
        _print(result, described.run.directory)
    if result.stopped_by:
        return 128 + result.stopped_by
    # What was learned is in the checkpoint; but nobody should take it for good.
    return 0 if result.test is None or result.test.are_numbers else 1


def _described(arguments: argparse.Namespace, comm: MPI.Intracomm) -> Run:
    """Read the configuration on one rank, so that all have the same, and a mistake in it is told once."""
    from dbmpi import config
    from dbmpi.mpi import waiting, world

    text = ""
    with world.together(comm, "reading the configuration"):
        if comm.rank == 0:
            text = config.load(arguments.config, tuple(arguments.overrides)).to_json()
    return config.Run.from_json(waiting.broadcast_text(comm, text, 0, "the configuration"))


def _print(result: Result, directory: Path) -> None:
    lines = []
    if result.test is not None:
        accuracy = result.test.accuracy
        lines.append(("test loss", f"{result.test.mean_loss:.4f}"))
        if accuracy is not None:
            lines.append(
                ("test accuracy", f"{100 * accuracy:.2f} %  ({result.test.correct:,} of {result.test.samples:,})")
            )
    if result.steps:
        lines += [
            ("steps", f"{result.steps:,} in {result.seconds:.1f} s"),
            ("samples/s", f"{result.samples / max(result.seconds, 1e-9):,.0f}"),
        ]
        if math.isfinite(result.staleness):
            lines.append(("mean staleness", f"{result.staleness:.2f}"))
    lines += [
        ("checkpoint", str(result.checkpoint)),
        ("records", str(directory / "records")),
    ]
    if result.lost:
        lines.append(("lost replicas", ", ".join(map(str, result.lost))))
    if result.advice:
        lines.append(("advice", result.advice))
    if result.warning:
        lines.append(("warning", result.warning))
    for name, value in lines:
        print(f"{name:>14}  {value}", flush=True)
