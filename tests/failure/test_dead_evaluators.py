"""Evaluators that die, and replicas that die beside one: the death of an evaluator costs evaluations, not the run."""

from __future__ import annotations

import pytest
from failure.jobs import BATCHES_PER_EPOCH, Jobs
from failure.survival import FAULT_TOLERANCE, killing
from harness.launching import Completed

from dbmpi.monitor.records import Record, read_records

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("needs_fault_tolerance")]

EPOCHS = 60
USUAL = (
    "topology.shards=1",
    "topology.evaluators=1",
    f"optimizer.epochs={EPOCHS}",
    "monitor.evaluate_epochs=1",
    "checkpoint.every_seconds=0.1",
)


def run(jobs: Jobs, kills: str, *settings: str, ranks: int = 4) -> Completed:
    """Run to the end with a death or some."""
    program = jobs.start(None, *USUAL, *settings, launcher=ranks, options=FAULT_TOLERANCE, env=killing(kills))
    return jobs.finish(program, 60.0)


def records(jobs: Jobs, kind: str) -> list[Record]:
    return [record for record in read_records(jobs.run_directory) if record["kind"] == kind]


def assert_all_is_learned(jobs: Jobs) -> None:
    jobs.assert_whole()
    with jobs.checkpoint() as checkpoint:
        info = checkpoint.info
    assert (info.step, info.total, info.holes) == (EPOCHS * BATCHES_PER_EPOCH, info.step, ())
    assert info.test_loss is not None, "others evaluate at the end"
    assert info.test_step == info.step


@pytest.mark.parametrize("kills", ["3:evaluate:2", "3:fetch:2", "3:evaluate:1"])
def test_a_dead_evaluator_costs_its_evaluations(jobs: Jobs, kills: str) -> None:
    done = run(jobs, kills)
    assert done.returncode == 0, done.transcript
    assert "sabotage: SIGKILL" in done.stderr, done.transcript
    assert ", and with it the evaluator: nothing more is evaluated before the end" in done.stdout, done.transcript
    assert "lost replicas" not in done.stdout
    assert_all_is_learned(jobs)
    [loss] = records(jobs, "loss")
    assert (loss["role"], loss["lost"], loss["pushes"], loss["left"], loss["takers"]) == ("evaluator", 2, 0, 0, [])


@pytest.mark.slow
def test_one_of_two_evaluators_goes_on(jobs: Jobs) -> None:
    done = run(jobs, "3:evaluate:4", "topology.evaluators=2", "optimizer.epochs=60", ranks=5)
    assert done.returncode == 0, done.transcript
    assert ", and with it evaluator 0: 1 of 2 are left" in done.stdout, done.transcript
    assert_all_is_learned(jobs)
    assert len(records(jobs, "evaluation")) > 1


@pytest.mark.slow
def test_an_evaluator_takes_no_batches_of_a_dead_replica(jobs: Jobs) -> None:
    done = run(jobs, "1:compute:30")
    assert done.returncode == 0, done.transcript
    assert ", and with it replica 0: the run goes on with 1 of 2 replicas" in done.stdout, done.transcript
    assert_all_is_learned(jobs)
    [loss] = records(jobs, "loss")
    assert (loss["role"], loss["takers"]) == ("replica", [1])


def test_without_a_replica_the_run_is_over_also_with_an_evaluator(jobs: Jobs) -> None:
    done = run(jobs, "1:compute:30", ranks=3)
    assert done.returncode == 75, done.transcript
    assert "no replica is left" in done.stderr, done.transcript


@pytest.mark.slow
def test_one_of_two_partitions_of_an_evaluator_dies(jobs: Jobs) -> None:
    done = run(jobs, "4:evaluate:3", "topology.replicas=1", "topology.partitions=2", ranks=5)
    assert done.returncode == 0, done.transcript
    assert ", and with it the evaluator: " in done.stdout, done.transcript
    assert_all_is_learned(jobs)
