"""``dbmpi submit``: write a batch script for Slurm from the description of a run, and submit it."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dbmpi.cli import options
from dbmpi.data.importers.table import count
from dbmpi.errors import UserError
from dbmpi.machine import batch_script

if TYPE_CHECKING:
    from dbmpi.config import Run, TopologySection
    from dbmpi.machine.batch_script import NodeGroup
    from dbmpi.mpi.topology import Plan

SUMMARY = "write a batch script for Slurm from the description of a run, and submit it"

SCRIPT = "job.sbatch"
"""Name of the script in the run directory, by which a job is known to belong to the run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    options.add_configuration(parser, "description of the run", "optimizer.epochs=5")
    parser.add_argument("--nodes", type=count, required=True, metavar="N", help="number of nodes")
    parser.add_argument(
        "--time", required=True, metavar="LIMIT", help="time limit of the job, as for sbatch, e.g. 04:00:00 or 1-12:00"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=count,
        metavar="N",
        help="ranks on each node (default: what [topology] needs, if it says how many of each role)",
    )
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="cores of each rank (default: 1)")
    parser.add_argument(
        "--memory", default="", metavar="SIZE", help="memory of each node, e.g. 16G (default: what the site gives)"
    )
    parser.add_argument(
        "--shard-nodes",
        type=count,
        metavar="N",
        help="put the shards on so many further nodes, the first component of a heterogeneous job",
    )
    parser.add_argument("--shard-memory", default="", metavar="SIZE", help="with --shard-nodes: memory of each of them")
    parser.add_argument(
        "--shard-partition", default="", metavar="NAME", help="with --shard-nodes: their partition (default: as others)"
    )
    for name, meaning in (
        ("partition", "partition of the cluster"),
        ("account", "account to charge"),
        ("qos", "quality of service"),
        ("constraint", "features that the nodes must have"),
    ):
        parser.add_argument(f"--{name}", default="", metavar="NAME", help=f"{meaning}, as for sbatch")
    parser.add_argument("--name", metavar="NAME", help="of the job and its log (default: that of the run directory)")
    parser.add_argument(
        "--launcher",
        choices=("srun", "mpirun"),
        help="what starts the ranks (default: srun, if it can start this Python's MPI)",
    )
    parser.add_argument(
        "--mpi", metavar="PLUGIN", help="how srun starts the MPI, see srun --mpi=list (default: what this MPI needs)"
    )
    parser.add_argument(
        "--warning",
        type=count,
        default=batch_script.WARNING,
        metavar="SECONDS",
        help="time before the limit at which the run ends with a checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--requeues",
        type=int,
        default=batch_script.REQUEUES,
        metavar="N",
        help="how often the job goes back into the queue then, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--setup", type=Path, metavar="FILE", help="shell script that the job reads first, e.g. with module load"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script instead of submitting it")


def run(arguments: argparse.Namespace) -> int:
    """Write and submit the script that these `arguments` describe, and return the exit code."""
    from dbmpi.config.reading import read
    from dbmpi.machine import slurm

    described = read(arguments.config, tuple(arguments.overrides))
    _check_data(arguments, described)
    groups, plan = arrange(arguments, described.topology)
    job = _job(arguments, described, groups)
    text = batch_script.render(job, f"{plan}\n# {spread(plan, groups)}")
    if arguments.dry_run:
        print(text, end="")
        return 0
    script = described.run.directory / SCRIPT
    _refuse_second(script)
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{script}: cannot be written: {error.strerror}; choose another run.directory") from None
    number = slurm.submit(script.resolve())
    print(f"{plan}\n{spread(plan, groups)}")
    print(f"submitted job {number}; its log is {job.name}.log, and dbmpi status {described.run.directory} follows it")
    return 0


def _check_data(arguments: argparse.Namespace, described: Run) -> None:
    from dbmpi.data.location import exist

    data = described.data
    if data.train is None:
        raise UserError(f"{arguments.config}: 'data.train' is missing: HDF5 file with the training samples")
    if not exist(data.train):
        raise UserError(f"{data.called}: does not exist; the job would fail, so make the data first")


def arrange(arguments: argparse.Namespace, topology: TopologySection) -> tuple[list[NodeGroup], Plan]:
    """Return the groups of nodes that a job asks for, and the role of each rank on them.

    Parameters
    ----------
    arguments
        Those of the command.
    topology
        Of the run.

    Raises
    ------
    UserError
        If ranks, nodes and topology do not fit one another.
    """
    from dbmpi.machine.batch_script import NodeGroup
    from dbmpi.mpi.topology import needed, plan

    apart = arguments.shard_nodes
    if apart:
        if topology.colocate:
            raise UserError("--shard-nodes: topology.colocate = true puts shards on the workers' ranks; leave one out")
        topology = topology.model_copy(update={"shard_ranks": "first", "shards": topology.shards or apart})
    elif arguments.shard_memory or arguments.shard_partition:
        name = "memory" if arguments.shard_memory else "partition"
        raise UserError(f"--shard-{name}: is for nodes that have shards alone; give --shard-nodes, too, or --{name}")
    shards = (topology.shards or 1) if apart else 0
    world, per_node = needed(topology), arguments.ranks_per_node
    if world is None:
        if per_node is None:
            raise UserError(
                "--ranks-per-node: is missing, and [topology] leaves the number of ranks open; give it, or set shards, "
                "replicas and partitions"
            )
        world = arguments.nodes * per_node + shards
    others = world - shards
    per_node = per_node or math.ceil(others / arguments.nodes)
    if not arguments.nodes <= others <= arguments.nodes * per_node:
        raise UserError(
            f"--nodes {arguments.nodes}: {others} ranks do not fit {arguments.nodes} nodes of {per_node}; expected "
            f"from {math.ceil(others / per_node)} to {others} nodes"
        )

    def group(nodes: int, ranks: int, most: int, memory: str, partition: str) -> NodeGroup:
        total = None if nodes * most == ranks else ranks
        return NodeGroup(nodes, most, arguments.threads, total, memory, partition, arguments.constraint)

    groups = [group(arguments.nodes, others, per_node, arguments.memory, arguments.partition)]
    if apart:
        if apart > shards:
            raise UserError(f"--shard-nodes {apart}: topology.shards = {shards}; expected at most one node for each")
        partition = arguments.shard_partition or arguments.partition
        groups.insert(0, group(apart, shards, math.ceil(shards / apart), arguments.shard_memory, partition))
    return groups, plan(topology, world)


def spread(plan: Plan, groups: list[NodeGroup]) -> str:
    """Return how shards and replicas are spread over the nodes, and how it could be better, as one line.

    Parameters
    ----------
    plan
        The role of each rank.
    groups
        The nodes, which are filled one after the other.
    """
    if any(group.ranks is not None for group in groups):
        ranks = " + ".join(str(group.total) for group in groups)
        return f"{sum(group.nodes for group in groups)} nodes; Slurm divides {ranks} ranks, no multiple of the nodes"
    import numpy as np

    from dbmpi.mpi.host_placement import ranks_by_position

    each = np.array([group.per_node for group in groups for _ in range(group.nodes)])
    hosts = np.repeat(np.cumsum(each) - each, each)  # for each rank the first one on its node
    host_of = hosts[list(ranks_by_position(plan, hosts))]
    shards = [int((host_of[list(plan.shard_ranks)] == host).sum()) for host in np.unique(hosts)]
    split = [number for number in range(plan.replicas) if len(set(host_of[list(plan.ranks_of(number))].tolist())) > 1]
    line = f"{len(shards)} nodes; shards on each: {min(shards)}"
    line += f" to {max(shards)}" if max(shards) > min(shards) else ""
    if plan.partitions > 1:
        line += f"; replicas with partitions on several nodes: {len(split)} of {plan.replicas}"
        line += ", more ranks per node or other numbers of shards may avoid that" if split else ""
    return line


def _job(arguments: argparse.Namespace, described: Run, groups: list[NodeGroup]) -> batch_script.BatchJob:
    seconds = _limit(arguments.time)
    if seconds <= arguments.warning:
        raise UserError(
            f"--time {arguments.time}: is {seconds} s, and the run would end {arguments.warning} s before; expected a "
            "longer limit, as in 04:00:00 for 4 hours, or a smaller --warning"
        )
    if arguments.requeues < 0:
        raise UserError(f"--requeues {arguments.requeues}: expected at least 0")
    launcher, plugin = _launcher(arguments)
    if launcher == "mpirun" and len(groups) > 1:
        raise UserError(
            "--shard-nodes: mpirun starts ranks in the first component of a heterogeneous job only, and srun has no "
            "plugin for this MPI here; name one with --launcher srun --mpi PLUGIN (srun --mpi=list), or leave it out"
        )
    overrides = list(arguments.overrides)
    if len(groups) > 1:
        shards = described.topology.shards or groups[0].total
        overrides += [f"topology.shards={shards}", "topology.shard_ranks=first"]
    preparation: tuple[str, ...] = ()
    if arguments.setup is not None:
        if not arguments.setup.is_file():
            raise UserError(f"--setup {arguments.setup}: no such file; expected a shell script, e.g. with module load")
        preparation = (f"source {shlex.quote(str(arguments.setup.absolute()))}",)
    name = arguments.name or re.sub(r"[^\w.+-]", "-", described.run.directory.resolve().name, flags=re.ASCII)
    return batch_script.BatchJob(
        name=name,
        groups=tuple(groups),
        time=arguments.time,
        configuration=str(arguments.config),
        launcher=launcher,
        plugin=plugin,
        overrides=tuple(overrides),
        account=arguments.account,
        qos=arguments.qos,
        warning=arguments.warning,
        requeues=arguments.requeues,
        program=shlex.join([sys.executable, "-m", "dbmpi"]),
        preparation=preparation,
    )


def _limit(text: str) -> int:
    """Return the seconds of a time limit in Slurm's notation."""
    batch_script.directive("time", text)
    days, dash, clock = text.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    # days-hours:minutes:seconds, hours:minutes:seconds, minutes:seconds or minutes
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def _launcher(arguments: argparse.Namespace) -> tuple[Literal["srun", "mpirun"], str]:
    """Return what starts the ranks, and the plugin of srun."""
    from dbmpi.machine import mpi_library, slurm

    if arguments.launcher == "mpirun":
        return "mpirun", "none"
    plugin = arguments.mpi or mpi_library.srun_plugin(mpi_library.loaded_library()[0])
    if arguments.launcher == "srun" or arguments.mpi or slurm.has_plugin(plugin):
        return "srun", plugin
    return "mpirun", "none"


def _refuse_second(script: Path) -> None:
    """Refuse to submit a run a second time while its job waits or runs."""
    from dbmpi.machine import slurm

    jobs, _ = slurm.queue()
    for job in jobs:
        if job.alive and job.belongs_to(script):
            raise UserError(
                f"job {job.number} of this run is {job.state}; end it with  scancel --batch --signal=TERM {job.number}"
                "  (running, with a checkpoint) or  scancel  (waiting), or choose another run.directory"
            )
