"""The protocol of portions under randomised schedules, in one process: each portion counts exactly once."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from dbmpi.mpi.failures import RankLost
from dbmpi.objective import Outcome
from dbmpi.sandblaster.board import Board, Bundles, PassKind, PortionResult, PostedBatch, pack, unpack
from dbmpi.sandblaster.passes import Passes
from dbmpi.sandblaster.replica import Portions

SIZE, SHARDS = 7, 2
SAMPLES = 8  # of a portion, of which there are powers of two: shares are exact


class Memory:
    """The windows of several ranks in one process."""

    def __init__(self, nbytes: list[int]) -> None:
        self.locals = [np.zeros(size, np.uint8) for size in nbytes]
        self.words = [memoryview(local[: local.nbytes // 8 * 8]).cast("q") for local in self.locals]
        self.gone: set[int] = set()

    def view(self, rank):
        return View(self, rank)

    def load(self, rank, offset):
        assert offset % 8 == 0
        return self.words[rank][offset // 8]

    def store(self, rank, offset, value):
        assert offset % 8 == 0
        self.words[rank][offset // 8] = value

    def compare_and_swap(self, rank, offset, expected, value):
        before = self.load(rank, offset)
        if before == expected:
            self.store(rank, offset, value)
        return before

    def get(self, rank, offset, out):
        if rank in self.gone:
            raise RankLost(f"rank {rank} has died")
        out[:] = self.locals[rank][offset : offset + out.nbytes].view(out.dtype)

    def sync(self):
        pass


class View:
    def __init__(self, memory, rank):
        self.memory, self.local = memory, memory.locals[rank]

    def __getattr__(self, name):
        return getattr(self.memory, name)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Work:
    """Gradients of integers, which float32 adds exactly in any order."""

    def __init__(self, clock):
        self.clock, self.point, self.points, self.seconds = clock, None, [None], 1.0

    def begin(self, batch):
        self.point = self.points[0]

    def end(self):
        self.point = None

    def compute(self, batch, portion, gradient):
        self.clock.now += self.seconds
        if batch.kind == PassKind.GRADIENT:
            gradient[:] = self.point * batch.portions * np.arange(1, SIZE + 1) * (batch.first + portion + 1)
        return Outcome(SAMPLES, float(self.point * portion), portion % SAMPLES)


class Alone:
    """The team of one worker, which does not wait: what it waits for may need the lead, on the same thread."""

    speaks = True

    def poll(self, decision):
        return decision

    def gather(self):
        pass

    def wait(self, condition, what):
        pass


class World:
    """A lead on rank 0, shards that take in bundles late, and replicas on the ranks behind."""

    def __init__(self, seed, replicas, *, per_bundle=3, ordered=False, partitions=1):
        self.random, self.clock = random.Random(seed), Clock()
        self.replicas, self.ordered = replicas, ordered
        capacity, per_bundle = 64, 1 if ordered else per_bundle
        self.bundles = [Bundles(1 + r, 64, SIZE, per_bundle, SHARDS) for r in range(replicas)]
        self.memory = Memory([Board.nbytes(replicas, capacity), *(bundles.end for bundles in self.bundles)])
        board = self.board = Board(self.memory, 0, 0, replicas, capacity, ordered)
        self.works = [Work(self.clock) for _ in range(replicas)]
        self.workers = [
            Portions(
                board, self.memory.view(1 + r), Alone(), self.works[r],
                replica=r, bundles=self.bundles[r], takers=range(SHARDS), clock=self.clock,
            )
            for r in range(replicas)
        ]  # fmt: skip
        self.passes = Passes(board, [[bundles] for bundles in self.bundles], self.clock)
        self.queues: list[list[tuple[int, int]]] = [[] for _ in range(SHARDS)]
        self.accrued = np.zeros((SHARDS, SIZE), np.float32)
        self.halted: set[int] = set()
        self.dead: set[int] = set()

    def poll(self):
        """Let the lead take what is committed, and tell the shards what counts."""
        counting = self.passes.poll()
        for queue in self.queues:
            queue.extend(counting or ())

    def take(self, shard):
        """Let a shard take in what it was told of first."""
        if self.queues[shard]:
            replica, bundle = self.queues[shard].pop(0)
            gradient = np.empty(SIZE, np.float32)
            try:
                self.memory.get(1 + replica, self.bundles[replica].gradient_of(bundle), gradient)
            except RankLost:
                self.missed += 1
                return
            self.accrued[shard] += gradient
            self.memory.store(1 + replica, self.bundles[replica].taken(shard, bundle), bundle + 1)

    def kill(self, replica, probability):
        """Perhaps let a replica die, with its memory or without; the lead hears of it later."""
        if probability == 0 or self.random.random() >= probability or len(self.dead) == self.replicas - 1:
            return
        self.dead.add(replica)
        if self.random.random() < 0.5:
            self.memory.gone.add(1 + replica)

    def run(self, point, portions, first=0, kind=PassKind.GRADIENT, halting=0.0, dying=0.0):
        """Run a batch, everybody taking steps in random order; halt, wake and kill workers with a probability.

        Where a shard could not read what counts, all begins anew, as with the coordinator; returns how often it did.
        """
        anew = -1
        while anew < 0 or self.missed:
            anew, self.missed = anew + 1, 0
            self._run(point, portions, first, kind, halting, dying)
        return anew

    def _run(self, point, portions, first, kind, halting, dying):
        self.accrued[:] = 0
        for work in self.works:
            work.points[0] = point
            work.seconds = self.random.choice([0.1, 1.0, 10.0])
        self.passes.begin(kind, portions, first, portions * SAMPLES)
        chance = self.random.random
        for step in itertools.count():
            assert step < 100_000, self.passes.awaited()
            self.clock.now += 0.01
            actor = int(chance() * (self.replicas + SHARDS + 1))
            if actor < self.replicas:
                if halting and chance() < halting:
                    self.halted ^= {actor}
                    if len(self.halted | self.dead) == self.replicas:  # somebody has to be left
                        self.halted -= {next(iter(set(range(self.replicas)) - self.dead))}
                self.kill(actor, dying)
                if actor not in self.halted | self.dead:
                    self.workers[actor].poll()
            elif actor < self.replicas + SHARDS:
                self.take(actor - self.replicas)
            else:
                for replica in self.dead if self.random.random() < 0.1 else ():
                    self.passes.give_up(replica)
                self.poll()
                if self.passes.finished:
                    break
        for shard in range(SHARDS):
            while self.queues[shard]:
                self.take(shard)

    def check(self, point, portions, first=0):
        """Compare what the shards hold with the sum, exactly."""
        total = point * sum(range(first + 1, first + portions + 1))
        for accrued in self.accrued:
            np.testing.assert_array_equal(accrued, total * np.arange(1, SIZE + 1, dtype=np.float32))
        assert sorted(entry.portion for entry in self.passes.ledger) == list(range(portions))
        outcome = self.passes.outcome
        assert outcome.samples == portions * SAMPLES
        assert outcome.loss == point * portions * (portions - 1) / 2
        assert sum(self.passes.shares.values()) == portions


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("block", range(4))
@pytest.mark.slow
def test_each_portion_counts_once_under_any_schedule(block, ordered):
    halts = revoked = copies = 0
    for seed in range(50 * block, 50 * block + 50):
        replicas = 1 + seed % 4
        world = World(seed, replicas, per_bundle=1 + seed % 5, ordered=ordered)
        for point, portions, first in ((1, 16, 0), (2, 4, 5), (3, 1, 0), (1, 32, 7)):
            world.run(point, portions, first, halting=0.02 * (seed % 3))
            world.check(point, portions, first)
            halts += len(world.halted)
            revoked += world.passes.revoked
        copies += sum(worker.copies for worker in world.workers)
    assert halts > 0
    assert revoked > 0
    assert copies > 0


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.slow
def test_each_portion_counts_once_where_replicas_die(ordered):
    deaths = gone = anew = 0
    for seed in range(100):
        world = World(seed, 2 + seed % 4, per_bundle=1 + seed % 5, ordered=ordered)
        for point, portions, first in ((1, 16, 0), (2, 4, 5), (3, 1, 0), (1, 32, 7)):
            anew += world.run(point, portions, first, halting=0.02 * (seed % 3), dying=0.01)
            world.check(point, portions, first)
            assert world.passes.lost <= world.dead
            world.halted -= world.dead
        deaths += len(world.passes.lost)
        gone += len(world.memory.gone)
    assert deaths > 50
    assert gone > 20
    assert anew > 3


def test_an_even_run_in_step_makes_no_copies():
    world = World(0, 2, per_bundle=4)
    world.passes.begin(PassKind.GRADIENT, 16, 0, 16 * SAMPLES)
    for work in world.works:
        work.points[0], work.seconds = 1, 0.0
    for _ in range(200):
        for worker in world.workers:
            worker.poll()
        world.poll()
        for shard in range(SHARDS):
            world.take(shard)
    assert world.passes.finished
    assert [worker.computed for worker in world.workers] == [8, 8]
    assert world.passes.shares == {0: 8, 1: 8}
    assert len({entry[1:] for entry in world.passes.ledger}) == 4  # bundles of four
    # Each has its stretch, in every pass, so that it reads ahead and keeps no more than that.
    assert {entry.portion: entry.replica for entry in world.passes.ledger} == {p: p // 8 for p in range(16)}


def test_who_is_done_with_its_stretch_draws_the_last_ones_of_who_has_most_left():
    world = World(0, 3)
    board, batch = world.board, PostedBatch(7, PassKind.GRADIENT, 11, 0, 88)
    board.open(batch)
    assert [board.draw(batch, 0) for _ in range(3)] == [0, 1, 2]
    assert [board.draw(batch, 1) for _ in range(2)] == [3, 4]
    assert [board.draw(batch, 0) for _ in range(4)] == [10, 9, 6, 8]
    assert board.draw(batch, 2) == 7
    assert board.draw(batch, 2) == 5
    assert [board.draw(batch, replica) for replica in range(3)] == [None] * 3
    assert board.draw(batch._replace(number=6), 1) is None


def test_what_a_halted_replica_holds_is_handed_out_again():
    world = World(0, 2, per_bundle=4)
    world.passes.begin(PassKind.GRADIENT, 8, 0, 8 * SAMPLES)
    for work in world.works:
        work.points[0] = 1
    first, second = world.workers
    while first._sums < 2:  # two portions won and not committed, then it is halted for good
        first.poll()
    first.poll()  # a third is computed, but not won
    while not world.passes.finished:
        world.clock.now += 0.1
        second.poll()
        world.poll()
        world.take(0)
        world.take(1)
    world.check(1, 8)
    assert world.passes.shares == {1: 8}
    assert world.passes.revoked == 1
    first.poll()  # it wakes up: what it has is worth nothing
    for _ in range(20):
        first.poll()
    assert world.passes.shares == {1: 8}
    world.run(2, 16)
    world.check(2, 16)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_batch_ends_wherever_a_replica_is_halted_for_good(ordered):
    """Also between claim and commit of what all others wait for, their slots full."""
    for polls, portions in itertools.product(range(12), (3, 7, 20)):
        world = World(polls, 3, per_bundle=2, ordered=ordered)
        world.passes.begin(PassKind.GRADIENT, portions, 0, portions * SAMPLES)
        for work in world.works:
            work.points[0] = 1
        for _ in range(polls):
            world.workers[0].poll()
        for step in itertools.count():
            assert step < 2000, world.passes.awaited()
            world.clock.now += 0.1
            for worker in world.workers[1:]:
                worker.poll()
            world.poll()
            world.take(0)
            world.take(1)
            if world.passes.finished:
                break
        while any(world.queues):
            world.take(0)
            world.take(1)
        world.check(1, portions)


@pytest.mark.parametrize("ordered", [False, True])
def test_replicas_that_are_slow_to_commit_are_not_revoked_for_ever(ordered):
    """On a busy machine, by messages, a claim and its commit lie further apart than portions are long."""
    world = World(1, 3, per_bundle=2, ordered=ordered)
    for work in world.works:
        work.points[0], work.seconds = 1, 0.0
    world.passes.begin(PassKind.GRADIENT, 6, 0, 6 * SAMPLES)
    for step in itertools.count():
        assert step < 100, world.passes.awaited()
        for worker in world.workers:
            worker.poll()
        for _ in range(40):
            world.clock.now += 0.01
            world.poll()
        world.take(0)
        world.take(1)
        if world.passes.finished and not any(world.queues):
            break
    world.check(1, 6)


@pytest.mark.parametrize("first", [2**20 - 3, 2**20, 5 * 2**20 - 1])
def test_numbers_of_bundles_may_exceed_the_bits_of_a_claim(first):
    for seed in range(20):
        world = World(seed, 3, per_bundle=2)
        for replica in range(3):
            world.memory.store(0, world.passes._board._bundle(replica), first)
            world.passes._seen[replica] = first
        for point in (1, 2, 3):
            world.run(point, 16, halting=0.03)
            world.check(point, 16)


def test_in_order_the_bits_do_not_depend_on_the_schedule():
    class Rough(Work):
        def compute(self, batch, portion, gradient):
            gradient[:] = np.random.default_rng(portion).normal(size=SIZE)
            self.clock.now += self.seconds
            return Outcome(SAMPLES, float(gradient.sum()), 0)

    results = set()
    for seed in range(20):
        world = World(seed, 1 + seed % 4, ordered=True)
        for worker in world.workers:
            worker._work.__class__ = Rough
        world.run(1, 32, halting=0.02 * (seed % 2))
        results.add(world.accrued.tobytes() + np.float64(world.passes.outcome.loss).tobytes())
    assert len(results) == 1


def test_a_batch_of_held_out_samples_sends_no_gradients():
    world = World(3, 3)
    world.run(1, 16)
    world.run(1, 20, kind=PassKind.TEST)
    assert not world.accrued.any()
    assert world.passes.outcome.loss == 190
    world.run(2, 16)
    world.check(2, 16)


def test_lists_of_results_survive_the_journey():
    results = [PortionResult(3, 8, -1, 0.1), PortionResult(2**40, 1, 5, float("nan"))]
    words = np.zeros(Bundles(0, 0, 1, 3, 1).list_words, np.int64)
    pack(words, 77, 0.25, results)
    batch, seconds, found = unpack(words)
    assert (batch, seconds) == (77, 0.25)
    assert str(found) == str(results)
