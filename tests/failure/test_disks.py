"""Disks that are full, turn read-only or lose a run's directory: the run goes on, and says what it cannot write."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
from failure.jobs import FOR_EVER, Jobs, messages

from dbmpi.checkpoint.directory import POINTERS, step_of
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.monitor.records import read_records

OFTEN = "checkpoint.every_seconds=0.1"
ALWAYS = f"optimizer.epochs={FOR_EVER}"
RUN = "run.directory=disk/run"
SANDBLASTER = "method=sandblaster", "algorithm=gradient_descent", "gtol=0", "ftol=0"
METHODS = {
    "downpour": ["topology.shards=2"],
    "sandblaster": ["topology.shards=2", f"optimizer.{SANDBLASTER[0]}", *(f"sandblaster.{x}" for x in SANDBLASTER[1:])],
}


class Disk:
    """A file system of some hundred kilobytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = path / "run"

    def fill(self) -> None:
        subprocess.run(["dd", "if=/dev/zero", f"of={self.path / 'ballast'}"], capture_output=True, check=False)

    def empty(self) -> None:
        (self.path / "ballast").unlink()

    def step(self) -> int:
        """Return the step of the newest checkpoint."""
        with Checkpoint.open(self.run) as checkpoint:
            return checkpoint.info.step


@pytest.fixture
def disk(jobs: Jobs) -> Iterator[Disk]:
    path = jobs.directory / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(path)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small file system")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield Disk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(jobs: Jobs, disk: Disk, method: str) -> None:
    program = jobs.start(3, RUN, "checkpoint.keep=1", OFTEN, ALWAYS, *METHODS[method])
    jobs.wait_for_checkpoint(program, "disk/run")
    disk.fill()
    jobs.wait_for_output(program, "warning: ", "the run goes on without a new checkpoint")
    before = disk.step()
    disk.empty()
    jobs.wait_for_output(program, "a checkpoint is written again, after")
    program.signal(signal.SIGTERM, 0)
    done = jobs.finish(program)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert disk.step() > before
    # Found out before a checkpoint is written, or in the middle of one; said once each time, with what is left.
    told = [line for line in done.stdout.splitlines() if "the run goes on without" in line]
    assert all("the last checkpoint is disk/run/checkpoints/step-" in line for line in told), done.transcript
    assert len(told) <= done.stdout.count("a checkpoint is written again") + 1, done.transcript


def forbid(path: Path, *, now: bool) -> None:
    """Let nobody make files in a directory, not even root; or let them again."""
    done = subprocess.run(["chattr", "+i" if now else "-i", path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"directories cannot be made immutable here: {done.stderr.decode()}")


@pytest.mark.parametrize("method", METHODS)
def test_the_last_checkpoint_is_tried_until_the_directory_takes_it(jobs: Jobs, method: str) -> None:
    if os.geteuid() != 0 or shutil.which("chattr") is None:
        pytest.skip("needs root and chattr, to make a directory immutable")
    place = jobs.run_directory / "checkpoints"
    program = jobs.start(3, OFTEN, ALWAYS, *METHODS[method])
    jobs.wait_for_checkpoint(program)
    forbid(place, now=True)
    try:
        jobs.wait_for_output(program, "the run goes on without a new checkpoint")
        with jobs.checkpoint() as checkpoint:
            before = checkpoint.info.step
        program.signal(signal.SIGTERM, 0)
        jobs.wait_for_output(program, "the last checkpoint is tried again for", "the last checkpoint still cannot be")
    finally:
        forbid(place, now=False)
    done = jobs.finish(program)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    assert "Traceback" not in done.output, done.transcript
    with jobs.checkpoint() as checkpoint:
        assert checkpoint.info.step > before


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_was_learned_is_given_up_in_the_end(jobs: Jobs, disk: Disk, method: str) -> None:
    program = jobs.start(3, RUN, OFTEN, ALWAYS, "checkpoint.retry_seconds=1.5", *METHODS[method])
    jobs.wait_for_checkpoint(program, "disk/run")
    disk.fill()
    jobs.wait_for_output(program, "the run goes on without a new checkpoint")
    program.signal(signal.SIGTERM, 0)
    done = jobs.finish(program)
    assert done.returncode == 1, done.transcript
    assert "Traceback" not in done.output, done.transcript
    (told,) = [line for line in messages(done) if "was given up" in line]
    assert "the last checkpoint was given up after 1.5 s" in told
    assert f"the last checkpoint is disk/run/checkpoints/step-{disk.step():09d}.h5" in told
    before = disk.step()
    disk.empty()
    done = jobs(None, RUN, f"optimizer.epochs={before // 7 + 2}")
    assert f"going on after {before:,} steps" in done.stdout, done.transcript


def test_a_run_directory_that_is_removed_is_made_anew(jobs: Jobs) -> None:
    program = jobs.start(3, OFTEN, ALWAYS)
    jobs.wait_until_all_learn(program, 2)
    jobs.wait_for_checkpoint(program)
    jobs.run_directory.rename(jobs.directory / "moved")
    jobs.wait_for_checkpoint(program)
    jobs.wait_for_reports(program, 0, 1)
    program.signal(signal.SIGTERM, 0)
    done = jobs.finish(program)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    assert "the records were removed or moved during the run" in done.output, done.transcript
    jobs.assert_whole()
    assert {record["role"] for record in read_records(jobs.run_directory)} == {"worker", "shard"}


@pytest.mark.parametrize("n", [None, 3])
@pytest.mark.parametrize("damage", ["torn", "one bit", "one bit of all"])
def test_a_run_names_a_damaged_checkpoint_and_goes_on_from_another(trained: Jobs, n: int | None, damage: str) -> None:
    with trained.checkpoint() as checkpoint:
        first = checkpoint.path
    done = trained(n, "optimizer.epochs=4")
    assert done.returncode == 0, done.transcript
    with trained.checkpoint() as checkpoint:
        last = checkpoint.path
    for path in [last, first] if damage == "one bit of all" else [last]:
        data = bytearray(path.read_bytes())
        if damage == "torn":
            del data[-100:]
        else:
            with h5py.File(path) as file:
                data[file["parameters/dense1/bias"].id.get_offset() + 3] ^= 0x40
        path.write_bytes(data)
    done = trained(n, "optimizer.epochs=6")
    if damage == "one bit of all":
        assert done.returncode == 2, done.transcript
        (told,) = messages(done)
        assert "no checkpoint that can be read" in told
        assert {path.name for path in last.parent.iterdir()} == {first.name, last.name, *POINTERS}
        return
    assert done.returncode == 0, done.transcript
    place = "" if damage == "torn" else "/parameters/dense1/bias is damaged"
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert last.name in told, done.transcript
    assert place in told, done.transcript
    assert f"going on after {step_of(first):,} steps" in done.stdout, done.transcript
    names = {path.name for path in last.parent.iterdir()}
    assert {f"{last.name}.damaged", first.name} < names
    assert last.name not in names
    with trained.checkpoint() as checkpoint:
        assert checkpoint.info.step == checkpoint.info.total  # each batch once
