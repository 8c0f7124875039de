"""What the roles of a run by Sandblaster know of it when they are put together: which rank holds what, and where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dbmpi.downpour.session import DTYPE, Session
from dbmpi.index.layout import Stretch, cut
from dbmpi.mpi import waiting
from dbmpi.mpi.window import Window
from dbmpi.paramserver.memory import Memory
from dbmpi.sandblaster.board import Board, Bundles


@dataclass(frozen=True, kw_only=True)
class Setup(Session):
    """What a rank knows when its roles are put together."""

    @cached_property
    def per_bundle(self) -> int:
        """Most portions of a bundle."""
        return 1 if self.run.sandblaster.deterministic else self.run.sandblaster.portions_per_push

    @cached_property
    def ranges(self) -> tuple[range, ...]:
        """The range of the flat vector that each shard holds."""
        return cut(self.network.layout.size, self.plan.shards)

    @cached_property
    def stretches(self) -> list[list[Stretch]]:
        """For each partition, where its parameters lie in the whole vector; the first replica tells all."""
        world, found = self.comms.world, []
        for rank in self.plan.worker_ranks[: self.plan.partitions]:
            runs = self.replica.parameters.runs if self.replica is not None and world.rank == rank else ()
            words = np.array(runs, np.int64).reshape(-1, 4)
            count = np.array([len(words)], np.int64)
            waiting.broadcast(world, count, rank, "how the parameters are cut")
            if world.rank != rank:
                words = np.empty((int(count[0]), 4), np.int64)
            waiting.broadcast(world, words, rank, "how the parameters are cut")
            found.append([Stretch(start, local, length, bool(push)) for start, local, length, push in words.tolist()])
        return found

    @cached_property
    def memories(self) -> list[Memory]:
        """What lies where on each shard: there is no inbox."""
        plan = self.plan
        return [
            Memory(plan.shards, plan.workers, len(held), DTYPE.itemsize, 0, plan.partitions) for held in self.ranges
        ]

    @cached_property
    def sizes(self) -> list[int]:
        """For each partition, the elements of its parameters."""
        return [sum(stretch.length for stretch in stretches) for stretches in self.stretches]

    @cached_property
    def tests(self) -> int:
        """Held-out samples; known where there is a worker, and told to all."""
        count = np.array([0 if self.data.test is None else self.data.test.samples], np.int64)
        waiting.broadcast(self.comms.world, count, self.plan.worker_ranks[0], "the number of held-out samples")
        return int(count[0])

    @cached_property
    def capacity(self) -> int:
        """Portions that the board has room for."""
        return max(self.order.batches_per_epoch, -(-self.tests // self.order.batch_size))

    def board(self, window: Window) -> Board:
        """Return the board, seen through this rank's window."""
        ordered = self.run.sandblaster.deterministic
        return Board(window, 0, self.memories[0].nbytes, self.plan.replicas, self.capacity, ordered)

    def bundles(self, worker: int) -> Bundles:
        """Return where a worker keeps its bundles: behind its shard's part, and the board."""
        rank = self.plan.worker_ranks[worker]
        shard = self.plan.shard_of(rank)
        offset = self.memories[0].words_nbytes if shard is None else self.memories[shard].nbytes
        if rank == 0:
            offset += Board.nbytes(self.plan.replicas, self.capacity)
        elements = self.sizes[worker % self.plan.partitions]
        return Bundles(-(-offset // 64) * 64, elements, self.per_bundle, self.plan.shards)

    def nbytes(self, rank: int) -> int:
        """Return the bytes of a rank's window."""
        worker, shard = self.plan.worker_of(rank), self.plan.shard_of(rank)
        if worker is not None:
            bundles = self.bundles(worker)
            return bundles.offset + bundles.nbytes
        board = Board.nbytes(self.plan.replicas, self.capacity) if rank == 0 else 0
        return board + (0 if shard is None else self.memories[shard].nbytes)
