"""The parameter server under real MPI: what is pushed arrives once, whatever the ranks, shards and transport."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest

from dbmpi.config import ServerSection
from dbmpi.errors import UserError
from dbmpi.index.layout import Stretch, cut
from dbmpi.mpi import waiting, window
from dbmpi.mpi.topology import Communicators, Plan
from dbmpi.objective import Outcome
from dbmpi.paramserver import client as client_module
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.rules import Adagrad, Rule, Sgd
from dbmpi.paramserver.server import Server
from dbmpi.paramserver.store import Store

FLOAT = np.dtype(np.float32)
NOTHING = Outcome(1, 0.0, 0)
WAYS = {
    "in place": {"push": "shared", "fetch": "copied"},
    "all in place": {"push": "shared", "fetch": "shared"},
    "copied": {"push": "copied", "fetch": "copied"},
    "rma": {"transport": "rma"},
    "p2p": {"transport": "p2p"},
}
"""How gradients and parameters travel; the last two as between hosts."""


def push(client: Client, gradient: np.ndarray, outcome: Outcome = NOTHING, steps: int = 1) -> None:
    """Push a whole gradient, which may be changed at once."""
    if client.far:
        pushed = gradient.copy()
    else:
        client.wait()  # until the shards have read the last one
        pushed = client.gradients[0]
        np.copyto(pushed, gradient)
    client.push(pushed)
    client.report(outcome, steps)
    client.drain(client.serve)


class Served:
    """Ranks that wait for each other and serve their shards meanwhile."""

    def __init__(self, store: Store, server: Server | None, comm) -> None:
        self.store, self.server, self.comm = store, server, comm
        self.window = store.window
        self.delay = 0.0

    def serve(self) -> bool:
        time.sleep(self.delay)
        return self.server is not None and self.server.poll()

    def together(self) -> None:
        """Serve until every rank has come here."""

        def poll() -> bool:
            self.window.sync()
            return self.serve()

        waiting.barrier(self.comm, "the other ranks", serve=poll)


class Bench(Served):
    """A parameter server set up on all ranks of a communicator; every rank has the parts of its roles."""

    def __init__(self, plan: Plan, store: Store, rule: Rule, comm, parts: Sequence[range] | None) -> None:
        self.plan = plan
        shard, worker = plan.shard_of(comm.rank), plan.worker_of(comm.rank)
        server = self.client = None
        if shard is not None:
            self.held = store.ranges[shard]
            server = store.server(rule)
            server.begin(None)
        super().__init__(store, server, comm)
        if worker is not None:
            self.client = store.client(parts=parts, serve=self.serve)
        waiting.barrier(comm, "everybody's set-up")


@contextmanager
def parameter_server(
    comm,
    elements: int,
    *,
    shards: int = 1,
    chunk: int = 64,
    rule: Rule | None = None,
    way: str = "in place",
    overlap: str = "none",
    consistent: bool = False,
    buffer: int | None = None,
    parts: Sequence[range] | None = None,
) -> Iterator[Bench]:
    """Open a server.

    `buffer` is how many elements a worker may have on their way where there is no whole gradient; `parts` are pushed
    one by one.
    """
    if comm.size > shards:
        plan = Plan(shards, comm.size - shards)
    else:
        plan = Plan(min(shards, comm.size), comm.size, colocate=True)
    gradients = "whole" if buffer is None else "layers"
    section = ServerSection(**WAYS[way], overlap=overlap, consistent=consistent, gradients=gradients)
    shared, ranges, own = "transport" not in WAYS[way], cut(elements, plan.shards), buffer or elements
    with (
        Communicators(comm, plan) as comms,
        Store(comms.world, plan, ranges, section, FLOAT, own, shared=shared, chunk=chunk) as store,
    ):
        yield Bench(plan, store, rule or Sgd(1.0), comms.world, parts)


@pytest.mark.parallel([1, 2, 3, 4, 6])
@pytest.mark.parametrize("way", WAYS)
def test_n_pushes_of_v_read_n_times_v(comm, way) -> None:
    elements, rounds = 1000, 5
    with parameter_server(comm, elements, way=way) as bench:
        if bench.client is not None:
            gradient = -np.arange(elements, dtype=FLOAT)
            for _ in range(rounds):
                push(bench.client, gradient)
            gradient[:] = np.nan
            bench.client.wait()
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
                push(bench.client, np.full(elements, -1, FLOAT))
                bench.client.wait()
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
                push(bench.client, gradient)
                if rng.random() < 0.3:
                    bench.client.fetch(parameters)
            bench.client.wait()
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
            push(bench.client, np.ones(10, FLOAT), Outcome(4, 2.0, 3))
            bench.client.wait()
        bench.together()
        if bench.server is not None:
            tally = bench.server.take_tally()
            assert tally.staleness.counts == {0: 1, 1: 1}
            assert (tally.pushes, tally.outcome) == (2, Outcome(8, 4.0, 6))


@pytest.mark.parallel([5])
def test_partitions_of_one_replica_do_not_make_each_other_stale(comm) -> None:
    """Each has its own part of the parameters; what the same partition of another replica pushes does."""
    elements, half = 10, 5
    plan = Plan(shards=1, replicas=2, partitions=2)
    with Store(comm, plan, cut(elements, 1), ServerSection(), FLOAT, half) as store:
        client = server = None
        if comm.rank == 0:
            server = store.server(Sgd(1.0))
            server.begin(None)
        else:
            place = half * ((comm.rank - 1) % 2)
            client = store.client([Stretch(place, 0, half, pushed=True)])
        bench = Served(store, server, comm)
        for _ in range(2):
            bench.together()
            if client is not None:
                client.fetch(np.empty(half, FLOAT))
            bench.together()
            if client is not None:
                push(client, np.ones(half, FLOAT))
                client.wait()
                assert client.fetched_bytes == client.pushed_bytes  # no more than its own part
        bench.together()
        if client is not None:
            assert client.pushed_bytes == 2 * half * FLOAT.itemsize
        if server is not None:
            assert server.tally.staleness.counts == {0: 4, 1: 4}
            assert server.version == 4


@pytest.mark.parallel([3])
@pytest.mark.parametrize("left", ["parameters alone", "nothing"])
def test_too_little_shared_memory_is_worked_around(comm, monkeypatch, left) -> None:
    elements = 10_000
    free = {"parameters alone": 2.5 * 4 * elements, "nothing": 0}[left]
    monkeypatch.setattr(window, "_shared_memory_free", lambda: int(free))
    with parameter_server(comm, elements) as bench:
        note, *chosen = bench.store.notes
        assert "/dev/shm" in note
        assert [line for line in chosen if "transport" in line] == chosen
        assert len(chosen) == (left == "nothing")  # who shares no memory must know the faster way
        assert bench.window.shared == (left != "nothing")
        if bench.client is not None:
            assert bench.client.far  # no shard reads its gradient in place
            push(bench.client, np.full(elements, -1, FLOAT))
            bench.client.wait()
        bench.together()
        if bench.server is not None:
            np.testing.assert_array_equal(bench.server.parameters, np.full(elements, 2))
        bench.together()
    refused = pytest.raises(UserError, match=r"--shm-size.*or set server\.fetch") if not free else nullcontext()
    with refused, parameter_server(comm, elements, way="all in place"):
        pass


@pytest.mark.parallel([4])
@pytest.mark.parametrize("way", ["in place", "copied", "rma", "p2p"])
@pytest.mark.parametrize("consistent", [True, False])
def test_a_consistent_fetch_sees_whole_pushes(comm, monkeypatch, way, consistent) -> None:
    """Two clients push in 16 chunks to a slow shard; the third reads meanwhile, and without care torn vectors."""
    elements = 1024
    monkeypatch.setattr(client_module, "_READ_AT_ONCE", 64)
    with parameter_server(comm, elements, way=way, consistent=consistent) as bench:
        reader = comm.size - 1
        if bench.server is not None:
            bench.delay = 0.0003
        elif comm.rank == reader:
            parameters, torn, seen = np.empty(elements, FLOAT), 0, set()
            while len(seen) < 10 if consistent else not torn:  # however slow the others are
                bench.client.fetch(parameters)
                seen.add(float(parameters.max()))
                torn += bool(parameters.min() != parameters.max())
                time.sleep(0.003)
            for rank in (1, 2):
                waiting.complete(comm.Isend(np.zeros(1), rank, 5), "the others to stop", serve=bench.serve)
            assert torn == 0 or not consistent
        else:
            while not comm.Iprobe(reader, 5):
                push(bench.client, np.full(elements, -1, FLOAT))
                bench.client.wait()
            comm.Recv(np.empty(1), reader, 5)
        bench.together()


@pytest.mark.parallel([2])
def test_adagrad_on_shards_equals_adagrad_in_one_piece(comm) -> None:
    elements, rule = 1000, Adagrad(0.1)
    with parameter_server(comm, elements, chunk=33, rule=rule) as bench:
        rng = np.random.default_rng(7)
        gradients = rng.standard_normal((20, elements)).astype(FLOAT)
        if bench.client is not None:
            for gradient in gradients:
                push(bench.client, gradient)
            bench.client.wait()
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
    with parameter_server(comm, 10) as bench:
        if bench.server is not None:
            ends = time.monotonic() + 1.0
            before = time.process_time()
            waiting.until(lambda: time.monotonic() >= ends, "one second", serve=bench.serve)
            used = time.process_time() - before
            # The target is 3 %, shown by a benchmark; here only a spinning shard must fail.
            assert used < 0.3
        bench.together()


@pytest.mark.parallel([2])
@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("way", ["in place", "copied", "p2p"])
def test_of_a_client_that_is_held_just_the_pushes_that_count_are_applied(comm, way, consistent) -> None:
    elements, chunk = 90, 40
    parts = [range(30), range(30, 60), range(60, 90)]
    with parameter_server(comm, elements, way=way, chunk=chunk, consistent=consistent, parts=parts) as bench:
        server, client = bench.server, bench.client
        bench.together()
        if server is not None:
            server.hold(0)
        waiting.barrier(comm, "the shard to hold the client")
        if client is not None:
            gradient = client.gradients[0]
            gradient[:] = -1
            for part in (2, 1, 0):
                client.push(gradient[parts[part].start : parts[part].stop], part)
            client.report(NOTHING, 1)
            client.push(gradient[60:], 2)  # of another one, which is never completed
            client.progress()
        bench.together()
        if server is not None:
            waiting.until(lambda: server.reports(0) == 1, "all that has been sent", serve=bench.window.sync)
            assert server.progress(0) == (1, 2 if way == "in place" else 1, 0)
            assert server.settle(0, 1, gone=True)
            np.testing.assert_array_equal(server.parameters, np.ones(elements))
            assert server.version == 1
            assert server.take_tally().steps == 1
            assert not server.pushing
            for _ in range(3):
                server.poll()
            server.let_go(0)  # which is too late
            server.poll()
            np.testing.assert_array_equal(server.parameters, np.ones(elements))
        if client is not None:
            client.leave()
            client.wait()
        bench.together()


@pytest.mark.parallel([2])
@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("way", ["in place", "copied", "p2p"])
def test_a_push_that_is_withheld_is_counted_in_its_place_and_changes_nothing(comm, way, consistent) -> None:
    """Of one that pushes, withholds, pushes and withholds, two count, three, or all, as settled."""
    with parameter_server(comm, 90, way=way, chunk=40, consistent=consistent) as bench:
        server, client = bench.server, bench.client
        bench.together()
        if server is not None:
            server.hold(0)
        waiting.barrier(comm, "the shard to hold the client")
        if client is not None:
            client.gradients[0][:] = -1
            for withheld in (True, False, True):
                client.samples = 5
                if withheld:
                    client.withhold()
                else:
                    client.push(client.gradients[0])
                client.report(Outcome(5, np.nan if withheld else 2.0, 3), 1, withheld=withheld)
                client.progress()
        bench.together()
        if server is not None:
            for count in (1, 2, 3):
                # The inbox may be full before.
                waiting.until(lambda count=count: server.reports(0) >= count, "reports", serve=bench.window.sync)
                assert server.progress(0).whole >= count
                assert server.settle(0, count, gone=False)
                assert server.progress(0).touched == count
                pushed = int(count > 1)
                np.testing.assert_array_equal(server.parameters, np.full(90, pushed))
                assert (server.version, server.samples) == (pushed, 5 * count)
                tally = server.tally
                assert (tally.pushes, tally.steps, tally.samples) == (pushed, count, 5 * count)
                assert (tally.withheld, tally.outcome) == (
                    count - pushed,
                    Outcome(5 * pushed, 2.0 * pushed, 3 * pushed),
                )
                assert not server.pushing
            server.let_go(0)
        if client is not None:
            client.wait()
        bench.together()


@pytest.mark.parallel([3])
def test_a_report_is_settled_also_while_half_a_push_of_another_client_is_held(comm) -> None:
    with parameter_server(comm, 90, way="copied", chunk=10, consistent=True) as bench:
        server, client = bench.server, bench.client
        if client is not None:
            client.gradients[0][:] = -1
        if comm.rank == 2 and client is not None:
            client.push(client.gradients[0])
            client.wait()
        bench.together()
        if comm.rank == 1 and client is not None:
            client.push(client.gradients[0])
            client.progress()  # as many chunks as there are slots, fewer than the push has
        bench.together()
        if server is not None:
            waiting.until(lambda: server.pushing, "half a push", serve=bench.serve)
        bench.together()
        if comm.rank == 2 and client is not None:
            client.report(NOTHING, 1)
            client.progress()
        bench.together()
        if server is not None:
            server.hold(0)
            server.hold(1)
            assert (server.progress(1).whole, server.reports(1)) == (1, 1)
            before = server.parameters.copy()
            assert server.settle(1, 1, gone=True)
            assert server.take_tally().steps == 1
            assert server.pushing
            assert server.settle(0, 0, gone=True)
            assert not server.pushing
            np.testing.assert_array_equal(server.parameters, before)
            assert 90 < before.sum() < 180
        if client is not None:
            client.leave()
        bench.together()
