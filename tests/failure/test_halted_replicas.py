"""Replicas that are halted: the others finish batches and checkpoints, and sums and counts are exact."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from failure.jobs import BATCHES_PER_EPOCH as PORTIONS
from failure.jobs import FOR_EVER, Jobs
from failure.serial import SETTINGS, found_and_expected
from harness.programs import Program

from dbmpi.monitor.records import read_records

KINDS = {"in order": "sandblaster.deterministic=true", "in bundles": "sandblaster.portions_per_push=3"}


@pytest.mark.slow
@pytest.mark.timeout(180)  # it may be the first to compile these kernels
@pytest.mark.parametrize("kind", KINDS)
def test_batches_end_without_a_halted_replica_and_sums_are_exact(jobs: Jobs, kind: str) -> None:
    program = jobs.start(4, *SETTINGS, KINDS[kind], f"optimizer.epochs={FOR_EVER}")
    jobs.wait_for_passes(program, 5)
    ranks = program.ranks()
    for halted in (1, 2, 3):
        os.kill(ranks[halted], signal.SIGSTOP)
        jobs.wait_for_passes(program, 5)  # others go on, several batches long
        os.kill(ranks[halted], signal.SIGCONT)
        jobs.wait_for_passes(program, 20)
    os.kill(ranks[0], signal.SIGTERM)
    done = jobs.finish(program)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    found, expected = found_and_expected(jobs)
    if kind == "in order":
        np.testing.assert_array_equal(found, expected)
    else:  # the order of some sums depends on timing
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert {sum(record["portions"].values()) for record in jobs.passes()} == {PORTIONS}
    assert {len(record["ledger"]) for record in jobs.passes()} == {PORTIONS}
    assert {len(record["portions"]) for record in jobs.passes()} <= {1, 2, 3}


@pytest.mark.timeout(180)
def test_checkpoints_of_downpour_do_without_a_halted_replica(jobs: Jobs) -> None:
    settings = ("topology.shards=1", "checkpoint.every_seconds=0.1", f"optimizer.epochs={FOR_EVER}")
    program = jobs.start(4, *settings)
    jobs.wait_until_all_learn(program, 3)
    ranks = program.ranks()
    for halted in (2, 1):  # the first replica is on rank 1
        wait_for_checkpoints(jobs, program, 2)
        os.kill(ranks[halted], signal.SIGSTOP)
        wait_for_checkpoints(jobs, program, 4)
        with jobs.checkpoint() as checkpoint:
            checkpoint.verify()
        jobs.assert_whole()
        os.kill(ranks[halted], signal.SIGCONT)
        jobs.wait_for_reports(program, halted - 1)
    wait_for_checkpoints(jobs, program, 2)
    os.kill(ranks[0], signal.SIGTERM)
    done = jobs.finish(program)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    jobs.assert_whole()


def wait_for_checkpoints(jobs: Jobs, program: Program, count: int) -> None:
    """Wait for so many further checkpoints."""

    def written() -> int:
        return sum(record["kind"] == "checkpoint" for record in read_records(jobs.run_directory))

    wanted = written() + count
    jobs.wait_for(program, lambda: written() >= wanted)
