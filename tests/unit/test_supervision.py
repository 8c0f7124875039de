"""An mpirun that would wait without end for hosts that are cut off is ended, and no other."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dbmpi.machine import launcher, supervision
from dbmpi.machine.launcher import LaunchCommand
from dbmpi.machine.mpi_library import Mpi

FOR_OTHERS, LONGER = 4.0, 6.0
MPIRUN = """#!/bin/sh
trap '' TERM
VARIABLES sh -c 'echo "DIRECTORY" >"$DBMPI_UNFINISHED"; sleep SECONDS; LAST' &
wait
AFTERWARDS
"""
A_RANK = "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1"
SAY = 'echo 1 >"${DBMPI_UNFINISHED%/*}/said"'


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **words: str | float) -> int:
    """Launch a command that seems to be an mpirun of one rank, and return the exit code."""
    monkeypatch.setattr(supervision, "_FOR_OTHERS", FOR_OTHERS)
    text, fake = MPIRUN, tmp_path / "mpirun"
    for word, value in words.items():
        text = text.replace(word, str(value))
    fake.write_text(text)
    fake.chmod(0o755)
    return launcher.run(Mpi("Open MPI v5.0.11", "", str(fake)), LaunchCommand((str(fake), "dbmpi", "train"), {})).code


@pytest.mark.parametrize(("last", "code"), [(SAY, 1), ("", 75)], ids=["which it has explained", "without a word"])
def test_an_mpirun_that_stays_after_its_ranks_is_ended(
    tmp_path: Path, monkeypatch, capfd, last: str, code: int
) -> None:
    begun = time.monotonic()
    words = {"VARIABLES": A_RANK, "SECONDS": 2, "LAST": last, "AFTERWARDS": "exec sleep 300"}
    assert run(tmp_path, monkeypatch, **words) == code
    assert time.monotonic() - begun < 60
    assert ("mpirun waits for another host" in capfd.readouterr().err) == (code == 75)


@pytest.mark.parametrize("variables", [A_RANK, ""], ids=["whose rank lives", "whose ranks are not seen"])
def test_an_mpirun_may_take_its_time(tmp_path: Path, monkeypatch, variables: str) -> None:
    words = {"VARIABLES": variables, "SECONDS": LONGER, "LAST": 'rm "$DBMPI_UNFINISHED"', "AFTERWARDS": "exit 0"}
    begun = time.monotonic()
    assert run(tmp_path, monkeypatch, **words) == 0
    assert time.monotonic() - begun >= LONGER
