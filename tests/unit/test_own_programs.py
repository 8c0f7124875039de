"""Which program `dbmpi launch` starts for the words of a user; tests/failure/test_own_programs.py starts some."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dbmpi.cli.main import COMMANDS
from dbmpi.errors import UserError
from dbmpi.machine.own_program import resolve


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with scripts, and one on ``PATH``."""
    (tmp_path / "bin").mkdir()
    for name, executable in (("mine.py", False), ("run.py", True), ("mine", True), ("train", True), ("data.sh", False)):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755 if executable else 0o644)
    (tmp_path / "bin" / "found").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "found").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["python", "mine.py", "-x"], [sys.executable, "mine.py", "-x"]),
        (["python3", "-m", "mine"], [sys.executable, "-m", "mine"]),
        (["python"], [sys.executable]),
        (["dbmpi", "train", "c.toml"], [sys.executable, "-m", "dbmpi", "train", "c.toml"]),
        (["mine.py", "1"], [sys.executable, "mine.py", "1"]),
        (["./mine.py"], [sys.executable, "./mine.py"]),
        (["./run.py"], ["./run.py"]),
        (["./mine", "a b"], ["./mine", "a b"]),
        (["./train", "x"], ["./train", "x"]),
    ],
)
def test_programs(here: Path, given: list[str], expected: list[str]) -> None:
    assert resolve(given, COMMANDS) == expected


def test_a_program_on_the_path_is_found_once_and_for_all_ranks(here: Path) -> None:
    assert resolve(["found", "x"], COMMANDS) == [os.path.join(here, "bin", "found"), "x"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["nothing"], ("nothing: no such program", "dbmpi's own commands are train, ")),
        (["trian", "c.toml"], ("trian: no such program", "did you mean 'train'?")),
        (["./data.sh"], ("./data.sh is not executable", "chmod +x ./data.sh")),
        (["mine"], ("mine: no such program", "./mine")),
        (["./bin"], ("./bin is a directory",)),
        (["./none"], ("./none: no such program",)),
        (["none.py"], ("none.py: no such program",)),
        (["python", "none.py"], ("python none.py: no such file",)),
    ],
)
def test_what_cannot_be_started_is_told_in_one_line(here: Path, given: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(given, COMMANDS)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
