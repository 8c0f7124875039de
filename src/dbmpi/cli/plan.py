"""``dbmpi plan``: what a cluster would do for a configuration, and how to use it, before there is one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dbmpi.cli import options
from dbmpi.data.importers.table import count
from dbmpi.errors import UserError

SUMMARY = "predict samples/s, staleness and memory on a cluster, and recommend partitions, replicas, shards and n_push"
_STALENESS = 200.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    options.add_configuration(
        parser,
        "description of a run; its data are not read. Numbers in its [topology], and n_push or n_fetch above 1, stay",
        "topology.partitions=4",
    )
    options.add_input_shape(parser)
    parser.add_argument("--nodes", type=count, required=True, metavar="N", help="nodes of the cluster")
    parser.add_argument("--cores", type=count, required=True, metavar="C", help="cores of a node")
    parser.add_argument("--memory", required=True, metavar="M", help="memory of a node, e.g. 64GiB")
    parser.add_argument(
        "--bandwidth", metavar="B", help="what leaves a node, e.g. 10Gbit/s (default: that of --machine)"
    )
    parser.add_argument("--latency", metavar="L", help="from node to node, e.g. 20us (default: that of --machine)")
    parser.add_argument(
        "--machine",
        type=Path,
        metavar="FILE",
        help="constants of your nodes, from dbmpi bench machine (default: those of a reference machine)",
    )
    parser.add_argument(
        "--max-staleness",
        type=_staleness,
        default=_STALENESS,
        metavar="S",
        help="largest mean staleness of what is recommended; 0 for no limit (default: %(default)g)",
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw it over numbers of nodes (also .pdf, .svg)")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Plan with these `arguments`, print, and return the exit code."""
    from dbmpi.cli.tables import table
    from dbmpi.config import reading
    from dbmpi.network.own import refuse
    from dbmpi.plan import constants, quantities, report
    from dbmpi.plan.recommendation import Planner
    from dbmpi.plan.step import Hardware
    from dbmpi.plan.work import check_layers

    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {arguments.plot}: expected a name that ends with .png, .pdf or .svg")
    config = reading.read(arguments.config, arguments.overrides)
    known = constants.reference() if arguments.machine is None else constants.load(arguments.machine)
    hardware = Hardware(
        nodes=arguments.nodes,
        cores=arguments.cores,
        memory=quantities.memory(arguments.memory),
        bandwidth=quantities.bandwidth(arguments.bandwidth) if arguments.bandwidth else known.bandwidth,
        latency=quantities.seconds(arguments.latency) if arguments.latency else known.latency,
    )
    check_layers(config.network)
    network = options.make_network(config.network, config.data, config.run.seed, arguments.input_shape, refuse)
    planner = Planner(config, network, known, arguments.max_staleness)
    advice = planner.advise(hardware)
    growing = planner.over_nodes(hardware)
    if arguments.json:
        best = report.as_json(advice) | {"considered": advice.considered}
        over = [report.as_json(one) | {"nodes_given": one.hardware.nodes} for one in growing]
        print(json.dumps({"best": best, "over_nodes": over, "calibrated": arguments.machine is not None}))
    else:
        print(f"{network.size:,} parameters; batches of {planner.demands.samples}; {report.cluster_line(hardware)}")
        print(report.calibration(known, None if arguments.machine is None else str(arguments.machine)))
        print(f"\nthe best of {advice.considered:,} ways:")
        print("\n".join(report.details(advice, planner.demands.inbox)))
        if len(growing) > 1:
            heading, rows = report.table(growing)
            print("\nwith fewer nodes:")
            print("\n".join(table(heading, rows, left=(len(heading) - 1,))))
    if arguments.plot is not None:
        from dbmpi.plan.picture import draw

        path = draw(growing, arguments.config.stem, arguments.plot)
        if not arguments.json:
            print(path)
    return 0


def _staleness(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number that is at least 0, got {text}")
    return value
