"""A run over three hosts with TCP between them, started by `dbmpi launch` over what stands in for ssh."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from harness.environment import is_open_mpi
from harness.launching import Launch
from parallel import tiny

pytestmark = pytest.mark.timeout(150)


METHODS = {
    "downpour": ["optimizer.epochs=20", "topology.shards=2", "server.overlap=none"],
    "sandblaster": [
        "optimizer.method=sandblaster",
        "optimizer.warmstart=0",
        "optimizer.epochs=60",
        "optimizer.batch_size=100",
        "sandblaster.deterministic=true",
    ],
}
"""Settings under which nothing depends on timing: one replica and two shards, or one shard and two replicas."""


@pytest.mark.parametrize("settings", [[], ["topology.partitions=2"]], ids=["two replicas", "two partitions"])
def test_learns_over_three_hosts(
    launch: Launch, scripts: Path, hosts: list[str], place: Path, settings: list[str]
) -> None:
    accuracy, _ = learn(launch, scripts, hosts, place, hosts, "optimizer.epochs=20", *settings, shards="1 shard")
    assert accuracy >= 95


@pytest.mark.parametrize("transport", ["auto", "rma", "p2p"])
@pytest.mark.parametrize("method", METHODS)
def test_learns_over_three_hosts_what_it_learns_on_one(
    launch: Launch, scripts: Path, hosts: list[str], place: Path, method: str, transport: str
) -> None:
    settings = [*METHODS[method], f"server.transport={transport}"]
    shards = "2 shards" if method == "downpour" else "1 shard"
    accuracy, parameters = learn(launch, scripts, hosts, place, hosts, *settings, shards=shards)
    assert accuracy >= (95 if method == "downpour" else 93)
    alone, same = learn(launch, scripts, hosts, place, [], *settings, shards=shards)
    assert accuracy == alone
    np.testing.assert_array_equal(parameters, same)


def learn(
    launch: Launch, scripts: Path, hosts: list[str], place: Path, spread: list[str], *settings: str, shards: str
) -> tuple[float, np.ndarray]:
    """Train on three ranks, started on the first host, and spread or all on it; return accuracy (%) and parameters."""
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
    arguments += ["--no-fault-tolerance"] if "server.transport=rma" in settings else []
    command = [sys.executable, "-m", "dbmpi", "launch", "-n", "3", *arguments, "--"]
    command += ["train", str(place / "train.toml"), *(word for text in overrides for word in ("--set", text))]

    at = [rsh, hosts[0], f"cd {shlex.quote(str(place))} && {shlex.join(command)}"]
    done = launch(None, at, 110, environment, place)

    assert done.returncode == 0, done.transcript
    assert f"3 ranks: {shards}" in done.stdout, done.transcript
    found = re.search(r"test accuracy +([\d.]+) %  \(", done.stdout)
    assert found, done.transcript
    last = max((directory / "checkpoints").glob("step-*.h5"))
    return float(found[1]), tiny.vectors(last)["parameters"]
