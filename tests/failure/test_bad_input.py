"""What a user can get wrong, under a launcher: one message, from one rank, within seconds, exit code 2.

Which mistakes there are, and that nothing is touched, is in ``parallel/test_mistakes.py``: one launch for all.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from failure.jobs import SECONDS, Jobs, messages
from harness.environment import timeout_scale
from harness.launching import Completed
from parallel import tiny


def assert_refused(done: Completed, *words: str) -> None:
    """The job has ended as a mistake of the user must end it."""
    assert done.returncode == 2, done.transcript
    told = messages(done)
    assert len(told) == 1, done.transcript
    assert all(word in told[0] for word in words), done.transcript
    assert "Traceback" not in done.output, done.transcript
    assert done.seconds < SECONDS * timeout_scale(), done.transcript


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optimizer.learning_rat=1", ("--set optimizer.learning_rat=1", "did you mean 'learning_rate'?")),
        ("topology.shards=7", ("2 ranks started", "topology.shards = 1")),
        ("data.train=bad.h5", ("bad.h5", "sample 7 holds NaN", "finite")),
    ],
    ids=["the first rank", "all ranks", "a worker"],
)
def test_a_mistake_is_told_once(jobs: Jobs, setting: str, words: tuple[str, ...]) -> None:
    """Whichever rank finds it."""
    inputs = np.zeros((9, tiny.FEATURES))
    inputs[7, 2] = np.nan
    tiny.write_file(jobs.directory / "bad.h5", inputs, np.arange(9) % tiny.CLASSES)
    before = tiny.snapshot(jobs.directory)
    assert_refused(jobs(2, setting), *words)
    assert tiny.snapshot(jobs.directory) == before


def test_a_wrong_command_line_is_told_once(jobs: Jobs) -> None:
    """Before there is an MPI."""
    done = jobs.launch(3, [sys.executable, "-m", "dbmpi", "train", "config.toml", "--sett", "x"], cwd=jobs.directory)
    assert_refused(done, "train has no argument --sett; did you mean '--set'?")
