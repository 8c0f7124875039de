"""Commands whose standard streams are closed: they work, and their exit code is the same as ever."""

from __future__ import annotations

import os
import sys

import pytest
from failure.jobs import Jobs
from harness.launching import Completed

from dbmpi.machine import streams

CLOSED = [">&-", "2>&-", "<&-", ">&- 2>&- <&-"]


def closed(jobs: Jobs, redirections: str, *words: str) -> Completed:
    """Run ``dbmpi words...`` with standard streams closed by a shell."""
    argv = ["bash", "-c", f'exec "$@" {redirections}', "bash", sys.executable, "-m", "dbmpi", *words]
    done = jobs.launch(None, argv, cwd=jobs.directory)
    assert not done.left, done.transcript
    assert "Traceback" not in done.output, done.transcript
    return done


@pytest.mark.parametrize("redirections", CLOSED)
def test_commands(trained: Jobs, redirections: str) -> None:
    """Whatever reads or writes files: none of them takes the number of a stream that is closed."""
    for words in (("inspect", "run"), ("predict", "run", "--data", "test.h5", "--out", "p.h5"), ("train", "none.toml")):
        done = closed(trained, redirections, *words)
        assert done.returncode == (2 if words[0] == "train" else 0), done.transcript
        assert ("none.toml: no such" in done.stderr) == (words[0] == "train" and "2>&-" not in redirections)
    assert (trained.directory / "p.h5").stat().st_size > 0


def test_a_full_disk_of_the_output_is_one_line(trained: Jobs) -> None:
    for words in (("inspect", "run"), ("evaluate", "run", "--data", "test.h5"), ("example",)):
        done = closed(trained, ">/dev/full", *words)
        assert done.returncode == 1, done.transcript
        assert "dbmpi: standard output: cannot be written: No space left on device" in done.stderr


@pytest.mark.parametrize("redirections", [">&-", ">&- 2>&- <&-"])
def test_launch(jobs: Jobs, redirections: str) -> None:
    done = closed(jobs, redirections, "launch", "-n", "2", "--", "train", "config.toml")
    assert done.returncode == 0, done.transcript
    jobs.assert_whole()


def test_closed_streams_lead_nowhere(tmp_path, launch) -> None:
    """What is opened next has another number, and what is started finds streams, too."""
    program = (
        "import os, subprocess, sys\n"
        "from dbmpi.machine.streams import open_closed\n"
        "open_closed(); open_closed()\n"
        "print('x', flush=True); sys.stderr.write('y'); assert sys.stdin.read() == ''\n"
        "file = open(sys.argv[1], 'w')\n"
        "assert file.fileno() > 2\n"
        "child = 'import os; [os.fstat(number) for number in range(3)]'\n"
        "file.write(str(subprocess.run([sys.executable, '-c', child]).returncode))\n"
    )
    argv = ["bash", "-c", 'exec "$@" >&- 2>&- <&-', "bash", sys.executable, "-c", program, "out"]
    done = launch(None, argv, cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "out").read_text() == "0"


def test_open_streams_stay(capfd) -> None:
    before = [os.fstat(number) for number in range(3)]
    streams.open_closed()
    assert [os.fstat(number) for number in range(3)] == before
