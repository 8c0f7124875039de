"""Sandblaster with replicas that are halted in the middle of a batch: the others finish it, and the sums are exact."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from failure.jobs import Jobs
from harness.environment import timeout_scale
from parallel import tiny

from dbmpi.config import Run
from dbmpi.kernels import updates, vectors
from dbmpi.monitor.records import read_records
from dbmpi.optim.descent import Limits
from dbmpi.optim.localspace import LocalSpace
from dbmpi.optim.methods import gradient_descent

EPOCHS, PORTIONS = 600, 7


def serial(run: Run) -> np.ndarray:
    """Return the parameters after the same run with one replica that nobody halts, in this process."""
    twin = tiny.Twin(run)
    space = LocalSpace(twin.server.size, np.float32, vectors={"parameters": twin.server})
    batches = [twin.batch(portion) for portion in range(PORTIONS)]
    part, weighted = np.empty_like(twin.server), np.empty_like(twin.server)

    def evaluate(point: str, gradient: str) -> float:
        x, target, loss = space.array(point), space.writable(gradient), 0.0
        target[:] = 0
        for batch in batches:
            outcome = twin.network.loss_and_gradient(x, batch, part)
            vectors.combine(weighted, [outcome.samples / tiny.SAMPLES], [part])
            updates.add(target, weighted)
            loss += outcome.loss
        return loss / tiny.SAMPLES

    gradient_descent(space, evaluate, limits=Limits(0, 0, evaluations=EPOCHS))
    return twin.server


@pytest.mark.timeout(180)  # it may be the first to compile these kernels
def test_batches_end_without_a_halted_replica_and_sums_are_exact(jobs: Jobs) -> None:
    program = jobs.start(
        4,
        "optimizer.method=sandblaster",
        f"optimizer.epochs={EPOCHS}",
        "sandblaster.algorithm=gradient_descent",
        "sandblaster.deterministic=true",
        "sandblaster.gtol=0.0",
        "sandblaster.ftol=0.0",
    )

    def passes() -> int:
        path = jobs.run_directory / "records" / "shard-0.jsonl"
        return path.read_text().count('"kind": "batch"') if path.exists() else 0

    halts = 0
    for turn in range(6):
        seen = passes()
        came = program.wait_until(
            lambda seen=seen: passes() > seen + 20 or program.returncode is not None, 40 * timeout_scale()
        )
        assert came, program.stdout + program.stderr
        if program.returncode is not None:
            break
        halted = program.ranks()[1 + turn % 3]
        os.kill(halted, signal.SIGSTOP)
        seen = passes()
        # Others go on, several batches long.
        went_on = program.wait_until(lambda seen=seen: passes() > seen + 5, 20 * timeout_scale())
        os.kill(halted, signal.SIGCONT)
        halts += went_on
    done = jobs.finish(program)
    assert done.returncode == 0, done.transcript
    assert halts >= 3
    with jobs.checkpoint() as checkpoint:
        found = np.empty(checkpoint.layout.size, np.float32)
        checkpoint.read("parameters", 0, found)
        run = Run.from_json(checkpoint.info.configuration)
    data = {"train": jobs.directory / "train.h5", "test": jobs.directory / "test.h5"}
    np.testing.assert_array_equal(found, serial(run.model_copy(update={"data": run.data.model_copy(update=data)})))
    batches = [record for record in read_records(jobs.run_directory) if record["kind"] == "batch"]
    assert {sum(record["portions"].values()) for record in batches} == {PORTIONS}
    assert {len(record["ledger"]) for record in batches} == {PORTIONS}
    assert {len(record["portions"]) for record in batches} <= {1, 2, 3}
