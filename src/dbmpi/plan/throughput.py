"""Samples a second, staleness and the bottleneck of each way to use a cluster: a closed network of queues.

Replicas are customers that compute, and then visit the shards and the lines of the shards' nodes.  Their time there
with the waiting for other replicas follows by approximate mean-value analysis: Schweitzer's, "Approximate analysis of
multiclass closed networks of queues", 1979, for services that take a constant time, of which an arriving customer finds
the present one half done (Reiser, "A queueing network analysis of computer communication networks with window flow
control", 1979).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.paramserver.bottleneck import moved_bytes
from dbmpi.paramserver.memory import SLOTS, SMALLEST_CHUNK
from dbmpi.plan.rates import between
from dbmpi.plan.requirements import memory_needs
from dbmpi.plan.step import step_times

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dbmpi.plan.candidates import Candidates
    from dbmpi.plan.constants import MachineConstants
    from dbmpi.plan.demands import Demands
    from dbmpi.plan.step import Hardware, StepTimes
    from dbmpi.plan.work import ReplicaWork

_ITEM = 4
"""Bytes of a number in memory."""
_ROUNDS = 200
_POLL_ROUNDS = 3
_CLOSE = 1e-9
_LATENCIES = 6
"""One-way latencies of a push and a fetch between nodes: a flag and its answer, and a word and the parameters."""
_LOOKED_THROUGH = 0.5
"""Of the time of a copy: reading a gradient to see whether it is finite."""
_LATE, _LATEST = 0.1, 0.5e-3
"""A rank that waits sleeps a fifth of the time that it has waited, a millisecond at most, and is late by half of it."""
_SHORTEST, _LONGEST, _GROWTH = 20e-6, 1e-3, 1.25
"""Sleeps of a rank that waits: `mpi.waiting.Backoff`."""
_BUSY = 0.9
"""Of the most that something can do, from which it limits a run."""
BOTTLENECKS = (
    *("computing", "the slowest partition", "exchange between partitions", "fixed costs of a step"),
    *("transfers of a worker", "shards", "lines of the shards", "lines of the workers", "cores"),
)
"""What may limit a run; the first five as parts of a step, the others by being busy."""


@dataclass(frozen=True)
class Predictions:
    """What each of some ways to use a cluster will come to; arrays of one length."""

    step_seconds: np.ndarray
    """Of a replica, for a batch."""
    samples_per_second: np.ndarray
    """Of all replicas."""
    staleness: np.ndarray
    """Mean, in pushes of others between a fetch and the push that follows."""
    compute: np.ndarray
    """Seconds of a step, as the five below."""
    slowest: np.ndarray
    """Waiting for the slowest partition."""
    exchange: np.ndarray
    """Between partitions."""
    fixed: np.ndarray
    """What does not depend on the network."""
    transfers: np.ndarray
    """Of a worker: copies, and what its own line takes."""
    waiting: np.ndarray
    """For shards and their lines, service included."""
    busy: np.ndarray
    """Rows: the fraction of the time that shards, their lines, the workers' lines, and the cores are busy."""
    worker_bytes: np.ndarray
    """Memory of a worker."""
    shard_bytes: np.ndarray
    """Memory of a shard."""
    node_bytes: np.ndarray
    """Memory of the fullest node."""
    inbox_bytes: np.ndarray
    """What the inbox of a shard must have, at least."""

    def chosen(self, which: np.ndarray) -> Predictions:
        """Return the predictions of those ways that `which`, a mask or indices, names."""
        return Predictions(*(getattr(self, field.name)[..., which] for field in fields(self)))

    def bottleneck(self, number: int) -> str:
        """Return what limits the way of that `number`."""
        busiest = int(self.busy[:, number].argmax())
        if self.busy[busiest, number] >= _BUSY:
            return BOTTLENECKS[5 + busiest]
        parts = (self.compute, self.slowest, self.exchange, self.fixed, self.transfers)
        return BOTTLENECKS[int(np.argmax([part[number] for part in parts]))]


def polls(seconds: np.ndarray) -> np.ndarray:
    """Return how often a rank polls in a wait of some `seconds`: sleeps grow by a quarter, from 20 us to 1 ms."""
    growing = np.log1p(seconds * (_GROWTH - 1) / _SHORTEST) / np.log(_GROWTH)
    most = np.log(_LONGEST / _SHORTEST) / np.log(_GROWTH)
    until = (_LONGEST - _SHORTEST) / (_GROWTH - 1)
    result: np.ndarray = np.where(seconds <= until, growing, most + (seconds - until) / _LONGEST)
    return result


def predict(
    works: Mapping[int, ReplicaWork],
    demands: Demands,
    constants: MachineConstants,
    hardware: Hardware,
    ways: Candidates,
    *,
    threads: int | None = None,
) -> Predictions:
    """Predict what ways to use a cluster will come to.

    Parameters
    ----------
    works
        The work of a replica, by its partitions: for all those of the ways.
    demands, constants, hardware
        Of the configuration, the machines, and the cluster.
    ways
        How the cluster is used.
    threads
        Of a rank, at most: what the network is worth; by default as many as there are cores for each.
    """
    steps, sizes = _by_cut(works, demands, constants, hardware, ways, threads)
    partitions, replicas = ways.partitions, ways.replicas
    parameters, nodes, n_push = sizes[0], ways.nodes, ways.n_push
    fetches = n_push / ways.n_fetch
    # A worker reaches the shards of its own node through memory: few, and none where that node has shards only.
    beside = np.maximum(ways.ranks_of_node - np.maximum(ways.shards / nodes, 1), 0) / ways.workers
    far = np.where(nodes > 1, 1 - np.minimum(beside, 1), 0.0)
    held = _held(parameters, partitions, ways.shards)

    # Of a cycle, from one push to the next: what a replica does by itself.
    compute, slowest, exchange = (n_push * part for part in steps)
    copy = _ITEM * parameters / _speeds(constants.copies, _ITEM * parameters)
    near_copies = fetches * demands.fetch_copies + demands.push_copies
    own = copy * (near_copies * (1 - far) + demands.checks * _LOOKED_THROUGH)
    batch = _ITEM * np.array([works[int(p)].inputs for p in partitions]) * demands.samples / constants.batch_bandwidth
    fixed = n_push * (constants.step_seconds + batch)
    fixed = fixed + far * (constants.far_step_seconds + _LATENCIES * hardware.latency)

    # Shards and lines.
    wire, bandwidth = demands.wire_bytes, hardware.bandwidth
    update = moved_bytes(1, demands.states) * _ITEM * held / _speeds(constants.updates[str(demands.states)], held)
    apply = update + constants.service_seconds * np.maximum(-(-partitions // ways.shards), 1)
    shards_of_node = np.maximum(1, ways.shards / nodes)
    inward = far * wire * held * shards_of_node / bandwidth
    outward = fetches * inward
    workers_of_replica = np.minimum(partitions, ways.ranks_of_node)
    worker_line = far * (1 + fetches) * wire * parameters * workers_of_replica / bandwidth
    pieces = _pieces(demands, ways, held)
    in_pieces = far * (wire * held / (SLOTS * pieces)) * 2 * hardware.latency
    lines = np.maximum(worker_line - inward - outward, 0) + np.maximum(in_pieces - inward, 0)
    late = np.minimum(_LATE * (compute + slowest + exchange), _LATEST) + np.minimum(_LATE * apply, _LATEST)
    fixed = fixed + (0 if demands.overlap else late)

    demand = np.array([apply, inward, outward])
    busy_by_itself = compute + slowest + exchange + fixed
    transfers = own + lines
    rate, waited = _queues(demand, busy_by_itself, transfers, replicas, overlap=demands.overlap)

    # What no queue knows of: a node's line is shared by all its workers, and cores by ranks beyond their number.
    of_node = far * np.maximum(fetches, 1) * wire * parameters * ways.workers / nodes / bandwidth
    rate = np.minimum(rate, replicas / np.maximum(of_node, 1e-300))
    # Where a shard takes the core of a worker, to apply a push or to look for one, all partitions of a replica wait.
    crowded = ways.ranks_of_node > hardware.cores
    for _ in range(_POLL_ROUNDS):
        shard = apply + constants.poll_seconds * polls(np.maximum(1 / rate - apply, 0))
        work = partitions * (compute + slowest + exchange + own + fixed + ways.shards * shard)
        rate = np.where(crowded, np.minimum(rate, nodes * hardware.cores / work), rate)

    cycle = replicas / rate
    busy = np.array(
        [
            rate * apply,
            rate * np.maximum(inward, outward),
            rate / replicas * of_node,
            np.where(crowded, rate * work / (nodes * hardware.cores), 0.0),
        ]
    )
    needs = memory_needs(demands, constants, ways, parameters, sizes[1], held)
    return Predictions(
        step_seconds=cycle / n_push,
        samples_per_second=rate * n_push * demands.samples,
        staleness=_staleness(ways, demands, (compute + slowest + exchange) / n_push, cycle),
        compute=compute / n_push,
        slowest=slowest / n_push,
        exchange=exchange / n_push,
        fixed=fixed / n_push,
        transfers=transfers / n_push,
        waiting=waited / n_push,
        busy=busy,
        worker_bytes=needs.worker,
        shard_bytes=needs.shard,
        node_bytes=needs.node,
        inbox_bytes=needs.inbox,
    )


def _by_cut(
    works: Mapping[int, ReplicaWork],
    demands: Demands,
    constants: MachineConstants,
    hardware: Hardware,
    ways: Candidates,
    threads: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each way, compute, slowest and exchange of a step, and a worker's parameters and activations."""
    keys = np.stack([ways.partitions, ways.ranks_of_node, np.minimum(ways.nodes, 2)])
    distinct, where = np.unique(keys, axis=1, return_inverse=True)
    times: list[StepTimes] = []
    for partitions, ranks, nodes in distinct.T.tolist():
        for_each = max(1, hardware.cores // ranks)
        near = nodes == 1 or (partitions <= ranks and ranks % partitions == 0)
        times.append(
            step_times(
                *(works[partitions], demands.samples, constants, hardware),
                threads=for_each if threads is None else min(for_each, threads),
                # Where replicas do not fill nodes, some are on two, about half on each.
                workers_of_node=-(-partitions // 2) if partitions <= ranks else ranks,
                near=near,
            )
        )
    rows = np.array([(one.compute, one.slowest, one.exchange) for one in times])
    sizes = np.array([(works[p].parameters, works[p].activations) for p in distinct[0].tolist()], np.float64)
    return rows[where.ravel()].T, sizes[where.ravel()].T


def _held(parameters: np.ndarray, partitions: np.ndarray, shards: np.ndarray) -> np.ndarray:
    """Return the elements of the largest shard: shards end where partitions do."""
    many = np.maximum(shards // partitions, 1)
    result: np.ndarray = np.where(shards >= partitions, parameters / many, parameters * -(-partitions // shards))
    return result


def _speeds(points: tuple[tuple[float, float], ...], sizes: np.ndarray) -> np.ndarray:
    """Return the speeds at some sizes."""
    distinct, where = np.unique(sizes, return_inverse=True)
    found = np.array([between(points, size) for size in distinct.tolist()])
    result: np.ndarray = found[where.ravel()]
    return result


def _pieces(demands: Demands, ways: Candidates, held: np.ndarray) -> np.ndarray:
    """Return the bytes of the pieces in which a gradient travels to a shard."""
    room = np.maximum(demands.inbox / (ways.workers * SLOTS), SMALLEST_CHUNK)
    result: np.ndarray = np.minimum(np.minimum(room, demands.chunk), _ITEM * held)
    return result


def _queues(
    demand: np.ndarray, alone: np.ndarray, transfers: np.ndarray, replicas: np.ndarray, *, overlap: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pushes a second of all replicas, and how long each spends in the queues in a cycle.

    Parameters
    ----------
    demand
        Rows: the time of each queue for a push, without waiting.
    alone
        What a replica does by itself, in a cycle.
    transfers
        What it moves by itself.
    replicas
        How many there are.
    overlap
        Whether it computes while it moves and waits.
    """
    others = (replicas - 1) / replicas
    rate = replicas / (alone + transfers + demand.sum(axis=0))
    queue = rate * demand
    for _ in range(_ROUNDS):
        found = demand * (1 + np.maximum(others * (queue - 0.5 * rate * demand), 0))
        moving = transfers + found.sum(axis=0)
        new = replicas / (np.maximum(alone, moving) if overlap else alone + moving)
        new = np.minimum(new, 1 / np.maximum(demand.max(axis=0), 1e-300))
        change = float(np.max(np.abs(new - rate) / rate, initial=0.0))
        rate = 0.5 * (rate + new)
        queue = rate * found
        if change < _CLOSE:
            break
    return rate, found.sum(axis=0)


def _staleness(ways: Candidates, demands: Demands, step: np.ndarray, cycle: np.ndarray) -> np.ndarray:
    """Return the mean staleness.

    From a fetch to the application of its push every other replica pushes once, where replicas fetch and push in
    every step.  With several steps to a push, the fetch that counts is in the last one, as the paper's algorithm 1.1
    does both in the same step.  With several pushes for a fetch the last one is staler.  With overlap, parameters are
    used a cycle after their fetch began.
    """
    replicas, frequent = ways.replicas, ways.n_fetch <= ways.n_push
    window = np.where(frequent, 1 - (ways.n_push - 1) * step / cycle, 1.0)
    pushes = np.maximum(ways.n_fetch / ways.n_push, 1.0)
    found = np.where(frequent, (replicas - 1) * window, replicas * (pushes + 1) / 2 - 1)
    later = demands.overlap and demands.fetch_copies
    return found + (replicas if later else 0)
