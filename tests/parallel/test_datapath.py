"""Fetching, pushing and computing at the same time: nothing is lost, doubled or torn, whoever is slow."""

from __future__ import annotations

import time
from itertools import accumulate, pairwise

import numpy as np
import pytest
from parallel import tiny
from parallel.test_paramserver import WAYS, parameter_server

from dbmpi.downpour import buffer
from dbmpi.downpour.algorithm import downpour
from dbmpi.downpour.datapath import DataPath, Flow, Push
from dbmpi.monitor.measures import Stopwatch
from dbmpi.mpi import waiting
from dbmpi.mpi.window import Window
from dbmpi.objective import Batch, Outcome
from dbmpi.runs.training import train

LAYERS = (300, 0, 7, 1000, 93)
PARTS = tuple(range(start, stop) for start, stop in pairwise(accumulate(LAYERS, initial=0)))


class Integers:
    """An objective whose gradients are random integers, layer by layer; it also looks at what it computes from."""

    def __init__(self, seed: int) -> None:
        self.size = sum(LAYERS)
        self.total = np.zeros(self.size)
        self._rng = np.random.default_rng(seed)

    def loss_and_gradient(self, parameters, batch, gradient, on_gradient=None, *, step=0, add=False, **_) -> Outcome:
        before = parameters.copy()
        for layer in reversed(range(len(LAYERS))):
            part = slice(PARTS[layer].start, PARTS[layer].stop)
            new = self._rng.integers(-8, 8, LAYERS[layer])
            out = gradient(layer) if callable(gradient) else gradient[part]
            out[:] = out + new if add else new
            self.total[part] += new
            if on_gradient is not None:
                on_gradient(layer)
        self.still = bool(np.array_equal(parameters, before))
        return Outcome(batch.samples, 0.0, 0)


class Watch:
    """Lets the loop take all steps; counts what is pushed."""

    def __init__(self, steps: int = 0) -> None:
        self.stopwatch = Stopwatch()
        self.steps = 0
        self._numbers = iter(range(steps))

    expired = False

    def proceed(self, fetches: bool) -> int | None:
        return next(self._numbers, None)

    def load(self, number: int) -> Batch:
        return Batch(np.zeros((1, 1), np.float32), np.zeros(1, np.int32))

    def stepped(self, outcome: Outcome) -> None:
        pass

    def pushed(self, push: Push, *, last: bool) -> None:
        assert not push.withheld
        self.steps += push.steps


@pytest.mark.parallel([1, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("n_push", "n_fetch", "slow", "apart"),
    [(1, 1, "shard", False), (1, 2, "sender", False), (3, 2, "shard", False), (3, 2, "shard", True)],
)
def test_the_sum_of_all_pushes_is_the_sum_of_all_gradients(
    comm, monkeypatch, way, n_push, n_fetch, slow, apart
) -> None:
    """Integers, so exactly; a gradient that is overwritten while it leaves would show."""
    steps, put = 12, Window.put

    def slow_put(window, *arguments) -> None:
        time.sleep(0.0005)
        put(window, *arguments)

    shards, flow = max(1, comm.size // 2), Flow(PARTS, overlap=True, apart=apart)
    with parameter_server(comm, sum(LAYERS), shards=shards, way=way, overlap="threads", parts=flow.parts) as bench:
        total, objective, watch = np.zeros(sum(LAYERS)), Integers(comm.rank), Watch(steps)
        if slow == "sender":
            monkeypatch.setattr(Window, "put", slow_put)
        elif bench.server is not None:
            bench.delay = 0.001
        if bench.client is not None:
            path = DataPath(bench.client, flow, watch.stopwatch("push"))
            downpour(objective, path, watch, n_push=n_push, n_fetch=n_fetch)
            total = objective.total
            assert watch.steps == steps
            assert objective.still or way == "all in place"  # a fetch becomes current between two steps
        bench.together()
        whole = np.empty_like(total)
        comm.Allreduce(total, whole)
        if bench.server is not None:
            held = slice(bench.held.start, bench.held.stop)
            np.testing.assert_array_equal(bench.server.parameters, -whole[held])
            tally = bench.server.take_tally()
            if bench.plan.shard_of(comm.rank) == 0:
                assert (tally.steps, tally.outcome.samples) == (steps * bench.plan.workers,) * 2
            pushes = 1 + -(-(steps - 1) // n_push)  # the first step, and then every n_push and what remains
            assert tally.staleness.total == tally.pushes == pushes * bench.plan.workers
        bench.together()


@pytest.mark.parallel([1, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("overlap", ["none", "threads"])
def test_layers_that_share_a_buffer_leave_it_before_it_is_used_again(comm, monkeypatch, way, overlap) -> None:
    """The buffer is that of the largest layer, and the shards are slow: a layer that does not wait would show."""
    steps, flow = 12, Flow(PARTS, overlap=overlap == "threads", whole=False)
    monkeypatch.setattr(buffer, "_ENOUGH", 1)
    assert flow.buffer_size == max(LAYERS)
    shards, size = max(1, comm.size // 2), sum(LAYERS)
    with parameter_server(
        comm, size, shards=shards, way=way, overlap=overlap, buffer=max(LAYERS), parts=flow.parts
    ) as bench:
        total, objective, watch = np.zeros(sum(LAYERS)), Integers(comm.rank), Watch(steps)
        if bench.server is not None:
            bench.delay = 0.0005
        if bench.client is not None:
            assert sum(map(len, bench.client.gradients)) == max(LAYERS)
            path = DataPath(bench.client, flow, watch.stopwatch("push"))
            downpour(objective, path, watch)
            total = objective.total
            assert objective.still or way == "all in place"
        bench.together()
        whole = np.empty_like(total)
        comm.Allreduce(total, whole)
        if bench.server is not None:
            np.testing.assert_array_equal(bench.server.parameters, -whole[bench.held.start : bench.held.stop])
            tally = bench.server.take_tally()
            if bench.plan.shard_of(comm.rank) == 0:
                assert (tally.steps, tally.outcome.samples) == (steps * bench.plan.workers,) * 2
            assert tally.pushes == steps * bench.plan.workers
        bench.together()


@pytest.mark.parallel([2])
def test_computing_goes_on_while_a_push_is_applied_and_a_fetch_is_under_way(comm) -> None:
    """The shard sleeps until the worker has taken its step: with the blocking path it never would."""
    flow = Flow(PARTS, overlap=True)
    with parameter_server(comm, sum(LAYERS), overlap="threads", parts=flow.parts) as bench:
        if bench.client is not None:
            objective = Integers(0)
            path = DataPath(bench.client, flow, Stopwatch()("push"))
            path.fetch()
            for _ in range(2):  # two gradients are on their way, and no shard moves
                batch, gradient = Watch().load(0), path.begin()
                path.accrue(objective.loss_and_gradient(path.parameters, batch, gradient, path.on_gradient), 0.0)
                path.push()
            waiting.complete(comm.Isend(np.ones(1), 0, 7), "the shard to wake up")
            path.settle()
        else:
            waiting.until(lambda: comm.Iprobe(1, 7), "two steps")
            comm.Recv(np.empty(1), 1, 7)
        bench.together()
        if bench.server is not None:
            assert bench.server.version == 2


@pytest.mark.parallel([2])
def test_the_blocking_path_computes_from_all_own_pushes(comm) -> None:
    size = sum(LAYERS)
    with parameter_server(comm, size) as bench:
        if bench.client is not None:
            objective = Integers(0)
            path = DataPath(bench.client, Flow(PARTS), Stopwatch()("push"))
            downpour(objective, path, Watch(5))
            path.fetch()
            np.testing.assert_array_equal(path.parameters, -objective.total)
        bench.together()


@pytest.mark.parallel([3, 5])
@pytest.mark.parametrize("optimizer", [{}, {"n_push": 3, "n_fetch": 2}])
def test_overlapped_runs_learn_every_sample_and_stop_at_rest_for_checkpoints(comm, place, optimizer) -> None:
    run = tiny.describe(
        place,
        server={"overlap": "threads"},
        topology={"shards": 1, "partitions": 1 if comm.size == 3 else 2},
        optimizer={"learning_rate": 0.05, "batch_size": 6, "epochs": 20} | optimizer,
        checkpoint={"every_seconds": 0.05, "resume": "auto"},
    )
    result = train(run, comm)
    assert (result.steps, result.samples) == (140, 20 * tiny.SAMPLES)
    assert result.test is not None
    assert result.test.accuracy is not None
    assert result.test.accuracy > 0.8
