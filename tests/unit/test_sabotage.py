"""What the tests of failures wrap, to kill a rank when it enters a phase, exists; and nothing is wrapped otherwise."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sabotage.sitecustomize import HOLD, PHASES, VARIABLE, moments

FOLDER = Path(__file__).parents[1] / "sabotage"


@pytest.mark.parametrize("phase", PHASES)
def test_what_enters_a_phase_exists(phase: str) -> None:
    for target in PHASES[phase]:
        module, *owner, name = target.split()
        found = importlib.import_module(module)
        assert callable(vars(getattr(found, *owner) if owner else found)[name]), target


def test_moments_are_those_of_one_rank() -> None:
    text = "2:compute:5,0:line search:1:STOP,2:push:1:TERM"
    assert moments(text, "2") == [("compute", 5, signal.SIGKILL), ("push", 1, signal.SIGTERM)]
    assert moments(text, "0") == [("line search", 1, signal.SIGSTOP)]
    assert moments(text, "1") == []
    with pytest.raises(ValueError, match="'compile' is none of start, "):
        moments("1:compile:1", "0")


@pytest.mark.parametrize(("text", "rank", "code"), [("3:apply:2", "3", -9), ("3:apply:2", "1", 0), ("", "3", 0)])
def test_a_rank_is_killed_at_its_moment_alone(text: str, rank: str, code: int) -> None:
    program = """
from dbmpi.paramserver.server import Server
for turn in range(2):
    try:
        Server._update()
    except TypeError:
        print(turn, flush=True)
"""
    environment = os.environ | {VARIABLE: text, "OMPI_COMM_WORLD_RANK": rank, "PYTHONPATH": str(FOLDER)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (code, ["0"] if code else ["0", "1"]), done.stderr


def test_others_compute_no_more_portions_before_a_rank_is_killed(tmp_path: Path) -> None:
    program = """
from dbmpi.sandblaster.replica import Portions
for turn in range(3):
    try:
        Portions._compute()
    except TypeError:
        print(turn, flush=True)
"""
    environment = os.environ | {VARIABLE: "3:deliver:2,1:end:1", HOLD: str(tmp_path), "PYTHONPATH": str(FOLDER)}
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, env=environment | {"OMPI_COMM_WORLD_RANK": "1"}, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert [other.stdout.readline(), other.stdout.readline()] == [b"0\n", b"1\n"]
        time.sleep(0.5)
        assert other.poll() is None
        program = program.replace("_compute", "_commit")
        argv = [sys.executable, "-c", program]
        killed = subprocess.run(argv, env=environment | {"OMPI_COMM_WORLD_RANK": "3"}, capture_output=True, check=False)
        assert (killed.returncode, killed.stdout) == (-9, b"0\n"), killed.stderr
        assert other.stdout.read() == b"2\n"
        assert other.wait(20) == 0
