"""Sandblaster with replicas that are halted in the middle of a batch: the others finish it, and the sums are exact."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from failure.jobs import BATCHES_PER_EPOCH as PORTIONS
from failure.jobs import Jobs
from failure.serial import SETTINGS, found_and_expected

KINDS = {
    "in order": ["optimizer.epochs=300", "sandblaster.deterministic=true"],
    "in bundles": ["optimizer.epochs=600", "sandblaster.portions_per_push=3"],
}


@pytest.mark.timeout(180)  # it may be the first to compile these kernels
@pytest.mark.parametrize("kind", KINDS)
def test_batches_end_without_a_halted_replica_and_sums_are_exact(jobs: Jobs, kind: str) -> None:
    program = jobs.start(4, *SETTINGS, *KINDS[kind])
    halts = 0
    for turn in range(3):
        if not jobs.wait_for_passes(program, 20):
            break
        halted = program.ranks()[1 + turn]
        os.kill(halted, signal.SIGSTOP)
        halts += jobs.wait_for_passes(program, 5)  # others go on, several batches long
        os.kill(halted, signal.SIGCONT)
    done = jobs.finish(program)
    assert done.returncode == 0, done.transcript
    assert halts >= 2
    if kind == "in order":
        np.testing.assert_array_equal(*found_and_expected(jobs))
    else:  # some sums depend on timing; with a portion twice, or never, the line search would find no decrease
        assert jobs.passes()[-1]["loss"] < 1e-6
    assert {sum(record["portions"].values()) for record in jobs.passes()} == {PORTIONS}
    assert {len(record["ledger"]) for record in jobs.passes()} == {PORTIONS}
    assert {len(record["portions"]) for record in jobs.passes()} <= {1, 2, 3}
