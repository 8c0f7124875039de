"""A run over three hosts with TCP between them, started by `dbmpi launch` over what stands in for ssh."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from harness.environment import is_open_mpi
from harness.launching import Launch

pytestmark = pytest.mark.timeout(150)


METHODS = {
    "downpour": (95, ["optimizer.epochs=20"]),
    "sandblaster": (
        93,
        ["optimizer.method=sandblaster", "optimizer.warmstart=0", "optimizer.epochs=60", "optimizer.batch_size=100"],
    ),
}
"""The accuracy (%) that is expected, and settings."""


@pytest.mark.parametrize("method", METHODS)
def test_learns_over_three_hosts(launch: Launch, scripts: Path, hosts: list[str], place: Path, method: str) -> None:
    rsh = str(scripts / "hosts-rsh")
    if is_open_mpi():
        options = ["--host", ",".join(f"{host}:1" for host in hosts)]
        settings = {"PRTE_MCA_plm_ssh_agent": rsh, "OMPI_MCA_pml": "ob1"}
    else:
        options = ["-launcher", "rsh", "-launcher-exec", rsh, "-hosts", ",".join(hosts), "-ppn", "1"]
        # UCX would find shared memory between these hosts.
        settings = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
    directory = place / "run"
    accuracy, settings_of_method = METHODS[method]
    overrides = [f"run.directory={directory}", "monitor.evaluate_epochs=0", *settings_of_method]
    command = [sys.executable, "-m", "dbmpi", "launch", "-n", "3", "--mpi-args", shlex.join(options), "--"]
    command += ["train", str(place / "train.toml"), *(word for text in overrides for word in ("--set", text))]

    done = launch(None, [rsh, hosts[0], f"cd {shlex.quote(str(place))} && {shlex.join(command)}"], 110, settings, place)

    assert done.returncode == 0, done.transcript
    assert "3 ranks: 1 shard" in done.stdout, done.transcript
    found = re.search(r"test accuracy +([\d.]+) %  \(", done.stdout)
    assert found, done.transcript
    assert float(found[1]) >= accuracy, done.transcript
    assert list((directory / "checkpoints").glob("step-*.h5"))
