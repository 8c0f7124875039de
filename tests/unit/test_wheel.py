"""A wheel of the project in an environment of its own: what a user without the repository has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from harness.environment import plain_environment, timeout_scale

import dbmpi

PROJECT = Path(__file__).parents[2]


def run(*words: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=plain_environment() | variables,
        capture_output=True,
        text=True,
        timeout=100 * timeout_scale(),
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment in which there is only the wheel."""
    if shutil.which("git") is None or not (PROJECT / ".git").exists():
        pytest.skip("not a Git work tree: nothing says which files belong to the project")
    here = tmp_path_factory.mktemp("wheel")
    assert run(sys.executable, "-m", "venv", here / "venv").returncode == 0
    pip = (here / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet")
    if run(*pip, "download", "--no-deps", "--dest", here, "setuptools>=77").returncode != 0:
        pytest.skip("no package index: setuptools, which builds the wheel, cannot be downloaded")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=PROJECT).stdout.split("\0")
    for name in filter(None, listed):
        if os.path.lexists(PROJECT / name):
            (here / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, here / "copy" / name, follow_symlinks=False)
    done = run(*pip, "wheel", "--no-deps", "--wheel-dir", here, here / "copy")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(here / "copy")
    (wheel,) = here.glob("dbmpi-*.whl")
    done = run(*pip, "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    return here / "venv" / "bin"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_line_and_its_examples(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "dbmpi", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"dbmpi {dbmpi.__version__}\n"), done.stderr
    for name in ("digits", "own-layer", "train"):
        done = run(installed / "dbmpi", "example", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {"digits.toml", "own-layer.toml", "own_layer.py", "train.sbatch"} == {p.name for p in tmp_path.iterdir()}
    sources = (PROJECT / "jobs" / "slurm" / "train.sbatch", PROJECT / "examples" / "own_layer.py")
    for source in sources:
        assert (tmp_path / source.name).read_text() == source.read_text().replace(" examples/", " ")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_is_a_typed_package_of_its_own(installed: Path, tmp_path: Path) -> None:
    """The libraries that it needs are those of this environment."""
    program = (
        "import dbmpi, importlib.metadata, importlib.resources\n"
        "assert importlib.resources.files('dbmpi').joinpath('py.typed').is_file()\n"
        "print(dbmpi.__file__)\n"
        "described = importlib.metadata.metadata('dbmpi')\n"
        "print(described['License-Expression'], 'impi' in described.get_all('Provides-Extra'))\n"
        "print(dbmpi.load('digits.toml').optimizer.method)\n"
    )
    assert run(installed / "dbmpi", "example", "digits", cwd=tmp_path).returncode == 0
    libraries = sysconfig.get_path("purelib")
    done = run(installed / "python", "-c", program, cwd=tmp_path, PYTHONPATH=libraries)
    assert done.returncode == 0, done.stderr
    where, *others = done.stdout.splitlines()
    assert Path(where).is_relative_to(installed.parent)
    assert others[1:] == ["downpour"]
