"""What is predicted, as text and as numbers for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dbmpi.machine.capacity import shown
from dbmpi.plan.quantities import shown_bandwidth, shown_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dbmpi.plan.constants import MachineConstants
    from dbmpi.plan.recommendation import Advice
    from dbmpi.plan.step import Hardware

HEADING = (
    *("nodes", "partitions", "replicas", "shards", "n_push", "ranks of a node"),
    *("step", "samples/s", "staleness", "memory of a node", "bottleneck"),
)
_MIB = 2.0**20
_STALE = 200
"""Replicas of the paper's largest run by Downpour."""


def as_json(advice: Advice) -> dict[str, Any]:
    """Return an `advice` as numbers: seconds, bytes, and samples a second."""
    ways, found = advice.ways, advice.predictions
    names = ("step_seconds", "samples_per_second", "staleness", "worker_bytes", "shard_bytes", "node_bytes")
    parts = ("compute", "slowest", "exchange", "fixed", "transfers", "waiting")
    return {
        "nodes": int(ways.nodes[0]),
        **{
            name: int(getattr(ways, name)[0])
            for name in ("partitions", "replicas", "shards", "n_push", "n_fetch", "ranks_of_node", "ranks")
        },
        **{name: float(getattr(found, name)[0]) for name in names},
        "seconds": {name: float(getattr(found, name)[0]) for name in parts},
        "bottleneck": found.bottleneck(0),
    }


def cells(advice: Advice) -> list[str]:
    """Return an `advice` as a row of a table under `HEADING`."""
    numbers = as_json(advice)
    counts = [numbers[name] for name in ("nodes", "partitions", "replicas", "shards", "n_push", "ranks_of_node")]
    return [
        *(f"{number:,}" for number in counts),
        shown_seconds(numbers["step_seconds"]),
        f"{numbers['samples_per_second']:,.0f}",
        f"{numbers['staleness']:,.1f}",
        shown(numbers["node_bytes"]),
        numbers["bottleneck"],
    ]


def calibration(constants: MachineConstants, path: str | None) -> str:
    """Return a line that says what predictions rest on.

    Parameters
    ----------
    constants
        Of the machine.
    path
        The file that they come from; None for those of the reference machine.
    """
    if path is None:
        return (
            f"not calibrated: speeds are those of a reference machine ({constants.processor}); measure your nodes with "
            "dbmpi launch -n RANKS -- bench machine --out machine.toml, and give --machine machine.toml"
        )
    missing = sorted(set(type(constants).model_fields) - set(constants.measured) - _DESCRIPTION)
    less = f"; not measured, and taken from the reference machine: {', '.join(missing)}" if missing else ""
    ranks = f"{constants.ranks} rank{'s' if constants.ranks > 1 else ''}"
    hosts = f"{constants.hosts} host{'s' if constants.hosts > 1 else ''}"
    return f"calibrated by {path}: {constants.processor}, {ranks} on {hosts}{less}"


_DESCRIPTION = {"processor", "ranks", "hosts", "measured"}


def cluster_line(hardware: Hardware) -> str:
    """Return a line about the `hardware` that a plan is for."""
    nodes = f"{hardware.nodes:,} node{'s' if hardware.nodes > 1 else ''}"
    cores = f"{hardware.cores} core{'s' if hardware.cores > 1 else ''}"
    return (
        f"{nodes} of {cores} and {shown(hardware.memory)}; between them "
        f"{shown_bandwidth(hardware.bandwidth)} and {shown_seconds(hardware.latency)} one way"
    )


def details(advice: Advice, inbox: float) -> Iterator[str]:
    """Yield the lines about the best way: what to set, where the time of a step goes, memory, and what limits it.

    Parameters
    ----------
    advice
        The best way.
    inbox
        Bytes of a shard's inbox, as they are configured.
    """
    numbers = as_json(advice)
    settings = [f"topology.{name}={numbers[name]}" for name in ("partitions", "replicas", "shards")]
    settings += [f"optimizer.{name}={numbers[name]}" for name in ("n_push", "n_fetch")]
    found = advice.predictions
    needed = float(found.inbox_bytes[0])
    if numbers["nodes"] > 1 and needed > inbox:
        settings.append(f"server.inbox_mib={needed / _MIB:.1f}")
    threads = max(1, advice.hardware.cores // numbers["ranks_of_node"])
    yield (
        f"set       {' '.join(settings)}; start {numbers['ranks']:,} ranks, {numbers['ranks_of_node']} on a node, "
        f"with {threads} thread{'s' if threads > 1 else ''} each"
    )
    yield (
        f"speed     {numbers['samples_per_second']:,.0f} samples/s; a step of a replica takes "
        f"{shown_seconds(numbers['step_seconds'])}; mean staleness {numbers['staleness']:,.1f}"
    )
    words = {
        "compute": "computing",
        "slowest": "the slowest partition",
        "exchange": "exchange",
        "fixed": "fixed costs",
        "transfers": "a worker's own transfers",
        "waiting": "shards and their lines",
    }
    parts = [
        f"{word} {shown_seconds(numbers['seconds'][name])}" for name, word in words.items() if numbers["seconds"][name]
    ]
    yield f"a step    {', '.join(parts)}"
    yield (
        f"memory    a worker {shown(numbers['worker_bytes'])}, a shard {shown(numbers['shard_bytes'])}, a node "
        f"{shown(numbers['node_bytes'])}"
    )
    shares = ", ".join(
        f"{name} {100 * share:.0f} %"
        for name, share in zip(("shards", "their lines", "workers' lines"), found.busy[:, 0].tolist(), strict=False)
    )
    yield f"limit     {numbers['bottleneck']}; busy: {shares}"
    if numbers["staleness"] > _STALE:
        yield (
            f"note      a mean staleness of {numbers['staleness']:,.0f} may be more than learning stands: the paper "
            f"went up to {_STALE} replicas; --max-staleness bounds it"
        )
    idle = advice.hardware.nodes - numbers["nodes"]
    if idle:
        are = "node is" if idle == 1 else "nodes are"
        yield f"note      {idle:,} {are} not used: there would be hardly more samples a second, or staler pushes"


def table(advices: Sequence[Advice]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return heading and rows of a table over numbers of nodes.

    Parameters
    ----------
    advices
        For each of them.
    """
    rows = []
    for advice in advices:
        row = cells(advice)
        rows.append([f"{advice.hardware.nodes:,}", *row[1:]])
    return HEADING, rows
