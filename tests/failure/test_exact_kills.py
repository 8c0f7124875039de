"""Ranks of Sandblaster that are killed at an exact moment: what is survived has the same bits as without a death."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from failure.jobs import BATCHES_PER_EPOCH as PORTIONS
from failure.jobs import FOR_EVER, SECONDS, Jobs, messages
from failure.serial import SETTINGS, found_and_expected
from failure.survival import FAULT_TOLERANCE, killing
from harness.environment import timeout_scale
from harness.launching import Completed, Launch

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("needs_fault_tolerance")]
EPOCHS = 100
PARTITIONS = (
    *SETTINGS,
    "sandblaster.deterministic=true",
    "topology.shards=1",
    "topology.replicas=2",
    "topology.partitions=2",
    f"optimizer.epochs={EPOCHS}",
)


def run(jobs: Jobs, kills: str, *settings: str, ranks: int = 4, hold: Path | None = None) -> Completed:
    """Run to the end with a death or some; return when the job has ended."""
    words = (*SETTINGS, "sandblaster.deterministic=true", *settings)
    program = jobs.start(None, *words, launcher=ranks, options=FAULT_TOLERANCE, env=killing(kills, hold))
    return jobs.finish(program, 60.0)


@pytest.mark.parametrize(
    "kills",
    [
        "2:deliver:30,3:compute:60",
        "2:keep:40",
        "2:fetch:20",
        "2:portion:1",
        "2:compute:50,3:compute:51",
        "3:deliver:1",
        "1:evaluate:1",
        "2:end:1",
        "1:portion:20,2:deliver:31",
        "1:fetch:30,3:fetch:30",
    ],
)
def test_a_death_of_a_worker_changes_no_bit(jobs: Jobs, kills: str) -> None:
    words = (f"optimizer.epochs={EPOCHS}", "checkpoint.every_seconds=0.05")
    done = run(jobs, kills, *words, hold=jobs.directory)
    assert done.returncode == 0, done.transcript
    assert done.stderr.count("sabotage: SIGKILL") == 1 + kills.count(","), done.transcript
    np.testing.assert_array_equal(*found_and_expected(jobs))
    passes = jobs.passes()
    assert len(passes) == EPOCHS
    assert {len(record["ledger"]) for record in passes} == {PORTIONS}


@pytest.mark.parametrize(
    ("kills", "settings", "shard"),
    [
        ("0:line search:20", (), 0),
        ("0:commit:2", ("topology.shards=2",), 0),
        ("2:write:3", ("topology.shards=2",), 1),
        ("2:checkpoint:2", ("topology.shards=2",), 1),
        ("2:commit:1", ("topology.shards=2",), 1),
        ("0:commit:2", (), 0),
        ("2:apply:20", ("topology.shards=2",), 1),
        ("2:meet:20", ("topology.shards=2",), 1),
        ("0:write:5", (), 0),
        ("3:portion:20,0:recovery:1", (), 0),
        ("0:apply:3", (), 0),
        ("0:meet:20", (), 0),
        ("0:checkpoint:2", ("topology.shards=2",), 0),
        ("2:command:60", ("topology.shards=2",), 1),
        ("1:portion:20,2:meet:21", ("topology.shards=2",), 1),
        ("0:portion:15", ("topology.colocate=true", "topology.replicas=4"), 0),
        ("2:deliver:15", ("topology.colocate=true", "topology.replicas=4", "topology.shards=2"), 1),
    ],
)
def test_a_death_of_a_shard_ends_the_job_soon_and_it_resumes(
    jobs: Jobs, kills: str, settings: tuple[str, ...], shard: int
) -> None:
    done = run(jobs, kills, f"optimizer.epochs={FOR_EVER}", "checkpoint.every_seconds=0.05", *settings)
    assert done.returncode == 75, done.transcript
    assert done.seconds < 2 * SECONDS * timeout_scale(), done.transcript
    said = [line for line in messages(done) if not line.startswith("dbmpi launch:")]
    assert len(said) == 1, done.transcript
    assert f", which holds shard {shard}, has died" in said[0], done.transcript
    steps = 0
    if (jobs.run_directory / "checkpoints" / "latest").exists():
        with jobs.checkpoint() as checkpoint:
            assert np.isfinite(checkpoint.parameters()).all()
            steps = checkpoint.info.step
    again = jobs(None, *SETTINGS, "sandblaster.deterministic=true", f"optimizer.epochs={steps // PORTIONS + 20}")
    assert again.returncode == 0, again.transcript
    np.testing.assert_array_equal(*found_and_expected(jobs, resumed=int(steps > 0)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The parameters of a run of two partitions that nothing happens to."""
    with Launch(tmp_path_factory.mktemp("launch")) as launch:
        jobs = Jobs(tmp_path_factory.mktemp("undisturbed"), launch)
        done = jobs(5, *PARTITIONS)
    assert done.returncode == 0, done.transcript
    with jobs.checkpoint() as checkpoint:
        return checkpoint.parameters()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        "4:exchange:31",
        "4:compute:15,3:recovery:1",
        "3:compute:20",
        "3:keep:12",
        "3:deliver:9",
        "4:deliver:10",
        "1:fetch:8,2:recovery:1",
        "3:end:1",
    ],
)
def test_a_death_of_a_partition_changes_no_bit(jobs: Jobs, undisturbed: np.ndarray, kills: str) -> None:
    """Its replica is lost with it; nor does it matter if another partition dies while it leaves."""
    done = run(jobs, kills, *PARTITIONS, ranks=5)
    assert done.returncode == 0, done.transcript
    assert done.stderr.count("sabotage: SIGKILL") == 1 + kills.count(","), done.transcript
    assert {len(record["ledger"]) for record in jobs.passes()} == {PORTIONS}
    with jobs.checkpoint() as checkpoint:
        np.testing.assert_array_equal(checkpoint.parameters(), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("kills", ["0:end:1", "2:end:1"])
def test_a_death_of_a_shard_when_everything_is_learned(jobs: Jobs, kills: str) -> None:
    done = run(jobs, kills, f"optimizer.epochs={EPOCHS}", "topology.shards=2")
    assert done.returncode in (0, 75), done.transcript
    assert done.seconds < 2 * SECONDS * timeout_scale(), done.transcript
    assert done.stderr.count("sabotage: SIGKILL") == 1, done.transcript
    np.testing.assert_array_equal(*found_and_expected(jobs))


def test_a_death_before_the_first_batch_ends_the_job(jobs: Jobs) -> None:
    done = run(jobs, "2:start:1", "optimizer.epochs=20")
    assert done.returncode == 75, done.transcript
    said = [line for line in messages(done) if not line.startswith("dbmpi launch:")]
    assert len(said) == 1, done.transcript
    assert "rank 2 on" in said[0], done.transcript
