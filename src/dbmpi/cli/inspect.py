"""``dbmpi inspect``: the contents of a checkpoint, a run directory or a data file."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbmpi.cli import options
from dbmpi.data.importers.table import count
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from dbmpi.checkpoint.statistics import Statistics

SUMMARY = "show what is in a checkpoint, a run directory or a data file, or how two checkpoints differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a checkpoint, a run directory (its newest checkpoint), or a data file"
    )
    parser.add_argument(
        "other",
        type=Path,
        nargs="?",
        metavar="OTHER",
        help="a later checkpoint, or another run: show how far each array has moved, and which settings differ",
    )
    options.add_json(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        dest="everything",
        help="show settings that have their default values, too; with OTHER, compare the state of the update rule, too",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="OUT.png",
        help="draw histograms of the parameters and the receptive fields of the first layer's units; with OTHER, of "
        "the differences (also .pdf or .svg)",
    )
    parser.add_argument(
        "--placement",
        action="store_true",
        help="PATH is a configuration: show how its network is cut over the partitions, what moves, and why",
    )
    parser.add_argument("--partitions", type=count, metavar="P", help="with --placement (default: topology.partitions)")
    options.add_input_shape(parser, "; with --plot, of inputs that are flat in the data")
    options.add_allow_code(parser)


def run(arguments: argparse.Namespace) -> int:
    """Look at the file that these `arguments` name, print what it holds, and return the exit code."""
    if arguments.placement:
        print(_placement(arguments))
        return 0
    for path in filter(None, (arguments.path, arguments.other)):
        options.refuse_configuration(
            path,
            "inspect",
            "a checkpoint, a run directory or a data file",
            f"; how its network is cut: dbmpi inspect --placement {path}",
        )
    from rich.console import Console

    from dbmpi.cli import inspect_text

    with Console(stderr=True).status("reading"):
        found = _look(arguments)
    if arguments.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        for line in inspect_text.lines(found, arguments.everything):
            print(line)
    if arguments.plot is not None and not arguments.json:
        print(f"\n{arguments.plot}")
    if found["kind"] == "comparison":
        damaged = [array["damaged"] for layer in found["layers"] for array in layer["arrays"] if "damaged" in array]
        if damaged:
            raise UserError("\n".join(damaged))
        return 0
    shown = found.get("newest", found)
    damaged = [array["name"] for array in shown["arrays"] if "damaged" in array]
    if damaged:
        raise UserError(
            f"{shown['path']}: damaged: {', '.join(damaged)}: some bytes are not those that were written; use another "
            "checkpoint"
        )
    return 0


def _look(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what there is; a checkpoint that is drawn, too, is opened once, as a run may write another meanwhile."""
    from dbmpi.checkpoint import summary

    if arguments.plot is None and arguments.other is None:
        return summary.describe(arguments.path)
    with ExitStack() as stack:
        first, second = stack.enter_context(summary.open_checkpoint(arguments.path)), None
        if arguments.other is not None:
            second = stack.enter_context(summary.open_checkpoint(arguments.other))
        known: dict[str, Statistics] = {}
        if arguments.plot is not None:
            from dbmpi.checkpoint import weight_plots

            known = weight_plots.draw(arguments.plot, first, second, arguments.input_shape)
        if second is None:
            return summary.describe(arguments.path, first, known)
        return summary.compared(first, second, everything=arguments.everything)


def _placement(arguments: argparse.Namespace) -> str:
    """Return a table of how the network of a configuration is cut.

    Code of a user's own layers is not run unless the file is named: the configuration may be anybody's.
    """
    from dbmpi.config import reading
    from dbmpi.network.own import from_files
    from dbmpi.replica import placement
    from dbmpi.replica.describe import describe

    run = reading.read(arguments.path)
    load = from_files(arguments.allow_code)
    network = options.make_network(run.network, run.data, run.run.seed, arguments.input_shape, load)
    partitions = arguments.partitions or run.topology.partitions or 1
    placed = placement.from_config(run.placement, network.layers, partitions)
    head = f"{network.size:,} parameters over {partitions:,} partition{'s' if partitions > 1 else ''}"
    samples = run.optimizer.batch_size
    return f"{head}; batches of {samples}\n\n{describe(network.layers, placed, samples)}"
