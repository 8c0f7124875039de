"""jobs/slurm/train.sbatch as a text: it needs no Slurm to be wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "jobs" / "slurm" / "train.sbatch"
DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)=(\S+)$")
SHAPES = {
    "job-name": r"[\w.-]+",
    "nodes": r"[1-9]\d*",
    "ntasks-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*",
    "time": r"(\d+-)?\d\d:\d\d:\d\d",
    "output": r".*%x.*",
    "open-mode": "append",
    "dependency": "singleton",
    "signal": r"B:USR2@[1-9]\d*",
}
"""Every directive of the script, and the form that its value must have."""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return SCRIPT.read_text(encoding="utf-8").splitlines()


def directives(lines: list[str]) -> dict[str, str]:
    matches = [DIRECTIVE.match(line) for line in lines if line.startswith("#SBATCH")]
    assert all(matches), "a directive that Slurm would not understand, or with a remark behind it"
    return {match[1]: match[2] for match in matches if match}


def test_directives_are_those_that_were_meant(lines) -> None:
    found = directives(lines)
    assert set(found) == set(SHAPES)
    for name, value in found.items():
        assert re.fullmatch(SHAPES[name], value), f"--{name}={value}"


def test_directives_stand_where_slurm_looks_for_them(lines) -> None:
    """Slurm stops at the first command."""
    assert lines[0] == "#!/bin/bash"
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    last_directive = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last_directive < first_command


def test_the_warning_comes_to_the_shell_that_passes_it_on(lines) -> None:
    """USR2, since srun ends its step at TERM, and Open MPI's mpirun leaves its ranks no time after it."""
    assert directives(lines)["signal"].startswith("B:USR2@")
    (trap,) = [line for line in lines if line.startswith("trap ")]
    assert trap == """trap 'kill -USR2 "$ranks"' USR2 TERM"""


def test_all_that_is_to_be_edited_stands_above_the_line(lines) -> None:
    rule = next(number for number, line in enumerate(lines) if re.fullmatch(r"# -{50,}", line))
    assert lines[rule + 1] == "set -euo pipefail"
    above = [line.partition("=")[0] for line in lines[:rule] if re.match(r"[a-z]+=", line)]
    assert above == ["configuration", "activate", "plugin"]


def test_bash_understands_the_script() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr


def test_shellcheck_has_nothing_to_say() -> None:
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([found, str(SCRIPT)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout
