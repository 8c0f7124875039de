"""Whoever waits for slow shards is told so, and nobody else."""

from __future__ import annotations

import time

import numpy as np
import pytest
from parallel import tiny

from dbmpi.monitor.records import read_records
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.rules import Adagrad
from dbmpi.replica.replica import Replica
from dbmpi.runs.training import train


@pytest.mark.parallel([3])
@pytest.mark.parametrize("slow", ["shard", "replicas"])
def test_advice_at_the_end_of_a_run(comm, place, monkeypatch, slow) -> None:
    """Two replicas push at every step: what the shard does in 25 ms, both wait for; and the other way round."""
    owner, name = (Adagrad, "apply") if slow == "shard" else (Replica, "loss_and_gradient")
    method = getattr(owner, name)

    def slowly(self, *arguments, **options):
        time.sleep(0.025)
        return method(self, *arguments, **options)

    monkeypatch.setattr(owner, name, slowly)
    run = tiny.describe(
        place,
        topology={"shards": 1},
        optimizer={"rule": "adagrad", "learning_rate": 0.01, "batch_size": 6, "epochs": 3},
    )
    result = train(run, comm)
    if slow == "replicas":
        assert result.advice == ""
    else:
        assert result.advice.startswith("shards are the bottleneck")
        assert "topology.shards or optimizer.n_push" in result.advice
    shards = [record for record in read_records(run.run.directory) if record["kind"] == "shard"]
    for record in shards:
        spent = record["seconds"]["apply"]
        assert record["bandwidth"] > 0
        assert record["queue"] >= 1
        if slow == "shard":  # nothing but sleep: far from the speed of a copy
            assert record["bandwidth"] < 0.1
            assert spent >= 0.025
    assert shards


@pytest.mark.parametrize(
    ("applying", "waiting_share", "advised"),
    [(0.9, 0.0, True), (0.6, 0.3, True), (0.6, 0.1, False), (0.3, 0.9, False), (0.0, 0.0, False)],
)
def test_a_slow_network_is_not_a_slow_shard(applying, waiting_share, advised) -> None:
    assert bool(bottleneck.advice(applying, waiting_share)) == advised


def test_the_copy_bandwidth_is_that_of_a_copy() -> None:
    source = np.ones(64 << 20, np.uint8)
    target, taken = np.ones_like(source), []
    for _ in range(5):
        began = time.thread_time()
        np.copyto(target, source)
        taken.append(time.thread_time() - began)
    assert 1 / 8 < bottleneck.copy_bandwidth() / (2 * source.nbytes / min(taken)) < 8
