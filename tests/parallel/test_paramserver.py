"""The parameter server under real MPI: what is pushed arrives once, whatever the ranks, shards and transport."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from dbmpi.objective import Outcome
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.layout import cut
from dbmpi.paramserver.memory import Memory
from dbmpi.paramserver.rules import Adagrad, Rule, Sgd
from dbmpi.paramserver.server import Server
from dbmpi.paramserver.window import Window
from dbmpi.runtime import waiting
from dbmpi.topology import Communicators, Plan

FLOAT = np.dtype(np.float32)
NOTHING = Outcome(1, 0.0, 0)


class Bench:
    """A parameter server set up on all ranks of a communicator; every rank has the parts of its roles."""

    def __init__(self, plan: Plan, window: Window, elements: int, chunk: int, rule: Rule, comm) -> None:
        self.plan, self.window, self.comm = plan, window, comm
        self.ranges = cut(elements, plan.shards)
        memories = [memory(plan, len(held), chunk) for held in self.ranges]
        shard, worker = plan.shard_of(comm.rank), plan.worker_of(comm.rank)
        self.server = self.client = None
        if shard is not None:
            self.held = self.ranges[shard]
            self.server = Server(window, memories[shard], shard, plan.worker_ranks, rule, FLOAT)
            self.server.begin(None)
        if worker is not None:
            self.client = Client(window, memories, plan.shard_ranks, self.ranges, worker, self.serve)
        waiting.barrier(comm, "everybody's set-up")

    def serve(self) -> bool:
        return self.server is not None and self.server.poll()

    def together(self) -> None:
        """Serve until every rank has come here."""

        def poll() -> bool:
            self.window.sync()
            return self.serve()

        waiting.barrier(self.comm, "the other ranks", serve=poll)


def memory(plan: Plan, elements: int, chunk: int) -> Memory:
    return Memory(plan.shards, plan.workers, elements, FLOAT.itemsize, min(chunk, elements))


@contextmanager
def parameter_server(
    comm, elements: int, *, shards: int = 1, chunk: int = 64, rule: Rule | None = None, shared: bool = True
) -> Iterator[Bench]:
    if comm.size > shards:
        plan = Plan(shards, comm.size - shards)
    else:
        plan = Plan(min(shards, comm.size), comm.size, colocate=True)
    shard = plan.shard_of(comm.rank)
    ranges = cut(elements, plan.shards)
    words = memory(plan, 0, 0).words_nbytes
    nbytes = words if shard is None else memory(plan, len(ranges[shard]), chunk).nbytes
    with (
        Communicators(comm, plan) as comms,
        Window.allocate(comms.world, nbytes, shared=shared) as window,
    ):
        yield Bench(plan, window, elements, chunk, rule or Sgd(1.0), comms.world)


@pytest.mark.parallel([1, 2, 3, 4, 6])
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "rma"])
def test_n_pushes_of_v_read_n_times_v(comm, shared) -> None:
    elements, rounds = 1000, 5
    with parameter_server(comm, elements, shared=shared) as bench:
        if bench.client is not None:
            gradient = -np.arange(elements, dtype=FLOAT)
            for _ in range(rounds):
                bench.client.push(gradient, NOTHING)
            gradient[:] = np.nan  # a pushed gradient may be changed at once
            bench.client.settle()
        bench.together()
        if bench.client is not None:
            parameters = np.empty(elements, FLOAT)
            bench.client.fetch(parameters)
            expected = rounds * bench.plan.workers * np.arange(elements)
            np.testing.assert_array_equal(parameters, expected)
        bench.together()
        if bench.server is not None:
            assert bench.server.version == rounds * bench.plan.workers


@pytest.mark.parallel([2, 3, 4, 6])
@pytest.mark.parametrize("elements", [1, 2, 3, 7, 130])
def test_any_cut_of_the_vector_gives_the_same(comm, elements) -> None:
    """Also with more shards than parameters, and chunks that do not divide a shard's range."""
    for shards in range(1, comm.size):
        with parameter_server(comm, elements, shards=shards, chunk=3) as bench:
            if bench.client is not None:
                bench.client.push(np.full(elements, -1, FLOAT), NOTHING)
                bench.client.settle()
            bench.together()
            if bench.server is not None:
                np.testing.assert_array_equal(bench.server.parameters, np.full(len(bench.held), bench.plan.workers))
            bench.together()


@pytest.mark.parallel([2, 4])
def test_concurrent_pushes_add_up_exactly(comm) -> None:
    """Integers: every lost, doubled or torn chunk would show."""
    elements = 5000
    with parameter_server(comm, elements, shards=comm.size // 2, chunk=257) as bench:
        rng = np.random.default_rng(comm.rank)
        mine = np.zeros(elements)
        if bench.client is not None:
            parameters = np.empty(elements, FLOAT)
            for _ in range(50):
                gradient = rng.integers(-8, 8, elements).astype(FLOAT)
                mine -= gradient
                bench.client.push(gradient, NOTHING)
                if rng.random() < 0.3:
                    bench.client.fetch(parameters)
            bench.client.settle()
        bench.together()
        total = np.empty_like(mine)
        comm.Allreduce(mine, total)
        if bench.server is not None:
            np.testing.assert_array_equal(bench.server.parameters, total[bench.held.start : bench.held.stop])


@pytest.mark.parallel([3])
def test_staleness_counts_the_pushes_of_others(comm) -> None:
    with parameter_server(comm, 10) as bench:
        if bench.client is not None:
            bench.client.fetch(np.empty(10, FLOAT))
        bench.together()
        if bench.client is not None:
            bench.client.push(np.ones(10, FLOAT), Outcome(4, 2.0, 3))
            bench.client.settle()
        bench.together()
        if bench.server is not None:
            tally = bench.server.take_tally()
            assert tally.staleness.counts == {0: 1, 1: 1}
            assert (tally.pushes, tally.outcome) == (2, Outcome(8, 4.0, 6))


@pytest.mark.parallel([2])
def test_adagrad_on_shards_equals_adagrad_in_one_piece(comm) -> None:
    elements, rule = 1000, Adagrad(0.1)
    with parameter_server(comm, elements, chunk=33, rule=rule) as bench:
        rng = np.random.default_rng(7)
        gradients = rng.standard_normal((20, elements)).astype(FLOAT)
        if bench.client is not None:
            for gradient in gradients:
                bench.client.push(gradient, NOTHING)
            bench.client.settle()
        bench.together()
        if bench.server is not None:
            parameters = np.zeros(elements, FLOAT)
            state = rule.init(parameters)
            for gradient in gradients:
                rule.apply(parameters, gradient, state)
            np.testing.assert_array_equal(bench.server.parameters, parameters)
            np.testing.assert_array_equal(bench.server.state["accumulator"], state["accumulator"])


@pytest.mark.parallel([2])
def test_an_idle_shard_costs_little(comm) -> None:
    """A shard that waits a second for its first push uses a small part of a core."""
    import time

    with parameter_server(comm, 10) as bench:
        if bench.server is not None:
            ends = time.monotonic() + 1.0
            before = time.process_time()
            waiting.until(lambda: time.monotonic() >= ends, "one second", serve=bench.serve)
            used = time.process_time() - before
            # The target is 3 %, shown by a benchmark; here only a spinning shard must fail.
            assert used < 0.3
        bench.together()
