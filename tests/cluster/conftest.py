"""Several hosts, and a real Slurm, on this machine: from scripts beside the project, where they are and may be used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import harness.hosts
import pytest
from cluster.slurm import Slurm, answer
from harness.environment import is_open_mpi, mpi_environment, timeout_scale
from harness.hosts import SCRIPTS

ROOT = Path(__file__).parents[2]
NODES = 3


@pytest.fixture(scope="session")
def scripts() -> Path:
    """The directory of the scripts that make hosts and a Slurm; the tests are skipped where they cannot be used."""
    if os.environ.get("DBMPI_CLUSTER_TESTS") != "1":
        pytest.skip("starts a Slurm and several hosts, which takes minutes: make test-cluster")
    if not (SCRIPTS / "slurm_up.sh").exists():
        pytest.skip(f"needs the scripts that make hosts and a Slurm in {SCRIPTS}, or where DBMPI_TEST_CLUSTER says")
    if os.geteuid() != 0:
        pytest.skip("needs root, to make virtual nodes and hosts")
    if not (Path(sys.executable).parent / "dbmpi").exists():
        pytest.skip("needs dbmpi to be installed: there is no dbmpi next to the Python")
    return SCRIPTS


@pytest.fixture(scope="session")
def slurm(scripts: Path) -> Iterator[Slurm]:
    """A Slurm with at least three nodes.  One that is up already is used and left; else one is started and stopped."""
    kind = "pmix" if is_open_mpi() else "pmi2"
    before = Slurm(kind)
    if before.is_up():
        if not before.is_a_test_cluster():
            pytest.skip("a Slurm of this machine's own is up: tests use none but one of their scripts")
        if before.nodes() < NODES or not before.has_plugin():
            pytest.skip(
                f"the Slurm that is up has fewer than {NODES} nodes or no plugin {kind}: stop it, tests start theirs"
            )
        yield before
        return
    command = ["bash", str(scripts / "slurm_up.sh")]
    try:
        started = subprocess.run(
            command,
            env=mpi_environment() | {"SLURMTEST_PMIX": str(int(kind == "pmix"))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=50 * timeout_scale(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("slurm_up.sh took too long")
    try:
        if started.returncode != 0:
            pytest.skip(f"slurm_up.sh: {started.stderr.strip().splitlines()[-1:]}")
        if not before.has_plugin():
            pytest.skip(f"the Slurm that slurm_up.sh has started has no plugin {kind}")
        yield before
    finally:
        if not answer(["squeue", "-h"]):
            subprocess.run(["bash", str(scripts / "slurm_down.sh")], capture_output=True, timeout=50, check=False)


@pytest.fixture(scope="session")
def hosts(scripts: Path) -> Iterator[list[str]]:
    """The names of three hosts."""
    with ExitStack() as stack:
        try:
            names = stack.enter_context(harness.hosts.hosts())
        except harness.hosts.NoHostsError as why:
            pytest.skip(str(why))
        yield names


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the digits and their configuration, as a user would have it."""
    pytest.importorskip("sklearn", reason="its digits are the data")
    directory = tmp_path_factory.mktemp("digits")
    subprocess.run(
        [sys.executable, "-m", "dbmpi", "data", "import", "digits", "--out", str(directory / "data")],
        env=mpi_environment(),
        capture_output=True,
        timeout=50 * timeout_scale(),
        check=True,
    )
    example = (ROOT / "examples" / "digits.toml").read_text(encoding="utf-8")
    assert "../data/" in example
    (directory / "train.toml").write_text(example.replace("../data/", "data/"), encoding="utf-8")
    return directory


@pytest.fixture
def place(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits' directory for one test."""
    shutil.copytree(digits, tmp_path / "work")
    return tmp_path / "work"
