"""Jobs under an MPI that lets ranks live when another one dies, and ranks that are killed at an exact moment."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from harness.environment import launcher, mpi_environment
from sabotage.sitecustomize import APART, HOLD, VARIABLE

FAULT_TOLERANCE = "--with-ft ulfm"
_SABOTAGE = Path(__file__).parents[1] / "sabotage"


def killing(kills: str, hold: Path | None = None, *, apart: bool = False) -> dict[str, str]:
    """Return the environment of a run that is disturbed like this: ``RANK:PHASE:COUNT[:SIGNAL],...``.

    With a directory for `hold`, workers of Sandblaster wait for those that are killed at one of their first portions.
    Ranks that are `apart` share no memory, as if each were on a host of its own.
    """
    more = ({HOLD: str(hold)} if hold else {}) | ({APART: "1"} if apart else {})
    return {VARIABLE: kills, "PYTHONPATH": str(_SABOTAGE)} | more


@pytest.fixture
def needs_fault_tolerance() -> None:
    """Skip the test under every other MPI."""
    version = [launcher(), "--version"]
    said = subprocess.run(version, env=mpi_environment(), capture_output=True, text=True, check=False).stdout
    found = re.search(r"Open MPI\) (\d+)", said)
    if found is None or int(found[1]) < 5:
        pytest.skip("this MPI ends all ranks when one dies: only Open MPI 5 has mpirun --with-ft ulfm")
