"""Which rank of a run by Sandblaster holds what, and where in its window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dbmpi.config.sections import SandblasterSection
from dbmpi.index.layout import Stretch, cut
from dbmpi.mpi import waiting
from dbmpi.mpi.topology import Plan
from dbmpi.mpi.window import Window
from dbmpi.paramserver.memory import Memory, lines
from dbmpi.sandblaster.board import Board, Bundles
from dbmpi.session import DTYPE, Session


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run is laid out over its ranks; the same on all of them."""

    plan: Plan
    settings: SandblasterSection
    ranges: tuple[range, ...]
    """Of the flat vector, that each shard holds."""
    stretches: tuple[list[Stretch], ...]
    """For each partition, where its parameters lie in the whole vector."""
    tests: int
    """Held-out samples."""
    capacity: int
    """Portions of the largest batch."""
    metrics: int = 0
    """Sums of metrics that a result of held-out samples has."""

    @cached_property
    def memories(self) -> list[Memory]:
        """What lies where on each shard: there is no inbox."""
        plan = self.plan
        return [
            Memory(plan.shards, plan.workers, len(held), DTYPE.itemsize, 0, plan.partitions) for held in self.ranges
        ]

    @cached_property
    def _sizes(self) -> list[int]:
        """For each partition, the elements of its parameters."""
        return [sum(stretch.length for stretch in stretches) for stretches in self.stretches]

    def bundles(self, worker: int) -> Bundles:
        """Return where a worker keeps its bundles: behind its shard's part, and the board."""
        rank, elements = self.plan.worker_ranks[worker], self._sizes[worker % self.plan.partitions]
        portions = 1 if self.settings.deterministic else self.settings.portions_per_push
        return Bundles(rank, lines(self._before_bundles(rank)), elements, portions, self.plan.shards, self.metrics)

    def bundles_of(self, replica: int) -> list[Bundles]:
        """Return where the workers of a replica keep theirs, partition 0 first."""
        first = replica * self.plan.partitions
        return [self.bundles(worker) for worker in range(first, first + self.plan.partitions)]

    def board(self, window: Window) -> Board:
        """Return the board, seen through this rank's window."""
        ordered = self.settings.deterministic
        return Board(window, 0, self.memories[0].nbytes, self.plan.replicas, self.capacity, ordered)

    def nbytes(self, rank: int) -> int:
        """Return the bytes of a rank's window."""
        worker = self.plan.worker_of(rank)
        return self._before_bundles(rank) if worker is None else self.bundles(worker).end

    def _before_bundles(self, rank: int) -> int:
        shard = self.plan.shard_of(rank)
        board = Board.nbytes(self.plan.replicas, self.capacity) if rank == 0 else 0
        return board + (self.memories[0].words_nbytes if shard is None else self.memories[shard].nbytes)


def lay_out(session: Session) -> Setup:
    """Return how the run of a `session` is laid out; the first replica sends how it is cut to all (collective)."""
    comm, plan, order = session.comms.world, session.plan, session.order
    stretches = []
    for rank in plan.worker_ranks[: plan.partitions]:
        found = session.replica.parameters.runs if session.replica is not None and comm.rank == rank else ()
        words = np.array(found, np.int64).reshape(-1, 4)
        count = np.array([len(words)], np.int64)
        waiting.broadcast(comm, count, rank, "how the parameters are cut")
        if comm.rank != rank:
            words = np.empty((int(count[0]), 4), np.int64)
        waiting.broadcast(comm, words, rank, "how the parameters are cut")
        stretches.append([Stretch(start, local, length, bool(push)) for start, local, length, push in words.tolist()])
    held_out = np.array([0 if session.data.test is None else session.data.test.samples], np.int64)
    waiting.broadcast(comm, held_out, plan.worker_ranks[0], "the number of held-out samples")
    tests = int(held_out[0])
    return Setup(
        plan=plan,
        settings=session.run.sandblaster,
        ranges=cut(session.model.layout.size, plan.shards),
        stretches=tuple(stretches),
        tests=tests,
        capacity=max(order.batches_per_epoch, -(-tests // order.batch_size)),
        metrics=len(session.metrics),
    )
