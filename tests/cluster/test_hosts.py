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
    accuracy, settings = METHODS[method]
    assert learn(launch, scripts, hosts, place, hosts, *settings, shards="1 shard") >= accuracy


@pytest.mark.parametrize("transport", ["auto", "rma", "p2p"])
def test_learns_over_three_hosts_what_it_learns_on_one(
    launch: Launch, scripts: Path, hosts: list[str], place: Path, transport: str
) -> None:
    """One replica and two shards, each on a host of its own: nothing is asynchronous, so all must be the same."""
    settings = ["optimizer.epochs=20", "topology.shards=2", "server.overlap=none", f"server.transport={transport}"]
    three = learn(launch, scripts, hosts, place, hosts, *settings, shards="2 shards")
    assert three == learn(launch, scripts, hosts, place, [], *settings, shards="2 shards") >= 95


def learn(
    launch: Launch, scripts: Path, hosts: list[str], place: Path, spread: list[str], *settings: str, shards: str
) -> float:
    """Train on three ranks, started on the first host and spread over some or all on it; return the accuracy (%)."""
    rsh = str(scripts / "hosts-rsh")
    if is_open_mpi():
        options = ["--host", ",".join(f"{host}:1" for host in spread)]
        environment = {"PRTE_MCA_plm_ssh_agent": rsh, "OMPI_MCA_pml": "ob1"}
    else:
        options = ["-launcher", "rsh", "-launcher-exec", rsh, "-hosts", ",".join(spread), "-ppn", "1"]
        # UCX would find shared memory between these hosts.
        environment = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
    directory = place / ("run" if spread else "run-on-one")
    overrides = [f"run.directory={directory}", "monitor.evaluate_epochs=0", *settings]
    arguments = [f"--mpi-args={shlex.join(options)}"] if spread else []
    command = [sys.executable, "-m", "dbmpi", "launch", "-n", "3", *arguments, "--"]
    command += ["train", str(place / "train.toml"), *(word for text in overrides for word in ("--set", text))]

    at = [rsh, hosts[0], f"cd {shlex.quote(str(place))} && {shlex.join(command)}"]
    done = launch(None, at, 110, environment, place)

    assert done.returncode == 0, done.transcript
    assert f"3 ranks: {shards}" in done.stdout, done.transcript
    found = re.search(r"test accuracy +([\d.]+) %  \(", done.stdout)
    assert found, done.transcript
    assert list((directory / "checkpoints").glob("step-*.h5"))
    return float(found[1])
