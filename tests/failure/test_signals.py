"""Ctrl-C, SIGTERM and SIGUSR2, to the launcher and to single ranks: a checkpoint that resumes, and 128 + n."""

from __future__ import annotations

import signal
import time

import pytest
from failure.jobs import FOR_EVER, SECONDS, Jobs
from harness.environment import is_open_mpi, timeout_scale
from harness.launching import Completed

ALWAYS = f"optimizer.epochs={FOR_EVER}"


def assert_ended_by(done: Completed, number: int, name: str, since: float) -> None:
    """The run has said why it ends, written a checkpoint, and told its caller."""
    assert done.returncode == 128 + number, done.transcript
    assert f"{name}: the run ends after the current steps" in done.stdout, done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert time.monotonic() - since < SECONDS * timeout_scale(), done.transcript


@pytest.mark.parametrize(
    ("rank", "number"),
    [(0, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM), (2, signal.SIGUSR2)],
    ids=["lead", "worker", "other worker", "SIGUSR2"],
)
def test_a_signal_to_one_rank_ends_the_run_with_a_checkpoint(jobs: Jobs, rank: int, number: signal.Signals) -> None:
    program = jobs.start(3, ALWAYS)
    jobs.wait_until_all_learn(program, 2)
    since = time.monotonic()
    program.signal(number, rank)
    assert_ended_by(jobs.finish(program), number, number.name, since)
    jobs.assert_whole()
    if rank == 0:
        jobs.assert_resumes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_run_without_a_launcher_ends_it_with_a_checkpoint(jobs: Jobs, number: signal.Signals) -> None:
    program = jobs.start(None, ALWAYS)
    jobs.wait_until_all_learn(program, 1)
    since = time.monotonic()
    program.signal(number)
    assert_ended_by(jobs.finish(program), number, number.name, since)
    jobs.assert_whole()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_dbmpi_launch_ends_the_run_with_a_checkpoint(jobs: Jobs, number: signal.Signals) -> None:
    """Under any MPI: what reaches the ranks is what lets them end in peace."""
    program = jobs.start(None, ALWAYS, launcher=3)
    jobs.wait_until_all_learn(program, 2)
    since = time.monotonic()
    program.signal(number)
    passed_on = "SIGUSR2" if is_open_mpi() else "SIGTERM"
    assert_ended_by(jobs.finish(program), number, passed_on, since)
    jobs.assert_whole()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_the_run_and_leaves_a_checkpoint(jobs: Jobs, number: signal.Signals) -> None:
    """Open MPI's mpirun gives its ranks half a second: what they cannot write then, the last checkpoint has."""
    program = jobs.start(3, ALWAYS, "checkpoint.every_seconds=0.2")
    jobs.wait_until_all_learn(program, 2)
    jobs.wait_for_checkpoint(program)
    since = time.monotonic()
    program.signal(number)
    done = jobs.finish(program)
    if is_open_mpi():
        assert done.returncode != 0, done.transcript
        assert time.monotonic() - since < SECONDS * timeout_scale()
    else:
        assert_ended_by(done, number, number.name, since)
    jobs.assert_whole()
    if number == signal.SIGTERM:
        jobs.assert_resumes()


def test_a_second_interrupt_ends_the_job_at_once(jobs: Jobs) -> None:
    """Also where the end cannot come in peace, because another rank stands still."""
    program = jobs.start(3, ALWAYS)
    jobs.wait_until_all_learn(program, 2)
    ranks = program.ranks()
    program.send([ranks[2]], signal.SIGSTOP)
    program.send([ranks[0]], signal.SIGINT)
    jobs.wait_for_output(program, "SIGINT: the run ends")
    since = time.monotonic()
    program.send([ranks[0]], signal.SIGINT)
    done = jobs.finish(program)
    assert done.returncode == 130, done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert time.monotonic() - since < SECONDS * timeout_scale()
