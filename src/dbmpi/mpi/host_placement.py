"""Which rank takes which part in a plan, so that little travels between hosts: arithmetic, and a map for people.

A replica's partitions exchange activations in every step, so its ranks are on one host wherever they fit.  Shards are
spread over the hosts, because all workers fetch from all of them.  Where the launcher's order does this already, as
most do, every rank keeps its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.mpi import blocking, waiting

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.mpi.topology import Plan

_NAME = 64
"""Largest number of bytes of a host's name."""
_MOST_LINES = 16
"""Hosts that a map shows."""


def ranks_by_position(plan: Plan, hosts: np.ndarray) -> tuple[int, ...]:
    """Return which rank is at each position of a plan; rank 0 is always at position 0.

    Ranks stay where they are where the first ones have the shards: their hosts were chosen for it.

    Parameters
    ----------
    plan
        The roles, by position.
    hosts : (ranks,) array of int
        For each rank the lowest rank on its host.
    """
    identity = np.arange(plan.world)
    spread = -(-plan.shards // len(np.unique(hosts)))
    if plan.shards_first or _cost(plan, hosts) <= (0, spread):
        return tuple(identity.tolist())
    grouped = np.array(_grouped(plan, hosts))
    better = _cost(plan, hosts[grouped]) < _cost(plan, hosts)
    return tuple((grouped if better else identity).tolist())


def _cost(plan: Plan, hosts: np.ndarray) -> tuple[int, int]:
    """Return how many replicas are on several hosts, and the largest number of shards on one; `hosts` by position."""
    workers = hosts[list(plan.worker_ranks)].reshape(-1, plan.partitions)
    apart = int((workers != workers[:, :1]).any(axis=1).sum())
    return apart, int(np.unique(hosts[list(plan.shard_ranks)], return_counts=True)[1].max())


def _grouped(plan: Plan, hosts: np.ndarray) -> list[int]:
    """Return the rank at each position, chosen host by host."""
    free: dict[int, list[int]] = {}
    for rank, host in enumerate(hosts.tolist()):
        free.setdefault(host, []).append(rank)
    positions, size = [0] * plan.world, plan.partitions
    if not plan.colocate:
        held = dict.fromkeys(free, 0)

        def price(host: int) -> tuple[int, float, int]:
            """Whether a shard costs the host a whole replica; then how many of its ranks are shards already."""
            left = len(free[host])
            return left // size - (left - 1) // size, held[host] / (held[host] + left), host

        for position in plan.shard_ranks:
            host = min((host for host, ranks in free.items() if ranks), key=price) if position else 0
            positions[position] = free[host].pop(0)
            held[host] += 1
    whole = {host: len(ranks) // size * size for host, ranks in free.items()}
    together = [rank for host, ranks in free.items() for rank in ranks[: whole[host]]]
    apart = [rank for host, ranks in free.items() for rank in ranks[whole[host] :]]
    workers = apart + together if 0 in apart else together + apart
    for position, rank in zip(plan.worker_ranks, workers, strict=True):
        positions[position] = rank
    return positions


def host_names(comm: MPI.Intracomm, hosts: np.ndarray) -> dict[int, str]:
    """Return on rank 0 the name of each host, by its number in `hosts`; on other ranks nothing (collective).

    Parameters
    ----------
    comm
        The ranks.
    hosts : (ranks,) array of int
        For each rank the lowest rank on its host.
    """
    from mpi4py import MPI

    what = "the names of the hosts"
    numbers = np.unique(hosts).tolist()
    first = comm.rank in numbers
    leaders = blocking.split(comm, 0 if first else MPI.UNDEFINED, 0, what)
    if not first:
        return {}
    name = np.zeros(_NAME, np.uint8)
    letters = MPI.Get_processor_name().encode()[:_NAME]
    name[: len(letters)] = np.frombuffer(letters, np.uint8)
    names = np.zeros((len(numbers) if comm.rank == 0 else 0, _NAME), np.uint8)
    waiting.complete(leaders.Igather(name, names, 0), what)
    blocking.free(leaders)
    texts = (row.tobytes().rstrip(b"\0").decode(errors="replace") for row in names)
    return dict(zip(numbers, texts, strict=False))


def host_map(plan: Plan, ranks: Sequence[int], hosts: np.ndarray, names: Mapping[int, str]) -> Iterator[str]:
    """Yield a line for each host, on what its ranks are; for many hosts the first ones.

    Parameters
    ----------
    plan
        The roles, by position.
    ranks
        The rank at each position.
    hosts : (ranks,) array of int
        For each position a number of its host.
    names
        Of the hosts, by that number.
    """
    order = list(dict.fromkeys(hosts.tolist()))
    for host in order[:_MOST_LINES]:
        positions = np.flatnonzero(hosts == host).tolist()
        numbers = f"rank{'s' if len(positions) > 1 else ''} {spans(sorted(ranks[position] for position in positions))}"
        yield f"{names.get(host, f'host {host}')} ({numbers}): {', '.join(_roles(plan, positions))}"
    if len(order) > _MOST_LINES:
        yield f"... and {len(order) - _MOST_LINES} more hosts"


def _roles(plan: Plan, positions: Sequence[int]) -> Iterator[str]:
    """Yield what the ranks at some positions are."""
    if shards := [shard for position in positions if (shard := plan.shard_of(position)) is not None]:
        yield f"shard{'s' if len(shards) > 1 else ''} {spans(shards)}"
    parts: dict[int, list[int]] = {}
    for position in positions:
        if (worker := plan.worker_of(position)) is not None:
            parts.setdefault(worker // plan.partitions, []).append(worker % plan.partitions)
    whole = [instance for instance, found in parts.items() if len(found) == plan.partitions]
    for kind, first, last in (("replica", 0, plan.replicas), ("evaluator", plan.replicas, plan.workers)):
        if found := [instance - first for instance in whole if first <= instance < last]:
            yield f"{kind}{'s' if len(found) > 1 else ''} {spans(found)}"
    for instance, found in parts.items():
        if len(found) < plan.partitions:
            yield f"partition{'s' if len(found) > 1 else ''} {spans(found)} of {plan.name(instance)}"


def spans(numbers: Iterable[int]) -> str:
    """Return rising numbers as text: ``0-3, 7``.

    Parameters
    ----------
    numbers
        The numbers.
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in found)
