"""Ranks that die and are replaced by new processes, in the same job: shards, the lead, and workers."""

from __future__ import annotations

import pytest
from failure.jobs import SECONDS, Jobs, messages
from failure.survival import FAULT_TOLERANCE, killing
from failure.test_dead_downpour import BATCHES, CONFIGURATION, MINE, losses
from harness.environment import timeout_scale
from harness.launching import Completed

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("needs_fault_tolerance")]

REPLACED = "the run goes on with a new process"


def run(jobs: Jobs, kills: str, *settings: str, ranks: int = 4, most: int = 3) -> Completed:
    """Run to the end with a death or some, after which new processes take the places."""
    words = (f"topology.replacements={most}", *settings)
    program = jobs.start(None, *words, launcher=ranks, options=FAULT_TOLERANCE, env=killing(kills))
    return jobs.finish(program, 60.0)


@pytest.mark.parametrize(
    ("kills", "settings"),
    [
        pytest.param("0:apply:90", ("topology.shards=1",), marks=pytest.mark.quick),
        ("2:apply:90", ("topology.shards=2",)),
        ("2:apply:60,0:apply:250", ("topology.shards=2", "server.overlap=threads")),
        ("2:apply:60,0:start:2", ("topology.shards=2",)),
        ("0:commit:2", ("topology.shards=2", "server.transport=p2p", "server.push=copied")),
        ("2:start:1", ("topology.shards=2",)),
        ("0:compute:20", ("topology.shards=1", "topology.colocate=true", "topology.replicas=4")),
        ("0:apply:60,2:apply:60", ("topology.shards=2",)),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_new_process_takes_the_place_of_a_shard_and_each_update_counts_once(
    jobs: Jobs, kills: str, settings: tuple[str, ...]
) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    done = run(jobs, kills, *settings)
    assert done.returncode == 0, done.transcript
    assert done.output.count("sabotage: SIGKILL") == 1 + kills.count(","), done.transcript
    assert REPLACED in done.stderr, done.transcript
    assert "Traceback" not in done.output, done.transcript
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
        checkpoint.verify()
    assert (info.step, info.frontier, info.total, info.holes) == (BATCHES, BATCHES, BATCHES, ())
    assert not losses(jobs)
    assert (values == BATCHES).all()


def test_a_worker_that_has_died_comes_back_at_the_next_checkpoint(jobs: Jobs) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    done = run(jobs, "2:compute:20", "topology.shards=1", "optimizer.epochs=120")
    assert done.returncode == 0, done.transcript
    assert f"replica 1 on rank 2 is missing: {REPLACED}" in done.stderr, done.transcript
    [loss] = losses(jobs)
    assert loss["lost"] == 1
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
    assert (info.step, info.holes) == (2 * BATCHES, ())
    assert 2 * BATCHES <= values.min() <= values.max() <= 2 * BATCHES + loss["repeated"]
    assert "lost replicas" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kills", ["0:line search:6", "2:command:60"])
def test_sandblaster_goes_on_and_finds_the_same(jobs: Jobs, kills: str) -> None:
    words = (
        "optimizer.method=sandblaster",
        "sandblaster.deterministic=true",
        "optimizer.epochs=40",
        "topology.shards=2",
        "checkpoint.every_seconds=0.1",
    )
    done = run(jobs, kills, *words)
    assert done.returncode == 0, done.transcript
    assert "sabotage: SIGKILL" in done.output, done.transcript
    assert REPLACED in done.stderr, done.transcript
    with jobs.checkpoint() as checkpoint:
        disturbed = checkpoint.parameters()
    undisturbed = jobs(4, *words, "run.directory='other'")
    assert undisturbed.returncode == 0, undisturbed.transcript
    with jobs.checkpoint("other") as checkpoint:
        assert (checkpoint.parameters() == disturbed).all()


def test_more_deaths_than_replacements_end_the_run(jobs: Jobs) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    words = ("topology.shards=2", "optimizer.epochs=100000")
    done = run(jobs, "2:apply:90,new 2:apply:90", *words, most=1)
    assert done.returncode == 75, done.transcript
    said = [line for line in messages(done) if not line.startswith("dbmpi launch:") and REPLACED not in line]
    assert len(said) == 1, done.transcript
    assert "rank 2" in said[0]
    assert "which holds shard" in said[0]
    assert done.seconds < 3 * SECONDS * timeout_scale()


@pytest.mark.parametrize(
    ("kills", "code"),
    [
        ("2:apply:60,1:renew:1", 0),
        ("2:apply:60,0:spawn:1", 75),
        ("2:apply:60,1:spawn:1", 75),
        ("2:apply:60,new 2:join:1", 75),
        ("2:apply:60,1:begin:2", 75),
        ("2:apply:60,0:renew:1,3:renew:1", 0),
    ],
)
def test_a_death_while_another_rank_is_replaced(jobs: Jobs, kills: str, code: int) -> None:
    """Until new processes are started it is one more that is replaced; after that the job ends, and resumes."""
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    words = ("topology.shards=2", "topology.replacements=3")
    stall = {"DBMPI_STALL_SECONDS": f"{5 * timeout_scale():g}"}
    program = jobs.start(None, *words, launcher=4, options=FAULT_TOLERANCE, env=killing(kills) | stall)
    done = jobs.finish(program, 60.0)
    assert done.returncode == code, done.transcript
    assert done.output.count("sabotage: SIGKILL") == 1 + kills.count(","), done.transcript
    assert "Traceback" not in done.output, done.transcript
    if code:
        assert "dbmpi launch: a rank has died or does not answer" in done.stderr, done.transcript
        assert "stalled" not in done.output, done.transcript
        done = jobs(4, "topology.shards=2", "checkpoint.resume=auto")
        assert done.returncode == 0, done.transcript
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
    assert (info.step, info.frontier, info.total, info.holes) == (BATCHES, BATCHES, BATCHES, ())
    repeated = sum(loss["repeated"] for loss in losses(jobs))
    assert BATCHES <= values.min() <= values.max() <= BATCHES + repeated
