"""The project's files: the version is told, no machine shines through, and what the README says can be typed.

Every block of code in the README has a comment before it that says what a test does with it (unit/documentation.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from unit.documentation import Block, blocks

import dbmpi

PROJECT = Path(__file__).parents[2]
README = PROJECT / "README.md"


def quick_blocks() -> list[Block]:
    return [block for block in blocks(README.read_text(encoding="utf-8")) if block.label == "quick"]


def tracked_files() -> list[Path]:
    """Return the files that belong to the project: those that Git knows, or would ask about."""
    if shutil.which("git") is None or not (PROJECT / ".git").exists():
        pytest.skip("not a Git work tree: nothing says which files belong to the project")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return [PROJECT / name for name in listed if name and (PROJECT / name).is_file()]


def test_the_changelog_has_the_version():
    changelog = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[?([0-9][^\]\s]*)", changelog, re.MULTILINE)
    assert headings
    assert headings[0] == dbmpi.__version__


def test_no_file_names_a_machine():
    # Written so that this file does not name them itself.
    places = ("/" + "work/", "/" + "root/", "/opt/" + "wheels", "/opt/" + "pypi", "/home/" + "runner")
    wrong = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="replace")
        wrong += [f"{path.relative_to(PROJECT)}: {place}" for place in places if place in text]
    assert wrong == []


@pytest.mark.parametrize("extra", ["openmpi", "mpich", "plot", "test", "lint", "docs", "bench"])
def test_extras_and_targets_exist(extra):
    import tomllib

    with (PROJECT / "pyproject.toml").open("rb") as file:
        assert extra in tomllib.load(file)["project"]["optional-dependencies"]


def test_make_knows_what_the_readme_asks_it_for():
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(b.code for b in blocks(README.read_text("utf-8")))))
    known = set(re.findall(r"^([a-z][a-z-]*):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert targets <= known
    assert {"demo", "test", "test-mpich", "lint", "docs", "bench-peers", "clean"} <= known


def test_blocks_are_found_with_their_labels():
    text = (
        "a\n<!-- test: quick -->\n```sh\nls\n```\n\n```sh\nrm\n```\n<!-- test: not here, slow -->\n\n```sh\nx\ny\n```\n"
    )
    assert blocks(text) == [Block(3, "quick", "ls\n"), Block(7, None, "rm\n"), Block(12, "not here, slow", "x\ny\n")]


def test_every_command_of_the_readme_is_tested_or_says_why_not():
    found = blocks(README.read_text(encoding="utf-8"))
    if not found:
        pytest.skip("the README has no blocks")
    assert [f"README.md:{block.line}" for block in found if block.label is None] == []
    assert any(block.label == "quick" for block in found)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of somebody who follows the README from top to bottom: the project, with nothing made in it."""
    here = tmp_path_factory.mktemp("readme")
    for path in tracked_files():
        if path.relative_to(PROJECT).parts[0] not in ("src", "tests"):
            copy = here / path.relative_to(PROJECT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    for block in blocks(README.read_text(encoding="utf-8")):
        if block.saved_as:
            (here / block.saved_as).write_text(block.code, encoding="utf-8")
    return here


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("block", quick_blocks(), ids=lambda block: f"line{block.line}")
def test_the_readme_can_be_typed(block, newcomer, launch):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = launch(None, ["bash", "-euo", "pipefail", "-c", block.code], 170, {"PATH": path}, newcomer)
    assert done.returncode == 0, done.transcript
    assert not done.left
