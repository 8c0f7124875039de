"""``dbmpi bench network``: how fast each layer of a configuration runs on this machine, alone or under mpirun."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.cli import configured

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import Run

SUMMARY = "measure how fast a configuration runs here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "time each layer of a network on data made up; under mpirun the ranks are the partitions of one replica"
    network = actions.add_parser("network", help=text, description=text)
    network.add_argument("config", type=Path, metavar="CONFIG.toml", help="description of a run; its data are not read")
    network.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override a setting of the file, e.g. topology.partitions=2 (may be repeated)",
    )
    configured.add_input_shape(network)
    network.add_argument(
        "--batch", type=configured.count, metavar="N", help="samples of a step (default: optimizer.batch_size)"
    )
    network.add_argument(
        "--steps", type=configured.count, default=5, metavar="N", help="steps to take the median of (default: 5)"
    )
    network.add_argument("--json", action="store_true", help="print one JSON document, for programs")
    network.set_defaults(measure=_network)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from dbmpi.machine.environment import prepare

    chosen = str(prepare())

    from dbmpi.machine.launcher import launched

    if launched(os.environ)[0] <= 1:
        arguments.measure(arguments, None, chosen)
        return 0
    from dbmpi.mpi import world

    with world.ranks() as comm:
        arguments.measure(arguments, comm, chosen)
    return 0


def _network(arguments: argparse.Namespace, comm: MPI.Intracomm | None, chosen: str) -> None:
    from dbmpi.data import limits
    from dbmpi.machine.threads import ranks_on_node
    from dbmpi.network.own import from_directory
    from dbmpi.replica import placement
    from dbmpi.replica.describe import describe
    from dbmpi.runs.profile import profile, table

    ranks, speaks = (1, True) if comm is None else (comm.size, comm.rank == 0)
    with nullcontext() if comm is None else _together(comm):
        run = configured.read(arguments.config, arguments.overrides)
        samples = arguments.batch or run.optimizer.batch_size
        _check_partitions(run, ranks)
        # As in training, this is the user's own file.
        network = configured.make_network(run, arguments.input_shape, from_directory(run.network.code))
        placed = placement.from_config(run.placement, network.layers, ranks)
        setting = "--batch" if arguments.batch else "optimizer.batch_size"
        here = min(ranks_on_node(os.environ), ranks)
        limits.check_activations(network.activations, samples, setting=setting, partitions=ranks, workers=here)
    if comm is not None:
        from dbmpi.replica.warmup import agree_on_products

        agree_on_products(comm, network.layers, samples)
    if speaks and not arguments.json:
        print(chosen)
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


def _check_partitions(run: Run, ranks: int) -> None:
    """Refuse a number of partitions that is not that of the ranks."""
    from dbmpi.errors import UserError

    partitions = run.topology.partitions
    if partitions not in (None, ranks):
        raise UserError(
            f"topology.partitions = {partitions}: {ranks} rank{'s' if ranks > 1 else ''} started; a replica of "
            f"{partitions} needs dbmpi launch -n {partitions} -- bench network ..., or set topology.partitions={ranks}"
        )


def _together(comm: MPI.Intracomm) -> AbstractContextManager[None]:
    from dbmpi.mpi.world import together

    return together(comm, "reading the configuration")
