"""The role of each rank, and the communicators by role.

The plan is pure arithmetic, computable for any world without MPI; the communicators follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import UserError
from dbmpi.mpi import blocking
from dbmpi.mpi.blocking import Collective

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import TopologySection


@dataclass(frozen=True)
class Plan:
    """A world cut by role: `shards` shards, `replicas` replicas of `partitions` workers each.

    Workers are numbered replica by replica: worker ``w`` is partition ``w % partitions`` of replica ``w //
    partitions``.  Evaluators have the last ranks, and are numbered behind the replicas.  Shards are spread evenly over
    the others, so that with several nodes no node has all of them, or are the first ranks.  Shard 0 is always on rank
    0.
    """

    shards: int
    replicas: int
    partitions: int = 1
    colocate: bool = False
    spares: int = 0
    """Of the replicas, the last ones, which learn only where another one is given up."""
    evaluators: int = 0
    """Instances of the model beside the replicas, which never learn."""
    shards_first: bool = False
    """Whether the first ranks have the shards."""

    @property
    def learning(self) -> int:
        """Number of replicas that learn from the beginning."""
        return self.replicas - self.spares

    @property
    def workers(self) -> int:
        """Number of ranks that compute, also of the evaluators."""
        return (self.replicas + self.evaluators) * self.partitions

    @property
    def world(self) -> int:
        """Number of ranks that the plan needs."""
        return self.workers if self.colocate else self.workers + self.shards

    @cached_property
    def shard_ranks(self) -> tuple[int, ...]:
        """World rank of each shard."""
        if self.shards_first:
            return tuple(range(self.shards))
        others = self.world - self.evaluators * self.partitions
        return tuple(shard * others // self.shards for shard in range(self.shards))

    @cached_property
    def worker_ranks(self) -> tuple[int, ...]:
        """World rank of each worker."""
        if self.colocate:
            return tuple(range(self.world))
        taken = set(self.shard_ranks)
        return tuple(rank for rank in range(self.world) if rank not in taken)

    def shard_of(self, rank: int) -> int | None:
        """Return the number of the shard on a rank, if it has one."""
        return self._shards_at.get(rank)

    def worker_of(self, rank: int) -> int | None:
        """Return the number of the worker on a rank, if it has one."""
        return self._workers_at.get(rank)

    def replica_of(self, rank: int) -> int | None:
        """Return the number of the replica, or evaluator, that a rank is a worker of, if it is one."""
        worker = self._workers_at.get(rank)
        return None if worker is None else worker // self.partitions

    def ranks_of(self, replica: int) -> tuple[int, ...]:
        """Return the world ranks of a `replica`, or evaluator, partition 0 first."""
        return self.worker_ranks[replica * self.partitions : (replica + 1) * self.partitions]

    def name(self, replica: int) -> str:
        """Return the name of a `replica`, or evaluator, for messages."""
        spare = replica - self.replicas
        return f"replica {replica}" if spare < 0 else "the evaluator" if self.evaluators == 1 else f"evaluator {spare}"

    def evaluates(self, rank: int) -> bool:
        """Return whether a `rank` belongs to an evaluator."""
        return self._workers_at.get(rank, -1) >= self.replicas * self.partitions

    @cached_property
    def _shards_at(self) -> dict[int, int]:
        return {rank: shard for shard, rank in enumerate(self.shard_ranks)}

    @cached_property
    def _workers_at(self) -> dict[int, int]:
        return {rank: worker for worker, rank in enumerate(self.worker_ranks)}

    def __str__(self) -> str:
        where = "on the workers' ranks" if self.colocate else "on separate ranks"
        shards, replicas = _count(self.shards, "shard"), _count(self.replicas, "replica")
        spare = f", {self.spares} of them spare" if self.spares else ""
        replicas += f" of {_count(self.partitions, 'partition')}{spare}"
        replicas += f", {_count(self.evaluators, 'evaluator')}" if self.evaluators else ""
        return f"{_count(self.world, 'rank')}: {shards} {where}, {replicas}"


def plan(section: TopologySection, world: int) -> Plan:
    """Fit the ``[topology]`` `section` to a world of `world` ranks.

    A number that is left out follows from the others; ``shards`` and ``partitions`` default to 1 where ``replicas``
    can follow.  A world of one rank plays all roles.

    Raises
    ------
    UserError
        If the numbers and the world do not fit; the message says which numbers would.
    """
    result = _filled_in(section, world)
    problem = _problem(result, world)
    if problem:
        raise UserError(f"{problem}.  {_advice(section, world)}")
    return result


def needed(section: TopologySection) -> int | None:
    """Return how many ranks a `section` needs; None where numbers are left out that follow from the world."""
    open_numbers = [section.replicas, section.partitions, section.shards or (1 if section.colocate else None)]
    return None if None in open_numbers else _filled_in(section, 2).world


def _filled_in(section: TopologySection, world: int) -> Plan:
    """Let the numbers that are left out follow from the others; the plan may not fit."""
    partitions, shards, replicas, spares = section.partitions, section.shards, section.replicas, section.spares
    evaluators = section.evaluators
    if replicas is not None:
        replicas += spares
    colocate = section.colocate or (world == 1 and (partitions or 1) == (replicas or 1) == 1)
    if replicas is None:
        partitions, shards = partitions or 1, shards or 1
        replicas = max(1, (world - (0 if colocate else shards)) // partitions - evaluators)
    elif partitions is None and shards is not None:
        partitions = max(1, (world - (0 if colocate else shards)) // (replicas + evaluators))
    elif shards is None:
        partitions = partitions or 1
        shards = 1 if colocate else max(1, world - (replicas + evaluators) * partitions)
    assert shards is not None
    assert partitions is not None
    return Plan(shards, replicas, partitions, colocate, spares, evaluators, section.shard_ranks == "first")


def _problem(plan: Plan, world: int) -> str:
    """Return why a plan does not fit a world; empty if it does."""
    if plan.world != world:
        return f"the topology does not fit the world: {_count(world, 'rank')} started, but {_sum(plan)}"
    if plan.learning < 1:
        return f"topology.spares = {plan.spares} leaves none of {_count(plan.replicas, 'replica')} to learn"
    workers = plan.replicas * plan.partitions
    if plan.colocate and plan.shards > workers:
        return (
            f"{_count(plan.shards, 'shard')} cannot be colocated with {_count(workers, 'worker')}: "
            "at most one shard a rank"
        )
    return ""


def _advice(section: TopologySection, world: int) -> str:
    """Return which settings would fit, changing as few as possible; all of them have been tried."""
    numbers = range(world, 0, -1)
    changes: list[dict[str, int | bool]] = [
        {name: number} for name in ("replicas", "shards", "partitions") for number in numbers
    ]
    changes += [{"replicas": number, "partitions": 1} for number in numbers]
    changes.append({"shards": 1, "replicas": max(world - 1, 1), "partitions": 1, "colocate": world == 1})
    for name in ("spares", "evaluators"):
        if getattr(section, name):
            changes += [change | {name: 0} for change in ({}, *changes)]
    changes[:0] = [{"evaluators": number} for number in reversed(range(min(section.evaluators, world)))]
    fits = next(change for change in changes if _fits(section.model_copy(update=change), world))
    settings = " and ".join(f"topology.{name} = {str(value).lower()}" for name, value in fits.items())
    # The sum of the numbers, and worlds near this one: a mistyped number of shards must not make a list as long.
    near = range(1, 2 * world + 64)
    others = sorted({_filled_in(section, world).world, *near}, key=lambda ranks: abs(ranks - world))
    ranks = next((other for other in others if _fits(section, other)), None)
    return f"Set {settings}" if ranks is None else f"Start {_count(ranks, 'rank')}, or set {settings}"


def _fits(section: TopologySection, world: int) -> bool:
    return not _problem(_filled_in(section, world), world)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _sum(plan: Plan) -> str:
    work = f"{_count(plan.replicas, 'replica')} x {_count(plan.partitions, 'partition')}"
    work += f" + {_count(plan.evaluators, 'evaluator')} x {plan.partitions}" if plan.evaluators else ""
    shards = "" if plan.colocate else f" + {_count(plan.shards, 'shard')}"
    return f"{work}{shards} need {plan.world}"


class Communicators(Collective):
    """The communicators of one plan; created and freed by all ranks together.

    Parameters
    ----------
    comm
        All ranks, as many as the plan needs.
    plan
        The role of each.

    Attributes
    ----------
    plan
        The role of each rank of `world`.
    shard, worker
        Number of the shard, and of the worker, that this rank is; None where it is none.
    world
        All ranks, for the library's own messages and windows.  Their order may be another one than in `comm`, so that
        replicas are on one host each; the first rank is the same.
    order
        For each rank of `world` its rank in `comm`.
    hosts : (ranks,) array of int64
        For each rank of `world` the lowest one on its host.
    host_names
        On the first rank, names by these numbers, where there are several hosts.
    shards
        The shards in order; MPI.COMM_NULL elsewhere.
    workers
        The workers in order; MPI.COMM_NULL elsewhere.
    replica
        The partitions of this worker's replica in order; MPI.COMM_NULL elsewhere.
    """

    def __init__(self, comm: MPI.Intracomm, plan: Plan) -> None:
        from mpi4py import MPI

        from dbmpi.mpi import host_placement, window

        if comm.size != plan.world:
            raise ValueError(f"the plan needs {plan.world} ranks, the communicator has {comm.size}")
        begin = "all ranks to begin the run"
        self.plan, self.hosts = plan, window.hosts(comm, begin)
        self.order = host_placement.ranks_by_position(plan, self.hosts)

        def split(color: int | None, number: int | None, roles: str) -> MPI.Intracomm:
            """Return the communicator of the ranks with the same color, by their numbers in a role."""
            what = f"all ranks to set apart the {roles}"
            return blocking.split(self.world, MPI.UNDEFINED if color is None else color, number or 0, what)

        if self.order == tuple(range(comm.size)):
            self.world = blocking.duplicate(comm, begin)
        else:
            self.world = blocking.split(comm, 0, self.order.index(comm.rank), begin)
            _, first, number = np.unique(self.hosts[list(self.order)], return_index=True, return_inverse=True)
            self.hosts = first[number]
        several = len(np.unique(self.hosts)) > 1
        self.host_names = host_placement.host_names(self.world, self.hosts) if several else {}
        self.shard, self.worker = plan.shard_of(self.world.rank), plan.worker_of(self.world.rank)
        self.shards = split(None if self.shard is None else 0, self.shard, "shards")
        self.workers = split(None if self.worker is None else 0, self.worker, "workers")
        self.replica = split(plan.replica_of(self.world.rank), self.worker, "replicas")

    def free(self) -> None:
        """Free the communicators (collective); a second call does nothing."""
        from mpi4py import MPI

        from dbmpi.mpi import failures

        if self.world != MPI.COMM_NULL and failures.dead(self.world):
            return  # nothing collective is possible once a rank has died
        for name in ("replica", "workers", "shards", "world"):
            comm = getattr(self, name)
            if comm != MPI.COMM_NULL:
                blocking.free(comm)
                setattr(self, name, MPI.COMM_NULL)
