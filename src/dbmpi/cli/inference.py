"""What ``dbmpi evaluate`` and ``dbmpi predict`` have in common."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.cli.configured import count, refuse_configuration
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from dbmpi.data.reading import Reading
    from dbmpi.data.source import Source
    from dbmpi.runs.inference import Inference
    from dbmpi.runs.trained import TrainedNetwork

MEMORY_MIB = 1024
"""A data file up to this size (MiB, as float32) is read at once, a larger one batch by batch."""
_READ_AS = ("inputs", "targets", "channels", "missing")
"""Settings of the training data that hold for other data, too."""


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
    for option, what in (("--inputs", "inputs"), ("--targets", "targets")):
        parser.add_argument(
            option, metavar="NAME", help=f"name of the dataset with the {what} (default: that of the training)"
        )
    parser.add_argument(
        "--missing",
        type=float,
        metavar="NUMBER",
        help="number to take where an input is missing (default: as in training)",
    )
    add_allow_code(parser)


def reading(network: TrainedNetwork, arguments: argparse.Namespace) -> Reading:
    """Return how a data file is to be read: as the training data were, but for what is asked for."""
    import json

    from pydantic import ValidationError

    from dbmpi.config import DataSection, explain
    from dbmpi.data.reading import Reading

    trained_on = json.loads(network.info.configuration).get("data", {})
    kept = {key: trained_on[key] for key in _READ_AS if key in trained_on} if isinstance(trained_on, dict) else {}
    asked = {key: value for key in ("inputs", "targets", "missing") if (value := getattr(arguments, key)) is not None}
    try:
        data = DataSection.model_validate({"train": arguments.data, **kept, **asked})
    except ValidationError as error:
        raise UserError(explain(error, DataSection, str(network.path))) from None
    labels = None if network.info.meaning is None else network.info.meaning.labels or None
    return Reading.of(data, network.section).held_out(network.info.classes or None, labels)


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

    from dbmpi.machine.launcher import launched
    from dbmpi.mpi import world
    from dbmpi.runs.inference import Inference

    with (
        world.ranks() if launched(os.environ)[0] > 1 else nullcontext() as comm,
        Inference(
            arguments.checkpoint, comm, arguments.partitions, arguments.allow_code, arguments.batch_size
        ) as found,
    ):
        if found.is_first and found.trained.notice:
            sys.stderr.write(f"dbmpi: {found.trained.notice}\n")
        yield found


def say(network: Inference, notices: Iterable[str]) -> None:
    """Write lines for the user on standard error, once."""
    if network.is_first:
        sys.stderr.writelines(f"dbmpi: {notice}\n" for notice in notices)


def verdict(network: Inference, broken: str) -> int:
    """Warn where numbers are not to be relied on, and return the exit code: 1 there, and otherwise 0 (collective).

    Parameters
    ----------
    broken
        What is wrong with the outputs and what was done about it; empty if all of them are numbers.
    """
    names = network.broken_parameters()
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        text = f"the parameters {names[0]!r}{more} in {network.trained.path} hold NaN or infinite numbers"
        broken = f"{broken}; {text}" if broken else f"{text}: the result means nothing"
    say(network, [f"warning: {broken}"] if broken else ())
    return 1 if broken else 0


@contextmanager
def progress(source: Source, doing: str, shown: bool) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on standard error if it is a terminal; give a function that hears of samples done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(doing, total=source.samples)
        yield lambda samples: bar.advance(task, samples)
