"""What the tests of failures wrap, to kill a rank when it enters a phase, exists; and nothing is wrapped otherwise."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sabotage.sitecustomize import PHASES, VARIABLE, moments

FOLDER = Path(__file__).parents[1] / "sabotage"


@pytest.mark.parametrize("phase", PHASES)
def test_methods_of_a_phase_exist(phase: str) -> None:
    for target in PHASES[phase]:
        module, owner, name = target.split()
        assert callable(vars(getattr(importlib.import_module(module), owner))[name]), target


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
