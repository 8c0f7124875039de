"""All signals that ask for the end, to the launcher and to single ranks: a checkpoint that resumes, and 128 + n.

And the signals that kill: the launcher says with one code of what the job has died, and how it goes on.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time

import pytest
from failure.jobs import FOR_EVER, SECONDS, Jobs
from failure.survival import killing
from harness.environment import is_open_mpi, launcher, timeout_scale
from harness.launching import Completed

from dbmpi.machine.signals import HEEDED

ALWAYS = f"optimizer.epochs={FOR_EVER}"


def assert_ended_by(done: Completed, number: int, name: str, since: float) -> None:
    """The run has said why it ends, written a checkpoint, and told its caller."""
    assert done.returncode == 128 + number, done.transcript
    assert f"{name}: the run ends after the current steps" in done.stdout, done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert time.monotonic() - since < SECONDS * timeout_scale(), done.transcript


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        pytest.param(0, signal.SIGTERM, marks=pytest.mark.quick),
        (1, signal.SIGINT),
        (2, signal.SIGTERM),
        (2, signal.SIGUSR2),
        (1, signal.SIGUSR1),
        (0, signal.SIGUSR1),
        (0, signal.SIGXCPU),
        (1, signal.SIGHUP),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else f"rank {value}",
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_a_run_without_a_launcher_ends_it_with_a_checkpoint(jobs: Jobs, number: signal.Signals) -> None:
    program = jobs.start(None, ALWAYS)
    jobs.wait_until_all_learn(program, 1)
    since = time.monotonic()
    program.signal(number)
    assert_ended_by(jobs.finish(program), number, number.name, since)
    jobs.assert_whole()


@pytest.mark.parametrize("number", HEEDED)
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


@pytest.mark.parametrize(
    ("rank", "first", "second"),
    [
        (0, signal.SIGINT, signal.SIGINT),
        (0, signal.SIGUSR2, signal.SIGUSR2),
        (1, signal.SIGTERM, signal.SIGINT),
        (1, signal.SIGUSR1, signal.SIGUSR2),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else f"rank {value}",
)
def test_a_second_signal_ends_the_job_at_once(
    jobs: Jobs, rank: int, first: signal.Signals, second: signal.Signals
) -> None:
    """Also where the end cannot come in peace, because another rank stands still; the first may be another rank's."""
    program = jobs.start(3, ALWAYS)
    jobs.wait_until_all_learn(program, 2)
    ranks = program.ranks()
    program.send([ranks[2]], signal.SIGSTOP)
    program.send([ranks[rank]], first)
    jobs.wait_for_output(program, f"{first.name}: the run ends")
    time.sleep(1.1)
    since = time.monotonic()
    program.send([ranks[0]], second)
    done = jobs.finish(program)
    assert done.returncode == 128 + second, done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert time.monotonic() - since < SECONDS * timeout_scale()


# Signals that kill


@pytest.mark.parametrize(
    ("rank", "number", "own"),
    [
        (0, signal.SIGKILL, []),
        (1, signal.SIGKILL, ["--no-fault-tolerance"]),
        (2, signal.SIGSEGV, ["--no-fault-tolerance"]),
        (1, signal.SIGABRT, ["--no-fault-tolerance"]),
        (0, signal.SIGKILL, ["--no-fault-tolerance"]),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_launch_says_how_a_run_goes_on_that_a_death_has_ended(
    jobs: Jobs, rank: int, number: signal.Signals, own: list[str]
) -> None:
    """One exit code, and a command that can be pasted: under any MPI, with its fault tolerance and without."""
    program = jobs.start(None, ALWAYS, "checkpoint.every_seconds=0.2", launcher=3, own=own)
    jobs.wait_until_all_learn(program, 2)
    jobs.wait_for_checkpoint(program)
    since = time.monotonic()
    program.signal(number, rank)
    done = jobs.finish(program)
    assert done.returncode == 75, done.transcript
    assert time.monotonic() - since < SECONDS * timeout_scale(), done.transcript
    # Not by lines: mpirun may have written a byte or two before it.
    _, *said = done.stderr.split("dbmpi launch: a rank has died")
    assert len(said) == 1, done.transcript
    assert "with a checkpoint" not in done.output, done.transcript
    with jobs.checkpoint() as checkpoint:
        step = checkpoint.info.step
        assert f"the newest whole checkpoint is run/checkpoints/{checkpoint.path.name}; " in said[0]
    words = shlex.split(said[0][said[0].index("dbmpi launch -n") :].splitlines()[0])
    assert words[-2:] == ["--set", "checkpoint.resume=auto"]
    again = jobs.launch.start(None, [sys.executable, "-m", *words], cwd=jobs.directory)
    jobs.wait_for_output(again, f"going on after {step:,} steps")
    again.signal(signal.SIGTERM)
    assert jobs.finish(again).returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("own", [[], ["--no-fault-tolerance"]], ids=["", "none"])
def test_a_run_is_started_again_after_a_death(jobs: Jobs, own: list[str]) -> None:
    """From the newest checkpoint; but not after an end that was asked for."""
    settings = (ALWAYS, "checkpoint.every_seconds=0.2")
    program = jobs.start(None, *settings, launcher=3, own=["--restarts=2", *own])
    jobs.wait_until_all_learn(program, 2)
    jobs.wait_for_checkpoint(program)
    killed = time.monotonic()
    program.signal(signal.SIGKILL, 0)
    jobs.wait_for_output(program, "going on after")
    assert time.monotonic() - killed < 10 * timeout_scale()
    assert program.stderr.count("it goes on from run/checkpoints/step-") == 1
    jobs.wait_until_all_learn(program, 2)
    program.signal(signal.SIGTERM)
    done = jobs.finish(program)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    assert done.stderr.count("dbmpi launch: a rank has died") == 1, done.transcript
    assert "(restarts left: 1)" in done.stderr, done.transcript
    jobs.assert_whole()


def test_a_run_that_dies_each_time_ends(jobs: Jobs) -> None:
    """Before there is a checkpoint: it begins anew each time."""
    program = jobs.start(None, ALWAYS, launcher=2, own=["--restarts=2"], env=killing("1:start:1"))
    done = jobs.finish(program)
    assert done.returncode == 75, done.transcript
    assert done.stderr.count("; started again, ") == 2, done.transcript
    assert "--restarts=2" in done.stderr, done.transcript


def test_a_mistake_is_made_once(jobs: Jobs) -> None:
    done = jobs.finish(jobs.start(None, "optimizer.rule=none", launcher=2, own=["--restarts=2"]))
    assert done.returncode == 2, done.transcript
    assert "started again" not in done.output, done.transcript


def test_a_rank_that_dies_while_mpi_starts_ends_the_job(jobs: Jobs) -> None:
    """The others are inside MPI_Init, where they would wait for it as long as for one that is late."""
    if not is_open_mpi():
        pytest.skip("MPICH ends all ranks when one dies")
    (jobs.directory / "sitecustomize.py").write_text(DYING)
    env = {"PYTHONPATH": str(jobs.directory)}
    program = jobs.start(None, ALWAYS, launcher=3, env=env)
    done = jobs.finish(program)
    assert done.returncode == 75, done.transcript
    assert done.seconds < SECONDS * timeout_scale(), done.transcript
    assert "dbmpi launch: a rank has died while MPI started" in done.stderr, done.transcript


def test_what_mpichs_launcher_sends_when_a_rank_has_died_is_no_wish(jobs: Jobs) -> None:
    """It tells the others by SIGUSR1, where they are to live on; from anybody else that asks for the end.

    Every other time (MPICH 5.0) it kills them all the same, which says nothing.
    """
    if is_open_mpi():
        pytest.skip("only MPICH's launcher does so")
    (jobs.directory / "program.py").write_text(NOTED)
    argv = [launcher(), "-disable-auto-cleanup", "-n", "3", sys.executable, "program.py"]
    for _ in range(15):
        done = jobs.finish(jobs.launch.start(None, argv, cwd=jobs.directory))
        if (jobs.directory / "told-0").exists() and (jobs.directory / "told-2").exists():
            break
    for rank in (0, 2):
        assert (jobs.directory / f"told-{rank}").read_text() == "0, asked 10", done.transcript


DYING = """
import os, signal
if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    os.kill(os.getpid(), signal.SIGKILL)
"""
NOTED = """
import os, signal, time
from pathlib import Path
from mpi4py import MPI
from dbmpi.machine import signals

rank, came = MPI.COMM_WORLD.rank, []
MPI.COMM_WORLD.Barrier()
with signals.StopSignal() as stop:
    # Before the handler: what comes is seen, whatever is made of it.
    note = signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, lambda number, frame: (came.append(number), note(number, frame)))
    MPI.COMM_WORLD.Barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while not came:
        time.sleep(0.01)
    told = stop.number
    with signals.StopSignal() as stop:  # which knows no other neighbours than those that are left
        os.kill(os.getpid(), signal.SIGUSR1)
        Path(f"told-{rank}").write_text(f"{told}, asked {stop.number}")
time.sleep(0.5)
os._exit(0)
"""
