"""Ranks that make no progress: named, with their stack trace if they can; waited for, done without, or the end.

The gradient of an objective is -1 everywhere and the rate is 1, so that every parameter is the number of pushes that
its shard has applied.
"""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from failure.jobs import FOR_EVER, SECONDS, Jobs, messages
from failure.test_dead_downpour import BATCHES, CONFIGURATION, MINE, losses
from harness.environment import timeout_scale
from harness.launching import Completed
from harness.programs import Program
from parallel import tiny

from dbmpi.monitor.records import read_records

pytestmark = pytest.mark.timeout(180)
TIMEOUT = 1.0 * timeout_scale()
SLEEPY = """
    def loss_and_gradient(self, parameters, batch):
        import pathlib, time
        if batch.step == {step} and not pathlib.Path("slept").exists():  # others may get this batch, too
            pathlib.Path("slept").touch()
            time.sleep({seconds})
        if batch.step > {step}:
            time.sleep({pause})
        return 1.0, {{name: -np.ones_like(values) for name, values in parameters.items()}}
"""


def start(jobs: Jobs, on_stall: str, *settings: str, mine: str = "") -> Program:
    """Start a run of three replicas and a shard."""
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE + mine)
    words = (f"monitor.stall_timeout={TIMEOUT:g}", f"monitor.on_stall={on_stall}", "topology.shards=1")
    return jobs.start(4, *words, *settings)


def asleep(step: int, seconds: float, pause: float = 0.0) -> str:
    """Return a method of the objective that sleeps in one step, and for a moment in each later one."""
    return SLEEPY.format(step=step, seconds=seconds, pause=pause)


def assert_each_batch_counts_once(jobs: Jobs) -> None:
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
    assert (info.step, info.frontier, info.total, info.holes) == (BATCHES, BATCHES, BATCHES, ())
    assert info.samples == 60 * tiny.SAMPLES
    repeated = sum(record["repeated"] for record in losses(jobs))
    assert BATCHES <= values.min() <= values.max() <= BATCHES + repeated


def stack_traces(done: Completed, rank: int) -> int:
    """Return how often a rank has said where it makes no progress."""
    return sum(f"rank {rank} (partition 0 of replica" in line and "it is here" in line for line in messages(done))


def test_a_worker_that_sleeps_is_named_with_its_stack_trace_and_goes_on(jobs: Jobs) -> None:
    done = jobs.finish(start(jobs, "warn", mine=asleep(31, 3 * TIMEOUT)), 60.0)
    assert done.returncode == 0, done.transcript
    assert done.output.count("warning: rank 2 (replica 1, after 10 steps) has been silent") == 1, done.transcript
    assert len(re.findall(r"rank 2 \(replica 1, after 1\d steps\) is back after ", done.output)) == 1, done.transcript
    assert [stack_traces(done, rank) for rank in range(1, 4)] == [0, 1, 0], done.transcript
    assert "in step 11 (compute); it is here:" in done.output, done.transcript
    assert "in loss_and_gradient" in done.output, done.transcript
    assert not losses(jobs)
    assert_each_batch_counts_once(jobs)


def test_a_worker_that_is_stopped_rejoins_without_harm(jobs: Jobs) -> None:
    """It cannot write where it is; its gradient counts once, with the staleness that it has."""
    program = start(jobs, "warn", "checkpoint.every_seconds=0", mine=asleep(-1, 0, 0.02))
    jobs.wait_until_all_learn(program, 3)
    pid = program.ranks()[2]
    os.kill(pid, signal.SIGSTOP)
    jobs.wait_for_output(program, "warning: rank 2 (replica 1, after ")
    os.kill(pid, signal.SIGCONT)
    done = jobs.finish(program, 60.0)
    assert done.returncode == 0, done.transcript
    assert done.output.count("rank 2 (replica 1, after ") == 2, done.transcript
    assert " is back after " in done.output, done.transcript
    assert [stack_traces(done, rank) for rank in range(1, 4)] == [0, 0, 0], done.transcript
    assert not losses(jobs)
    assert_each_batch_counts_once(jobs)
    shard = [record for record in read_records(jobs.run_directory) if record["kind"] == "shard"]
    staleness = [int(value) for record in shard for value in record["staleness_histogram"]]
    assert shard[-1]["pushes"] == BATCHES
    assert max(staleness) >= 20, "the others have pushed meanwhile"


def test_the_run_goes_on_without_a_worker_that_sleeps_and_it_leaves_when_it_awakes(jobs: Jobs) -> None:
    done = jobs.finish(start(jobs, "drop", mine=asleep(31, 1.6 * TIMEOUT, 0.02)), 60.0)
    assert done.returncode == 0, done.transcript
    assert "rank 2 (replica 1, after 10 steps) has been silent" in done.output, done.transcript
    assert "and with it replica 1: the run goes on with 2 of 3 replicas" in done.output, done.transcript
    [loss] = losses(jobs)
    assert (loss["lost"], loss["pushes"], loss["dropped"], loss["repeated"]) == (1, 10, 0, 0)
    assert loss["takers"] == [0, 2]
    assert_each_batch_counts_once(jobs)
    with jobs.checkpoint() as checkpoint:
        assert checkpoint.info.done[1] == 10


def test_a_worker_that_stays_stopped_is_done_without_and_ends_with_the_job(jobs: Jobs) -> None:
    program = start(jobs, "drop", mine=asleep(-1, 0, 0.01))
    jobs.wait_until_all_learn(program, 3)
    pid = program.ranks()[3]
    os.kill(pid, signal.SIGSTOP)
    done = jobs.finish(program, 60.0)
    assert done.returncode == 75, done.transcript
    assert any("everything is learned" in line and "rank 3 (replica 2" in line for line in messages(done))
    [loss] = losses(jobs)
    assert (loss["lost"], loss["takers"]) == (2, [0, 1])
    assert_each_batch_counts_once(jobs)


def test_a_worker_that_is_stopped_ends_the_run(jobs: Jobs) -> None:
    program = start(jobs, "end", f"optimizer.epochs={FOR_EVER}")
    jobs.wait_until_all_learn(program, 3)
    os.kill(program.ranks()[1], signal.SIGSTOP)
    begun = time.monotonic()
    done = jobs.finish(program, 60.0)
    assert time.monotonic() - begun < SECONDS * timeout_scale() + 2 * TIMEOUT
    assert done.returncode == 75, done.transcript
    stalled = [line for line in messages(done) if "stalled: rank 1 (replica 0, after " in line]
    assert len(stalled) == 1, done.transcript


def test_a_replica_of_two_partitions_is_done_without_if_one_of_them_is_stopped(jobs: Jobs) -> None:
    """Its other partition leaves at once, and that one when it awakes."""
    words = ("topology.shards=1", "topology.replicas=2", "topology.partitions=2", f"optimizer.epochs={FOR_EVER}")
    stall = (f"monitor.stall_timeout={TIMEOUT:g}", "monitor.on_stall=drop")
    program = jobs.start(5, *words, *stall)
    jobs.wait_until_all_learn(program, 4)
    ranks = program.ranks()
    os.kill(ranks[4], signal.SIGSTOP)
    jobs.wait_for_output(program, "rank 4 (partition 1 of replica 1", "the run goes on with 1 of 2 replicas")
    jobs.wait_for_reports(program, 0, count=3)
    os.kill(ranks[4], signal.SIGCONT)
    jobs.wait_for_output(program, " is back after ")
    os.kill(ranks[0], signal.SIGTERM)
    done = jobs.finish(program, 60.0)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    [loss] = losses(jobs)
    assert (loss["lost"], loss["takers"]) == (1, [0])
    jobs.assert_whole()
