"""What a user can get wrong: one message, from one rank, within seconds, exit code 2, and nothing touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from failure.jobs import SECONDS, Jobs, messages
from harness.environment import timeout_scale
from harness.launching import Completed
from parallel import tiny

CLASSES = np.arange(9) % tiny.CLASSES
INPUTS = np.zeros((9, tiny.FEATURES))


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file below a directory."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in directory.rglob("*") if not p.is_dir()}


def assert_refused(done: Completed, *words: str) -> None:
    """The job has ended as a mistake of the user must end it."""
    assert done.returncode == 2, done.transcript
    told = messages(done)
    assert len(told) == 1, done.transcript
    assert all(word in told[0] for word in words), done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert done.seconds < SECONDS * timeout_scale(), done.transcript


def nothing(directory: Path) -> None:
    pass


def truncated(directory: Path) -> None:
    whole = (directory / "train.h5").read_bytes()
    (directory / "bad.h5").write_bytes(whole[: len(whole) // 2])


def text(directory: Path) -> None:
    (directory / "bad.h5").write_text("1,2,3\n")


def not_a_number(directory: Path) -> None:
    inputs = INPUTS.copy()
    inputs[7, 2] = np.nan
    tiny.write_file(directory / "bad.h5", inputs, CLASSES)


def label_out_of_range(directory: Path) -> None:
    tiny.write_file(directory / "bad.h5", INPUTS, CLASSES + 1)


def another_shape(directory: Path) -> None:
    tiny.write_file(directory / "bad.h5", np.zeros((9, 2, 5)), CLASSES)


BAD = "data.train=bad.h5"
CASES: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "missing data": (nothing, "data.train=absent.h5", ("absent.h5: no such data file", "dbmpi data import")),
    "torn data": (truncated, BAD, ("bad.h5", "damaged")),
    "no HDF5": (text, BAD, ("bad.h5: is not an HDF5 file", "dbmpi data import")),
    "NaN in data": (not_a_number, BAD, ("bad.h5", "sample 7 holds NaN", "finite")),
    "label out of range": (label_out_of_range, BAD, ("bad.h5", "label 3 of sample 2 is not a class", "from 0 to 2")),
    "shapes that differ": (another_shape, BAD, ("test.h5: samples have shape (6,)", "bad.h5", "(2, 5)")),
    "outputs that do not fit": (nothing, "network.layers.1.units=4", ("train.h5", "3 classes", "4 outputs")),
    "a world that does not fit": (nothing, "topology.shards=7", ("2 ranks started", "topology.shards = 1")),
    "an unknown key": (nothing, "optimizer.learning_rat=1", ("config.toml", "did you mean 'learning_rate'?")),
    "an inbox too small": (nothing, "server.inbox_mib=0.001", ("set server.inbox_mib to",)),
    "a directory below a file": (nothing, "run.directory=train.h5/run", ("train.h5/run", "run.directory")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_once(jobs: Jobs, case: str) -> None:
    prepare, setting, words = CASES[case]
    prepare(jobs.directory)
    before = snapshot(jobs.directory)
    assert_refused(jobs(2, setting), *words)
    assert snapshot(jobs.directory) == before


def test_a_wrong_command_line_is_told_once(jobs: Jobs) -> None:
    assert_refused(jobs(3, "optimizer"), "--set optimizer: expected section.key=value")
    (jobs.directory / "config.toml").unlink()
    assert_refused(jobs(3), "config.toml: no such configuration file")
    done = jobs.launch(3, [sys.executable, "-m", "dbmpi", "train", "config.toml", "--sett", "x"], cwd=jobs.directory)
    assert_refused(done, "unrecognized arguments: --sett x")


def test_nothing_of_an_earlier_run_is_touched(jobs: Jobs) -> None:
    """Neither where the run is not to go on, nor by a run of another network."""
    assert jobs(None).returncode == 0
    before = snapshot(jobs.run_directory)
    mistakes = {
        "checkpoint.resume=never": ("run: already holds checkpoints", 'checkpoint.resume = "auto"'),
        "network.layers.0.units=8": ("a checkpoint of another network", "dense1/weights is 7x6 in the file and 8x6"),
    }
    for setting, words in mistakes.items():
        assert_refused(jobs(2, setting), *words)
        assert snapshot(jobs.run_directory) == before


def test_torn_checkpoints_are_not_taken_for_a_fresh_start(jobs: Jobs) -> None:
    assert jobs(None).returncode == 0
    for path in (jobs.run_directory / "checkpoints").glob("step-*.h5"):
        path.write_bytes(path.read_bytes()[:-500])
    before = snapshot(jobs.run_directory)
    assert_refused(jobs(2), "no checkpoint that can be read")
    assert snapshot(jobs.run_directory) == before


@pytest.fixture
def read_only(jobs: Jobs) -> Iterator[Path]:
    """A directory that nobody can write to, root included."""
    place = jobs.directory / "read-only"
    place.mkdir()
    if os.geteuid() == 0:
        changed = subprocess.run(["chattr", "+i", str(place)], capture_output=True, check=False) if _chattr() else None
        if changed is None or changed.returncode:
            pytest.skip("root can write everywhere, and chattr +i does not work here")
        yield place
        subprocess.run(["chattr", "-i", str(place)], check=True)
    else:
        place.chmod(0o555)
        yield place
        place.chmod(0o755)


def _chattr() -> bool:
    return shutil.which("chattr") is not None


@pytest.mark.parametrize("below", [".", "run"])
def test_an_unwritable_run_directory_is_told_once(jobs: Jobs, read_only: Path, below: str) -> None:
    done = jobs(2, f"run.directory={read_only / below}")
    assert_refused(done, f"{read_only}", "cannot be used as the run directory", "set run.directory")
    assert list(read_only.iterdir()) == []


def test_an_unwritable_directory_of_an_earlier_run_is_told_once(jobs: Jobs) -> None:
    """It can be read, and the run could train for hours before the first checkpoint fails."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to take the right to write from the directories of a run")
    assert jobs(None).returncode == 0
    place = jobs.run_directory / "checkpoints"
    if not _chattr() or subprocess.run(["chattr", "+i", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("chattr +i does not work here")
    try:
        done = jobs(2, "optimizer.epochs=3")
    finally:
        subprocess.run(["chattr", "-i", str(place)], check=True)
    assert_refused(done, "run: cannot be used as the run directory")
