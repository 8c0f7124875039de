"""The pages on kinds of sites, typed from a clone as by a new user: installation, data, a job that resumes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cluster.conftest import ROOT
from cluster.slurm import Slurm, answer
from harness.environment import is_open_mpi, plain_environment, timeout_scale
from unit.documentation import blocks


def typed(page: str) -> str:
    """Return all that is typed on a page, for one shell."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return "\n".join(block.code for block in blocks(text) if block.label == "on a cluster")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The project's files, as in a new clone."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if os.path.lexists(ROOT / name):
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "clone" / name, follow_symlinks=False)
    return tmp_path / "clone"


@pytest.mark.timeout(900)
def test_a_page_leads_from_a_clone_to_a_job_that_resumes(slurm: Slurm, clone: Path, record_property) -> None:
    page = "slurm-openmpi" if is_open_mpi() else "slurm-mpich"
    began = time.monotonic()
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", typed(page)],
            cwd=clone,
            env=plain_environment() | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600 * timeout_scale(),
            check=False,
        )
    finally:
        answer(["scancel", "--name=digits"])
    seconds = time.monotonic() - began
    record_property("seconds", seconds)
    print(f"{page}: typed from a clone to the end of a job that has resumed in {seconds:.0f} s")
    log = clone / "digits.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    assert "requeued 1 times" in log.read_text()
    assert "  complete" in done.stdout
    assert "2 (resumed)" in done.stdout


@pytest.mark.timeout(900)
def test_a_container_is_built_and_used_on_one_node_and_on_several(slurm: Slurm, clone: Path) -> None:
    if is_open_mpi():
        pytest.skip("the container has MPICH: the session with MPICH tries it")
    stand_in = clone / "bin" / "apptainer"
    stand_in.parent.mkdir()
    shutil.copy(Path(__file__).with_name("apptainer.py"), stand_in)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", typed("container")],
        cwd=clone,
        env=plain_environment() | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600 * timeout_scale(),
        check=False,
    )
    for name in ("dbmpi", "dbmpi-wheel"):
        with suppress(OSError):  # where the folders were mounted
            Path("/opt", name).rmdir()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("3 ranks: 1 shard on separate ranks, 2 replicas") == 2
    assert len(re.findall(r"test accuracy  [\d.]+ %  \(", done.stdout)) == 2
    assert "runs/digits  complete" in done.stdout
