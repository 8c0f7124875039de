"""Bounds on staleness where replicas die or are halted: they hold, and nobody waits for ever."""

from __future__ import annotations

import os
import signal

import pytest
from failure.jobs import Jobs
from failure.test_dead_downpour import CONFIGURATION, MINE, assert_each_update_counts_once, losses, run
from failure.test_stalls import TIMEOUT, asleep, assert_each_batch_counts_once, start

from dbmpi.monitor.records import read_records

pytestmark = pytest.mark.timeout(180)


def assert_bounded(jobs: Jobs, bound: int) -> int:
    """Check the staleness of every push that a shard has applied; return how many it has dropped."""
    shards = [record for record in read_records(jobs.run_directory) if record["kind"] == "shard"]
    assert max(int(key) for record in shards for key in record["staleness_histogram"]) <= bound
    return sum({record["number"]: record["discarded"] for record in shards}.values())


@pytest.mark.usefixtures("needs_fault_tolerance")
@pytest.mark.parametrize(
    ("kills", "settings"),
    [
        ("1:compute:30,2:post:60", ("topology.shards=1",)),
        ("3:post:41,4:fetch:20", ("topology.shards=2", "server.push=copied", "server.transport=p2p")),
        ("2:compute:15,1:step:60", ("topology.shards=1", "topology.spares=1")),
        ("1:compute:20", ("topology.shards=1", "optimizer.warmstart=40")),
        ("2:post:25", ("topology.shards=2", "optimizer.n_push=2", "optimizer.n_fetch=2")),
        ("3:rest:1,2:step:30", ("topology.shards=1", "checkpoint.every_seconds=0.05")),
    ],
)
def test_replicas_that_wait_go_on_when_another_one_dies(jobs: Jobs, kills: str, settings: tuple[str, ...]) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    shards = int(settings[0][-1])
    done = run(jobs, kills, *settings, "server.max_staleness=1", ranks=3 + shards)
    assert done.returncode == 0, done.transcript
    assert done.stderr.count("sabotage: SIGKILL") == len(losses(jobs)) == 1 + kills.count(","), done.transcript
    assert assert_bounded(jobs, 1) == 0
    assert_each_update_counts_once(jobs, shards)


@pytest.mark.usefixtures("needs_fault_tolerance")
@pytest.mark.parametrize("kills", ["1:compute:30,3:post:60", "2:post:45"])
def test_pushes_that_are_dropped_are_settled_too(jobs: Jobs, kills: str) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    words = ("topology.shards=1", "server.max_staleness=1", "server.on_stale=discard")
    done = run(jobs, kills, *words, ranks=4)
    assert done.returncode == 0, done.transcript
    assert len(losses(jobs)) == 1 + kills.count(","), done.transcript
    assert_each_update_counts_once(jobs, 1, withheld=assert_bounded(jobs, 1))


def test_replicas_wait_for_one_that_is_halted_and_go_on_with_it(jobs: Jobs) -> None:
    words = ("checkpoint.every_seconds=0", "server.max_staleness=2")
    program = start(jobs, "warn", *words, mine=asleep(-1, 0, 0.02))
    jobs.wait_until_all_learn(program, 3)
    pid = program.ranks()[2]
    os.kill(pid, signal.SIGSTOP)
    jobs.wait_for_output(program, "warning: rank 2 (replica 1, after ")
    os.kill(pid, signal.SIGCONT)
    done = jobs.finish(program, 60.0)
    assert done.returncode == 0, done.transcript
    assert not losses(jobs)
    assert assert_bounded(jobs, 2) == 0
    assert_each_batch_counts_once(jobs)


def test_replicas_go_on_without_one_that_is_halted_for_too_long(jobs: Jobs) -> None:
    words = ("server.max_staleness=2",)
    program = start(jobs, "drop", *words, mine=asleep(31, 1.6 * TIMEOUT, 0.02))
    done = jobs.finish(program, 90.0)
    assert done.returncode == 0, done.transcript
    assert len(losses(jobs)) == 1, done.transcript
    assert assert_bounded(jobs, 2) == 0
    assert_each_batch_counts_once(jobs)
