"""The examples and batch scripts that come along: all are offered, and can be used where they are written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dbmpi import load
from dbmpi.cli.example import examples
from dbmpi.cli.main import main

PROJECT = Path(__file__).parents[2]
FILES = {
    path.name: path
    for folder in ("examples", "jobs/slurm")
    for path in (PROJECT / folder).iterdir()
    if path.is_file() and path.name != "__init__.py"
}


def test_every_file_of_the_repository_is_offered(capsys) -> None:
    offered = {file.name: file.resolve() for files in examples().values() for file in files}
    assert offered == FILES
    assert len(FILES) > 10
    assert main(["example"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(examples())
    assert all(name in "\n".join(listed) for name in FILES)
    assert all(len(line.partition(": ")[2]) > 20 for line in listed)


@pytest.mark.parametrize("name", sorted(examples()))
def test_what_is_written_can_be_used(name: str, tmp_path: Path, capsys) -> None:
    """Its data are looked for in ``data`` beside it, as the commands in its first lines put them there."""
    assert main(["example", name, "--out", str(tmp_path)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert written
    for path in written:
        text = path.read_text()
        assert "../" not in text
        assert "examples/" not in text
        if path.suffix == ".toml":
            run = load(path)
            assert run.data.train.parent == tmp_path / "data"
            assert run.network == load(FILES[path.name]).network.model_copy(update={"code": run.network.code})
        elif path.suffix == ".sbatch":
            assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        else:
            compile(text, path, "exec")


def test_names_may_be_those_of_files(tmp_path: Path) -> None:
    assert main(["example", "own_layer.py", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"own-layer.toml", "own_layer.py"}


def test_nothing_is_overwritten(tmp_path: Path, capsys) -> None:
    mine = tmp_path / "own_layer.py"
    mine.write_text("mine")
    assert main(["example", "own-layer", "--out", str(tmp_path)]) == 2
    assert "own_layer.py: exists and is not overwritten" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digit"], "did you mean 'digits'?"),
        (["xyz"], "known are array, digits, "),
        (["digits", "--out", "none"], "--out none: no such directory"),
    ],
)
def test_mistakes(words: list[str], told: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["example", *words]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
