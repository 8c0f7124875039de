"""What commands have in common that take a configuration but do not train: its network, for inputs of some shape."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbmpi.config import Run
    from dbmpi.network.description import Network
    from dbmpi.network.own import Loader


def add_input_shape(parser: argparse.ArgumentParser) -> None:
    """Add the argument that says what the network's inputs are like."""
    parser.add_argument(
        "--input-shape",
        type=_shape,
        metavar="N,N,...",
        help="shape of one sample, e.g. 3,100,100 (default: that of the configuration's data)",
    )


def make_network(run: Run, input_shape: tuple[int, ...] | None, load: Loader) -> Network:
    """Return the network of a configuration.

    Raises
    ------
    UserError
        If it does not fit the inputs, or neither a shape is given nor the data are there.
    """
    from dbmpi.errors import UserError
    from dbmpi.network.description import Network

    targets = False
    if input_shape is None:
        from dbmpi.data.reading import Reading
        from dbmpi.data.source import Source

        if not run.data.train.exists():
            raise UserError(
                f"{run.data.train}: there are no data that would tell the shape of the inputs; give it, e.g. "
                "--input-shape 3,100,100"
            )
        reading = Reading.of(run.data, run.network)
        with Source.open(run.data.train, run.data.memory_mib, "optional", reading) as source:
            input_shape = source.input_shape
            targets = source.has_targets and source.classes is None
    return Network(run.network, input_shape, run.run.seed, targets="values" if targets else "classes", load=load)


def placement_table(arguments: argparse.Namespace) -> str:
    """Return a table of how the network of a configuration is cut, for ``dbmpi inspect --placement``.

    Code of a user's own layers is not run unless the file is named: the configuration may be anybody's.
    """
    from dbmpi.network.own import from_files
    from dbmpi.replica import describe, placement

    run = read(arguments.path, [])
    network = make_network(run, arguments.input_shape, from_files(arguments.allow_code))
    partitions = arguments.partitions or run.topology.partitions or 1
    placed = placement.from_config(run.placement, network.layers, partitions)
    head = f"{network.size:,} parameters over {partitions} partition{'s' if partitions > 1 else ''}"
    return f"{head}; batches of {run.optimizer.batch_size}\n\n" + describe.describe(
        network.layers, placed, run.optimizer.batch_size
    )


def refuse_configuration(path: Path, command: str, expected: str, instead: str = "") -> None:
    """Raise UserError where a configuration was given to a command that is for something else.

    Parameters
    ----------
    command
        Which would do with the run of the configuration.
    expected
        By the command.
    instead
        What can be done with a configuration.
    """
    from dbmpi import config
    from dbmpi.config.reading import is_configuration
    from dbmpi.errors import UserError

    if not is_configuration(path):
        return
    run = ""
    with suppress(UserError):
        run = f"; what came of it: dbmpi {command} {config.load(path).run.directory}"
    raise UserError(f"{path}: is a configuration, expected {expected}{run}{instead}")


def count(text: str) -> int:
    """Read a number that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def read(path: Path, overrides: list[str]) -> Run:
    """Read a configuration."""
    from dbmpi import config

    return config.load(path, tuple(overrides))


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers that are at least 1, e.g. 3,100,100, got {text!r}")
    return shape
