"""Sandblaster with ranks that are killed, under an MPI that lets the others live."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from failure.jobs import BATCHES_PER_EPOCH as PORTIONS
from failure.jobs import FOR_EVER, SECONDS, Jobs, messages
from failure.serial import SETTINGS, found_and_expected
from failure.survival import FAULT_TOLERANCE

pytestmark = [  # it may be the first to compile these kernels
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("needs_fault_tolerance"),
]


def test_all_bits_are_the_same_where_two_of_three_replicas_die(jobs: Jobs) -> None:
    settings = (*SETTINGS, "optimizer.epochs=800", "sandblaster.deterministic=true")
    program = jobs.start(None, *settings, launcher=4, options=FAULT_TOLERANCE)
    replicas = [1, 2, 3]
    for replica, rank in ((1, 2), (2, 3)):
        jobs.wait_for_passes(program, 20)
        ranks = program.ranks()
        os.kill(ranks[rank], signal.SIGKILL)
        # A death is known some time later.  Until then the others stand still: they could come to the end of the run.
        replicas.remove(rank)
        program.send([ranks[other] for other in replicas], signal.SIGSTOP)
        jobs.wait_for_output(program, f"rank {rank} on ", f"and with it replica {replica}:")
        program.send([ranks[other] for other in replicas], signal.SIGCONT)
    done = jobs.finish(program)
    assert done.returncode == 0, done.transcript
    np.testing.assert_array_equal(*found_and_expected(jobs))
    passes = jobs.passes()
    assert len(passes) == 800
    for record in passes:
        assert len(record["ledger"]) == sum(record["portions"].values()) == PORTIONS
    assert next(record["lost"] for record in passes if record["lost"]) == [1]
    assert passes[-1]["lost"] == [1, 2]
    assert set(passes[-1]["ledger"]) == {0}


@pytest.mark.slow
def test_a_replica_of_two_partitions_is_lost_with_one_of_them_and_the_run_with_a_shard(jobs: Jobs) -> None:
    settings = (*SETTINGS, f"optimizer.epochs={FOR_EVER}", "sandblaster.portions_per_push=2")
    topology = ("topology.shards=1", "topology.replicas=2", "topology.partitions=2")
    program = jobs.start(None, *settings, *topology, launcher=5, options=FAULT_TOLERANCE)
    jobs.wait_for_passes(program, 10)
    os.kill(program.ranks()[3], signal.SIGKILL)  # the partition that speaks for its replica
    jobs.wait_for_output(program, "rank 3 on ", "and with it replica 1:")
    jobs.wait_for_passes(program, 20)
    assert sorted(program.ranks()) == [0, 1, 2, 4]
    passes = jobs.passes()
    assert {len(record["ledger"]) for record in passes} == {PORTIONS}
    assert passes[-1]["lost"] == [1]
    assert set(passes[-1]["ledger"]) == {0}
    os.kill(program.ranks()[0], signal.SIGKILL)
    done = jobs.finish(program, SECONDS)
    assert done.returncode == 75, done.transcript
    said = [line for line in messages(done) if not line.startswith("dbmpi launch:")]
    assert len(said) == 1, done.transcript
    assert "rank 0 on" in said[0]
    assert "which holds shard 0, has died" in said[0]
    assert "--set checkpoint.resume=auto" in said[0]


@pytest.mark.parametrize("shards", [1, 2])
def test_after_the_last_replica_a_checkpoint_is_written_and_the_run_resumes(jobs: Jobs, shards: int) -> None:
    settings = (*SETTINGS, f"optimizer.epochs={FOR_EVER}", f"topology.shards={shards}", "checkpoint.every_seconds=600")
    program = jobs.start(None, *settings, launcher=shards + 1)
    jobs.wait_for_passes(program, 10)
    [worker] = {*range(shards + 1)} - {shard * (shards + 1) // shards for shard in range(shards)}
    os.kill(program.ranks()[worker], signal.SIGKILL)
    done = jobs.finish(program, SECONDS)
    assert done.returncode == 75, done.transcript
    said = [line for line in messages(done) if not line.startswith("dbmpi launch:")]
    assert len(said) == 1, done.transcript
    assert f"rank {worker} on " in said[0]
    assert "has died, and with it the last replica" in said[0]
    with jobs.checkpoint() as checkpoint:
        step = checkpoint.info.step
    assert step >= 10
    again = jobs(None, *SETTINGS, f"optimizer.epochs={step // PORTIONS + 10}", "checkpoint.resume='auto'")
    assert again.returncode == 0, again.transcript
    assert f"going on after {step:,} steps" in again.stdout
