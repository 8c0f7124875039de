"""What ``dbmpi evaluate`` and ``dbmpi predict`` have in common."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.cli.configured import count, refuse_configuration

if TYPE_CHECKING:
    from dbmpi.data.source import Source
    from dbmpi.inference import Inference

MEMORY_MIB = 1024
"""A data file up to this size (MiB, as float32) is read at once, a larger one batch by batch."""
LONG = 86400.0
"""Seconds to wait for a rank that looks at all of the data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that both commands have."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run directory (its latest checkpoint)"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="HDF5 file with the samples")
    parser.add_argument(
        "--batch-size", type=count, default=1024, metavar="N", help="samples computed together (default: %(default)s)"
    )
    parser.add_argument(
        "--partitions",
        type=count,
        metavar="P",
        help="ranks that compute one replica together, under mpirun; samples are shared by the replicas "
        "(default: as in training if the ranks are a multiple of that, else all)",
    )
    add_allow_code(parser)


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Add the argument by which a user allows code that a file names to be run."""
    parser.add_argument(
        "--allow-code",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="file with layers of your own that the checkpoint needs; it is run (may be repeated)",
    )


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Inference]:
    """Open the checkpoint on the ranks that were started, and say on standard error which one, if not as asked.

    Without a launcher no MPI is loaded.
    """
    command = arguments.run.__module__.rpartition(".")[2]
    refuse_configuration(arguments.checkpoint, command, "a checkpoint or a run directory")

    from dbmpi.inference import Inference
    from dbmpi.runtime import world
    from dbmpi.runtime.launcher import launched

    with (
        world.ranks() if launched(os.environ)[0] > 1 else nullcontext() as comm,
        Inference(
            arguments.checkpoint, comm, arguments.partitions, arguments.allow_code, arguments.batch_size
        ) as found,
    ):
        if found.is_first and found.trained.notice:
            sys.stderr.write(f"dbmpi: {found.trained.notice}\n")
        yield found


@contextmanager
def progress(source: Source, doing: str, shown: bool) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on standard error if it is a terminal; give a function that hears of samples done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(doing, total=source.samples)
        yield lambda samples: bar.advance(task, samples)
