"""A mistake on the command line costs one line, which says what was meant or what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbmpi.cli.main import main
from dbmpi.config import load
from dbmpi.data.stream import Stream
from dbmpi.errors import UserError
from dbmpi.session import StartingPoint

CONFIG = """
[run]
directory = "there"
[data]
train = "train.h5"
[network]
loss = "softmax"
[[network.layers]]
units = 3
[optimizer]
epochs = "many"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.replace('"many"', "2"))
    return path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the line that a command says before it ends with exit code 2."""
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "dbmpi --help lists all"),
        (("trian", "run.toml"), "'trian' is no command; did you mean 'train'?"),
        (("xyz",), "'xyz' is no command; known are train, launch"),
        (("data", "imprt"), "'imprt' is no action; did you mean 'import'?"),
        (("data", "import", "digts"), "did you mean 'digits'?"),
        (("train", "run.toml", "--sett", "x=1"), "train has no argument --sett; did you mean '--set'?"),
        (("inspect", "x", "--nothing-like-it"), "inspect has no argument --nothing-like-it"),
        (("launch", "train"), "required: -n"),
    ],
)
def test_the_command_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str) -> None:
    assert expected in said(capsys, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("inspect",), ("is a configuration", "dbmpi inspect there", "--placement")),
        (("plot",), ("is a configuration", "dbmpi plot there")),
        (("evaluate", "--data", "x.h5"), ("is a configuration", "dbmpi evaluate there")),
        (("predict", "--data", "x.h5", "--out", "y.h5"), ("is a configuration", "dbmpi predict there")),
    ],
)
def test_a_configuration_in_place_of_what_came_of_it(
    capsys: pytest.CaptureFixture[str], config: Path, words: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    line = said(capsys, words[0], str(config), *words[1:])
    assert all(part in line for part in expected), line
    config.write_text("[data\n")
    assert "is a configuration" in said(capsys, words[0], str(config), *words[1:])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimzer.epochs=5", "unknown key 'optimzer'; did you mean 'optimizer'?"),
        ("optimizer.epochs=abc", "epochs"),
        ("optimizer.batch_size=0", "batch_size"),
        ("network.layers.0.unts=3", "did you mean 'units'?"),
        ("epochs=5", "did you mean --set optimizer.epochs=5?"),
        ("run.directory=", "expected a value"),
        ("nothing=5", "expected section.key=value"),
    ],
)
def test_a_mistake_in_set_is_not_blamed_on_the_file(config: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load(config, ("run.seed=1", override))
    assert str(caught.value).startswith(f"--set {override}: ")
    assert expected in str(caught.value)
    assert str(config) not in str(caught.value)


def test_a_mistake_in_the_file_is_not_blamed_on_set(config: Path) -> None:
    config.write_text(CONFIG)
    with pytest.raises(UserError) as caught:
        load(config, ("optimizer.batch_size=4",))
    assert str(caught.value).startswith(f"{config}: optimizer.epochs")
    assert load(config, ("optimizer.epochs=3",)).optimizer.epochs == 3


def test_what_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory, expected a configuration"):
        load(tmp_path)
    (tmp_path / "data.h5").write_bytes(b"\x89HDF\r\n\x1a\n\xff")
    with pytest.raises(UserError, match="cannot be read as a configuration, which is a text"):
        load(tmp_path / "data.h5")


def test_a_run_that_has_nothing_left_to_learn_says_how_to_go_on() -> None:
    assert StartingPoint(Stream(10, 4), 7).resumed(5, ", 6 are left") == "going on after 7 steps, 6 are left"
    done = StartingPoint(Stream(10, 10), 7).resumed(5)
    assert "already done" in done
    assert "--set optimizer.epochs=10" in done
