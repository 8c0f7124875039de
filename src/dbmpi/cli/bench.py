"""``dbmpi bench``: how fast each layer of a configuration runs here, or what this machine can do for any of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.cli import options
from dbmpi.data.importers.table import count
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

SUMMARY = "measure how fast a configuration runs here, or what this machine can do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "time each layer of a network on random data; under mpirun the ranks are the partitions of one replica"
    network = actions.add_parser("network", help=text, description=text)
    options.add_configuration(network, "description of a run; its data are not read", "topology.partitions=2")
    options.add_input_shape(network)
    network.add_argument("--batch", type=count, metavar="N", help="samples of a step (default: optimizer.batch_size)")
    network.add_argument("--steps", type=count, default=5, metavar="N", help="steps to take the median of (default: 5)")
    options.add_json(network)
    network.set_defaults(measure=_network)
    text = (
        "measure what this machine can do, for dbmpi plan --machine: under a launcher by all ranks at once, one on "
        "each core; with ranks on two hosts also what is between these"
    )
    machine = actions.add_parser("machine", help=text, description=text)
    machine.add_argument(
        "--out", type=Path, metavar="FILE", help="write the constants into a file, instead of printing"
    )
    machine.set_defaults(measure=_machine)


def run(arguments: argparse.Namespace) -> int:
    """Measure with these `arguments`, print, and return the exit code."""
    from dbmpi.machine.environment import prepare

    chosen = str(prepare())
    with options.ranks() as comm:
        arguments.measure(arguments, comm, chosen)
    return 0


def _machine(arguments: argparse.Namespace, comm: MPI.Intracomm | None, chosen: str) -> None:
    from dbmpi.mpi.world import together
    from dbmpi.plan.constants import as_toml
    from dbmpi.runs.calibration import calibrate

    speaks = comm is None or comm.rank == 0
    with nullcontext() if comm is None else together(comm, "looking at the file to write"):
        if speaks and arguments.out is not None and not arguments.out.parent.is_dir():
            raise UserError(
                f"--out {arguments.out}: {arguments.out.parent} is no directory; make it, or name another one"
            )

    def say(text: str) -> None:
        if speaks:
            print(f"measuring {text}", file=sys.stderr, flush=True)

    say(f"on {1 if comm is None else comm.size} ranks; {chosen}")
    text = as_toml(calibrate(comm, say))
    if not speaks:
        return
    if arguments.out is None:
        print(text, end="", flush=True)
    else:
        arguments.out.write_text(text, encoding="utf-8")
        print(f"{arguments.out}: for dbmpi plan --machine", flush=True)


def _network(arguments: argparse.Namespace, comm: MPI.Intracomm | None, chosen: str) -> None:
    from dbmpi.config import reading
    from dbmpi.data import limits
    from dbmpi.machine.rank_variables import ranks_on_node
    from dbmpi.mpi.world import together
    from dbmpi.network.own import from_directory
    from dbmpi.replica import placement
    from dbmpi.replica.describe import describe
    from dbmpi.replica.precision import precision_notes
    from dbmpi.runs.profile import profile, table

    ranks, speaks = (1, True) if comm is None else (comm.size, comm.rank == 0)
    with nullcontext() if comm is None else together(comm, "reading the configuration"):
        run = reading.read(arguments.config, arguments.overrides)
        samples = arguments.batch or run.optimizer.batch_size
        _check_partitions(run.topology.partitions, ranks)
        # As in training, this is the user's own file.
        network = options.make_network(
            run.network, run.data, run.run.seed, arguments.input_shape, from_directory(run.network.code)
        )
        placed = placement.from_config(run.placement, network.layers, ranks)
        setting = "--batch" if arguments.batch else "optimizer.batch_size"
        here = min(ranks_on_node(os.environ), ranks)
        limits.check_activations(network.activations, samples, setting=setting, partitions=ranks, workers=here)
    if comm is not None:
        from dbmpi.replica.warmup import agree_on_products

        agree_on_products(comm, network.layers, samples)
    notes = precision_notes(network, comm)
    if speaks and not arguments.json:
        print("\n".join((chosen, *notes)))
        print(f"{network.size:,} parameters; batches of {samples}; {ranks} partition{'s' if ranks > 1 else ''}")
        if ranks > 1:
            print(f"\n{describe(network.layers, placed, samples)}\n", flush=True)
    found = profile(network, placed, samples, arguments.steps, comm)
    if not speaks:
        return
    if arguments.json:
        print(json.dumps(asdict(found) | {"parameters": network.size, "samples": samples, "partitions": ranks}))
    else:
        print("\n".join(table(found)), flush=True)


def _check_partitions(partitions: int | None, ranks: int) -> None:
    """Refuse a number of partitions that is not that of the ranks."""
    if partitions not in (None, ranks):
        raise UserError(
            f"topology.partitions = {partitions}: {ranks} rank{'s' if ranks > 1 else ''} started; a replica of "
            f"{partitions} needs dbmpi launch -n {partitions} -- bench network ..., or set topology.partitions={ranks}"
        )
