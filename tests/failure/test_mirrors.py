"""Shards that are killed, whose mirrors on other shards are written in their places: little is lost, and counted."""

from __future__ import annotations

import pytest
from failure.jobs import Jobs
from failure.survival import FAULT_TOLERANCE, killing
from failure.test_dead_downpour import BATCHES, CONFIGURATION, MINE, ROUNDED, SIZE
from harness.launching import Completed

from dbmpi.index.layout import cut
from dbmpi.monitor.records import Record, read_records

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("needs_fault_tolerance")]

EVERY = 12
"""Updates that a mirror may lack."""
UNDER_WAY = 6
"""Further ones that the other shards may apply after the death: one of each replica."""


def run(jobs: Jobs, kills: str, *settings: str, ranks: int) -> Completed:
    """Run to the end, with a death or some, and without a checkpoint on the way."""
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    words = ("checkpoint.every_seconds=1000", f"server.mirror={EVERY}", *settings)
    env = killing(kills, apart=ROUNDED in settings)
    program = jobs.start(None, *words, launcher=ranks, options=FAULT_TOLERANCE, env=env)
    return jobs.finish(program, 60.0)


def rescues(jobs: Jobs) -> list[Record]:
    """Return the records of shards whose mirrors were written."""
    return [record for record in read_records(jobs.run_directory) if record["kind"] == "rescue"]


def assert_little_is_lost(jobs: Jobs, shards: int, dead: set[int]) -> None:
    """Each batch is learned; shards have lost what the records say and no more."""
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
        checkpoint.verify()
    assert (info.step, info.frontier, info.total, info.holes) == (BATCHES, BATCHES, BATCHES, ())
    found = rescues(jobs)
    assert {record["shard"] for record in found} == dead
    repeated = sum(record["repeated"] for record in found)
    for shard, held in enumerate(cut(SIZE, shards)):
        lost = [record["updates"] for record in found if record["shard"] == shard]
        assert all(0 <= updates <= EVERY + UNDER_WAY for updates in lost)
        part = values[held.start : held.stop]
        assert BATCHES - sum(lost) <= part.min() <= part.max() <= BATCHES - sum(lost) + repeated


@pytest.mark.parametrize(
    ("kills", "shards", "ranks", "settings"),
    [
        pytest.param("2:apply:90", 2, 4, (), marks=pytest.mark.quick),
        ("2:apply:93", 3, 6, ("server.overlap=threads",)),
        ("2:apply:60", 3, 6, ("server.transport=p2p", "server.push=copied")),
        ("2:apply:70", 2, 5, ("server.consistent=true",)),
        ("2:apply:60", 3, 6, (ROUNDED, "server.mirror=3")),
        ("3:compute:30", 2, 6, ("topology.colocate=true", "topology.replicas=6")),
        ("2:apply:60,4:apply:200", 3, 6, ("server.mirror=1",)),
        ("2:apply:90", 2, 4, ("checkpoint.layout='single'", "server.fetch=shared")),
        ("1:apply:90,4:apply:90", 4, 6, ()),
    ],
)
def test_the_run_goes_on_with_the_mirror_of_a_shard(
    jobs: Jobs, kills: str, shards: int, ranks: int, settings: tuple[str, ...]
) -> None:
    done = run(jobs, kills, f"topology.shards={shards}", "topology.replacements=3", *settings, ranks=ranks)
    assert done.returncode == 0, done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert done.output.count("sabotage: SIGKILL") == 1 + kills.count(","), done.transcript
    assert "is written with its mirror" in done.stdout, done.transcript
    assert_little_is_lost(jobs, shards, {record["shard"] for record in rescues(jobs)})
    assert len(rescues(jobs)) == 1 + kills.count(",")


@pytest.mark.slow
def test_without_a_new_process_the_run_ends_and_resumes_from_there(jobs: Jobs) -> None:
    done = run(jobs, "2:apply:90", "topology.shards=2", ranks=4)
    assert done.returncode == 75, done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert "rank 2 on" in done.stderr, done.transcript
    assert done.stderr.count("cannot go on without it") == 1, done.transcript
    words = ("checkpoint.resume=auto", f"server.mirror={EVERY}", "topology.shards=3")
    again = jobs.finish(jobs.start(None, *words, launcher=6, options=FAULT_TOLERANCE), 60.0)
    assert again.returncode == 0, again.transcript
    assert_little_is_lost(jobs, 2, {1})


@pytest.mark.slow
def test_a_worker_that_has_died_is_replaced_where_there_are_mirrors(jobs: Jobs) -> None:
    words = ("checkpoint.every_seconds=0.1", "topology.shards=2", "topology.replacements=3", "optimizer.epochs=120")
    done = run(jobs, "1:compute:40", *words, ranks=4)
    assert done.returncode == 0, done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert "the run goes on with a new process" in done.stderr, done.transcript
    assert not rescues(jobs)


@pytest.mark.parametrize(
    ("kills", "shards", "says"),
    [
        ("0:apply:120", 2, ""),
        ("2:apply:120,4:apply:120", 3, "which held its mirror"),
        ("2:apply:120,4:apply:120", 4, "which held its mirror"),
    ],
)
def test_where_there_is_no_mirror_the_run_goes_back_to_its_last_checkpoint(
    jobs: Jobs, kills: str, shards: int, says: str
) -> None:
    words = ("checkpoint.every_seconds=0.1", f"topology.shards={shards}", "topology.replacements=3")
    done = run(jobs, kills, *words, ranks=2 * shards)
    assert done.returncode == 0, done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert says in done.output, done.transcript
    assert_little_is_lost(jobs, shards, set())
