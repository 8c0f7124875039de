"""Rounds of replicas that are killed or halted: the others go on, and what counts is the mean of what came."""

from __future__ import annotations

import pytest
from failure.jobs import Jobs
from failure.test_dead_downpour import BATCHES, CONFIGURATION, MINE, losses, run
from failure.test_stalls import TIMEOUT, asleep, start
from parallel import tiny

from dbmpi.monitor.records import read_records

pytestmark = pytest.mark.timeout(180)


def assert_means(jobs: Jobs) -> int:
    """All is learned, and each update was a mean of ones; return how many pushes were dropped."""
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
        checkpoint.verify()
    assert (info.frontier, info.total, info.holes) == (BATCHES, BATCHES, ())
    assert info.samples == 60 * tiny.SAMPLES
    shards = [record for record in read_records(jobs.run_directory) if record["kind"] == "shard"]
    assert values.min() >= min(info.shard_versions)
    assert values.max() <= max(info.shard_versions)
    assert {int(key) for record in shards for key in record["staleness_histogram"]} == {0}
    return sum({record["number"]: record["discarded"] for record in shards}.values())


@pytest.mark.usefixtures("needs_fault_tolerance")
@pytest.mark.parametrize("exchange", ["synchronous", "backup"])
@pytest.mark.parametrize(
    ("kills", "settings"),
    [
        ("1:compute:30,2:post:20", ("topology.shards=1",)),
        ("3:post:41,4:fetch:20", ("topology.shards=2", "server.push=copied", "server.transport=p2p")),
        ("2:compute:15,1:step:20", ("topology.shards=1", "topology.spares=1")),
        ("3:post:30", ("topology.shards=3", "server.consistent=true")),
        ("3:rest:1,2:step:30", ("topology.shards=1", "checkpoint.every_seconds=0.05")),
    ],
)
def test_a_round_goes_on_without_those_that_die(jobs: Jobs, exchange: str, kills: str, settings) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    shards = int(settings[0][-1])
    done = run(jobs, kills, *settings, f"optimizer.exchange={exchange}", ranks=3 + shards)
    assert done.returncode == 0, done.transcript
    assert done.stderr.count("sabotage: SIGKILL") == len(losses(jobs)) == 1 + kills.count(","), done.transcript
    assert (assert_means(jobs) == 0) or exchange == "backup"


@pytest.mark.parametrize("exchange", ["synchronous", "backup"])
def test_a_round_goes_on_without_one_that_is_halted_for_too_long(jobs: Jobs, exchange: str) -> None:
    words = (f"optimizer.exchange={exchange}",)
    program = start(jobs, "drop", *words, mine=asleep(31, 1.6 * TIMEOUT, 0.02))
    done = jobs.finish(program, 90.0)
    assert done.returncode == 0, done.transcript
    assert len(losses(jobs)) == 1, done.transcript
