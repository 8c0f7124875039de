"""Arguments that several commands have, and how they read and open what these name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.data.importers.table import count
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import DataSection, NetworkSection
    from dbmpi.data.source import Source
    from dbmpi.network.description import Network
    from dbmpi.network.own import Loader
    from dbmpi.runs.inference import Inference


def add_configuration(parser: argparse.ArgumentParser, meaning: str, example: str) -> None:
    """Add the configuration and ``--set`` to a command.

    Parameters
    ----------
    parser
        The command's parser.
    meaning
        What the file is for.
    example
        A setting that is worth overriding.
    """
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help=meaning)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help=f"override a setting of the file, e.g. {example} (may be repeated)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` to a command, whose `parser` this is."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, for programs")


def add_input_shape(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Add the shape of the network's inputs to a command.

    Parameters
    ----------
    parser
        The command's parser.
    also
        What else it is for.
    """
    parser.add_argument(
        "--input-shape",
        type=_shape,
        metavar="N,N,...",
        help=f"shape of one sample, e.g. 3,100,100 (default: that of the configuration's data){also}",
    )


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Add files whose code may be run to a command, whose `parser` this is."""
    parser.add_argument(
        "--allow-code",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="file with layers or the objective of your own that the checkpoint needs; it is run (may be repeated)",
    )


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`opened` takes to a command, whose `parser` this is."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run directory (its latest checkpoint)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="file with the samples, a pattern of some, or FILE.h5:/group",
    )
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
    for name in ("inputs", "targets"):
        parser.add_argument(
            f"--{name}", metavar="NAME", help=f"name of the dataset with the {name} (default: that of the training)"
        )
    parser.add_argument(
        "--missing",
        type=float,
        metavar="NUMBER",
        help="value to use where an input is missing (default: as in training)",
    )
    add_allow_code(parser)


def make_network(
    section: NetworkSection, data: DataSection, seed: int, input_shape: tuple[int, ...] | None, load: Loader
) -> Network:
    """Return the network of a configuration.

    Parameters
    ----------
    section, data, seed
        Of the configuration; the data are opened only where no shape is given.
    input_shape
        Shape of one sample; None for that of the data.
    load
        Loads the classes of a user's own layers.

    Raises
    ------
    UserError
        If it does not fit the inputs, or neither a shape is given nor the data are there.
    """
    from dbmpi.network.description import Network

    targets = False
    if input_shape is None:
        from dbmpi.data.location import exist
        from dbmpi.data.reading import Reading
        from dbmpi.data.source import Source

        if data.train is None or not exist(data.train):
            raise UserError(
                f"{data.called}: does not exist, so the shape of the inputs is unknown; give it, e.g. "
                "--input-shape 3,100,100"
            )
        with Source.open(data.train, data.memory_mib, "optional", Reading.of(data, section)) as source:
            input_shape = source.input_shape
            targets = source.has_targets and source.classes is None
    return Network(section, input_shape, seed, targets="values" if targets else "classes", load=load)


def refuse_configuration(path: Path, command: str, expected: str, instead: str = "") -> None:
    """Raise UserError where a configuration was given to a command that is for something else.

    Parameters
    ----------
    path
        The file that was given.
    command
        The command, which would take the run of the configuration.
    expected
        What the command takes.
    instead
        What can be done with a configuration.
    """
    from dbmpi import config
    from dbmpi.config.reading import is_configuration

    if not is_configuration(path):
        return
    run = ""
    with suppress(UserError):
        run = f"; for its run: dbmpi {command} {config.load(path).run.directory}"
    raise UserError(f"{path}: is a configuration, expected {expected}{run}{instead}")


@contextmanager
def ranks() -> Iterator[MPI.Intracomm | None]:
    """Start MPI for the block and give all ranks, if a launcher has started several; otherwise load no MPI."""
    from dbmpi.machine.rank_variables import launched

    if launched(os.environ)[0] <= 1:
        yield None
        return
    from dbmpi.mpi import world

    with world.ranks() as comm:
        yield comm


@contextmanager
def opened(
    arguments: argparse.Namespace, *, targets: bool, check: Callable[[Path], object] = lambda checkpoint: None
) -> Iterator[tuple[Inference, Source]]:
    """Open checkpoint and data on all ranks that were started; give both, once they are known to fit (collective).

    Notices for the user are printed on standard error.  Without a launcher no MPI is loaded.

    Parameters
    ----------
    arguments
        Those of :func:`add_inference`.
    targets
        Whether the data's targets are needed, if the network has any.
    check
        Called on the first rank with the path of the checkpoint; a UserError that it raises ends all ranks.
    """
    command = arguments.run.__module__.rpartition(".")[2]
    refuse_configuration(arguments.checkpoint, command, "a checkpoint or a run directory")

    from dbmpi.runs import prediction
    from dbmpi.runs.inference import Inference

    asked = {key: getattr(arguments, key) for key in ("inputs", "targets", "missing")}
    with (
        ranks() as comm,
        Inference(
            arguments.checkpoint, comm, arguments.partitions, arguments.allow_code, arguments.batch_size
        ) as network,
        prediction.opened(network, arguments.data, targets=targets, check=check, asked=asked) as source,
    ):
        yield network, source


def verdict(network: Inference, broken: str) -> int:
    """Warn where numbers cannot be relied on, and return the exit code: 1 there, and otherwise 0 (collective).

    Parameters
    ----------
    network
        What has computed the numbers.
    broken
        What is wrong with the outputs and what was done about it; empty if all of them are numbers.
    """
    from dbmpi.runs import prediction

    names = network.broken_parameters()
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        text = f"the parameters {names[0]!r}{more} in {network.trained.path} hold NaN or infinite numbers"
        broken = f"{broken}; {text}" if broken else f"{text}: the result means nothing"
    prediction.say(network, [f"warning: {broken}"] if broken else ())
    return 1 if broken else 0


@contextmanager
def progress(source: Source, doing: str, shown: bool) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on standard error if it is a terminal; give a function to call with the samples just done.

    Parameters
    ----------
    source
        The samples to go through.
    doing
        What is done with them.
    shown
        Whether this rank is the one that shows it.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(doing, total=source.samples)
        yield lambda samples: bar.advance(task, samples)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers that are at least 1, e.g. 3,100,100, got {text!r}")
    return shape
