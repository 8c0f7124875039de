"""Downpour learns any objective: here least squares, written in NumPy, with a worker's real duties and real shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parallel import tiny
from parallel.test_paramserver import WAYS, Served

from dbmpi.config import ServerSection
from dbmpi.data.numbered_batches import NumberedBatches
from dbmpi.data.source import Source
from dbmpi.data.stream import Order, Stream
from dbmpi.downpour.algorithm import downpour
from dbmpi.downpour.assignment import Assignment
from dbmpi.downpour.datapath import DataPath, Flow
from dbmpi.downpour.orders import Orders
from dbmpi.downpour.worker import Worker
from dbmpi.index.layout import cut
from dbmpi.machine.signals import StopSignal
from dbmpi.monitor.records import Recorder, read_records
from dbmpi.monitor.worker_log import WorkerLog
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.mpi.topology import Communicators, Plan
from dbmpi.objective import Batch, Gradient, Objective, Outcome
from dbmpi.paramserver.rules import Sgd
from dbmpi.paramserver.store import Store

FLOAT = np.dtype(np.float32)
SAMPLES, FEATURES, EPOCHS = 60, 9, 40


class LeastSquares:
    """``f(w) = mean over the samples of (w x - t)^2 / 2``; it knows nothing of layers, ranks or dbmpi's kernels."""

    size = FEATURES

    def loss_and_gradient(
        self, parameters: np.ndarray, batch: Batch, gradient: Gradient, on_gradient=None, *, step=0, add=False, **_
    ) -> Outcome:
        out = gradient(0) if callable(gradient) else gradient
        residuals = parameters @ batch.inputs - batch.targets[0]
        out[:] = batch.inputs @ residuals / batch.samples + (out if add else 0)
        if on_gradient is not None:
            on_gradient(0)
        return self._outcome(residuals)

    def evaluate(self, parameters: np.ndarray, batch: Batch, **_) -> Outcome:
        return self._outcome(parameters @ batch.inputs - batch.targets[0])

    def _outcome(self, residuals: np.ndarray) -> Outcome:
        return Outcome(residuals.size, 0.5 * float(residuals @ residuals), -1)


def lead(bench: Served, plan: Plan) -> None:
    """Serve the shard until all replicas have learned their batches, and then end the run, as the lead does."""
    mailbox, finished = Mailbox(bench.comm, Role.SHARD), set()

    def heard() -> bool:
        while (message := mailbox.receive()) is not None:
            assert message.kind == MessageKind.FINISHED
            finished.add(message.source)
        return finished == set(plan.worker_ranks)

    waiting.until(heard, "all replicas to finish", serve=bench.serve)
    for rank in plan.worker_ranks:
        mailbox.send(rank, Role.WORKER, MessageKind.END)


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize(
    ("server", "n_push"),
    [
        ({}, 1),
        ({}, 3),
        ({"overlap": "threads"}, 2),
        ({"gradients": "layers", "overlap": "threads"}, 1),
        (WAYS["p2p"], 1),
    ],
    ids=["blocking", "accrued", "overlapped", "by layers", "messages"],
)
def test_downpour_learns_a_hand_written_objective(comm, place, server, n_push) -> None:
    rng = np.random.default_rng(3)
    inputs, wanted = rng.normal(size=(SAMPLES, FEATURES)), rng.normal(size=FEATURES)
    if comm.rank == 0:
        tiny.write_file(place / "plane.h5", inputs, (inputs @ wanted).astype(np.float32)[:, None], classes=None)
    waiting.barrier(comm, "the samples")
    plan = Plan(comm.size // 2, comm.size - comm.size // 2)
    section, shared = ServerSection(**server), "transport" not in server
    flow = Flow((range(FEATURES),), section.overlap == "threads", section.gradients == "whole")
    ranges, order = cut(FEATURES, plan.shards), Order(SAMPLES, 6, EPOCHS, 1)
    with (
        Communicators(comm, plan) as comms,
        Store(comms.world, plan, ranges, section, FLOAT, flow.buffer_size, shared=shared) as store,
    ):
        shard, replica = plan.shard_of(comm.rank), plan.worker_of(comm.rank)
        served = None if shard is None else store.server(Sgd(0.05))
        if served is not None:
            served.begin(None)
        bench = Served(store, served, comms.world)
        bench.together()
        if shard == 0:
            lead(bench, plan)
        if replica is not None:
            objective: Objective = LeastSquares()
            orders = Orders(comms.world, 0, StopSignal())
            client, mine = (
                store.client(parts=flow.parts, serve=orders.obey),
                range(replica, order.batches, plan.replicas),
            )
            with (
                Source.open(place / "plane.h5", 10) as train,
                Recorder(place / "run", "worker", replica, session=1) as recorder,
            ):
                assignment = Assignment(
                    replica=replica,
                    train=NumberedBatches(train, order),
                    stream=Stream(order.batches),
                    share=[mine],
                    test=train,
                    directory=place,
                )
                log = WorkerLog(recorder, 0.001, replica=replica, partition=0, partitions=1, traced=0.25)
                worker = Worker(assignment, objective, client, orders, log, comms.replica)
                path = DataPath(client, flow, worker.stopwatch("push"))
                assert downpour(objective, path, worker, n_push=n_push, n_fetch=n_push) == len(mine)
                assert not worker.finish()
                assert worker.learned == len(mine)
                outcome = worker.evaluate(train, 0, 1)
            assert (outcome.samples, outcome.accuracy) == (SAMPLES, None)
            assert outcome.mean_loss < 1e-4
            found = np.empty(FEATURES, np.float32)
            client.fetch(found)
            np.testing.assert_allclose(found, wanted, atol=0.01)
        bench.together()
        if shard == 0:
            tally = bench.server.take_tally()
            assert (tally.steps, tally.outcome.samples) == (order.batches, EPOCHS * SAMPLES)
            assert sum(record["samples"] for record in last_reports(place / "run")) == EPOCHS * SAMPLES
        bench.together()


def last_reports(directory: Path) -> list[dict[str, Any]]:
    """Return the last record of each worker."""
    records = [record for record in read_records(directory) if record["kind"] == "worker"]
    return list({record["replica"]: record for record in records}.values())
