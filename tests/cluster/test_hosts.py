"""A run over three hosts with TCP between them, started by `dbmpi launch` over what stands in for ssh."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import harness.hosts
import numpy as np
import pytest
from harness.launching import Launch
from harness.programs import Program
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
def test_learns_over_three_hosts(launch: Launch, hosts: list[str], place: Path, settings: list[str]) -> None:
    accuracy, _ = learn(launch, hosts, place, hosts, "optimizer.epochs=20", *settings, shards="1 shard")
    assert accuracy >= 95


@pytest.mark.parametrize("transport", ["auto", "rma", "p2p"])
@pytest.mark.parametrize("method", METHODS)
def test_learns_over_three_hosts_what_it_learns_on_one(
    launch: Launch, hosts: list[str], place: Path, method: str, transport: str
) -> None:
    settings = [*METHODS[method], f"server.transport={transport}"]
    shards = "2 shards" if method == "downpour" else "1 shard"
    accuracy, parameters = learn(launch, hosts, place, hosts, *settings, shards=shards)
    assert accuracy >= (95 if method == "downpour" else 93)
    alone, same = learn(launch, hosts, place, [], *settings, shards=shards)
    assert accuracy == alone
    np.testing.assert_array_equal(parameters, same)


def learn(
    launch: Launch, hosts: list[str], place: Path, spread: list[str], *settings: str, shards: str
) -> tuple[float, np.ndarray]:
    """Train on three ranks, started on the first host, and spread or all on it; return accuracy (%) and parameters."""
    return result(launch, start(launch, hosts, place, spread, *settings), directory(place, spread), shards)


def directory(place: Path, spread: list[str]) -> Path:
    """Return that of the run, spread or on one host."""
    return place / ("run" if spread else "run-on-one")


def start(
    launch: Launch,
    hosts: list[str],
    place: Path,
    spread: list[str],
    *settings: str,
    env: dict[str, str] | None = None,
    restarts: int = 0,
) -> Program:
    """Start a run as :func:`learn` does."""
    options, environment = harness.hosts.spread(spread)
    overrides = [f"run.directory={directory(place, spread)}", "monitor.evaluate_epochs=0", *settings]
    arguments = [f"--mpi-args={shlex.join(options)}"] if spread else []
    arguments += ["--no-fault-tolerance"] if "server.transport=rma" in settings else []
    command = [sys.executable, "-m", "dbmpi", "launch", "-n", "3", *arguments, f"--restarts={restarts}", "--"]
    command += ["train", str(place / "train.toml"), *(word for text in overrides for word in ("--set", text))]
    return launch.start(None, harness.hosts.at(hosts[0], command, place), environment | (env or {}), place)


def result(launch: Launch, program: Program, run: Path, shards: str, seconds: float = 110) -> tuple[float, np.ndarray]:
    """Wait for the end of a run; return accuracy (%) and parameters."""
    done = launch.finish(program, seconds)
    assert done.returncode == 0, done.transcript
    assert f"3 ranks: {shards}" in done.stdout, done.transcript
    found = re.search(r"test accuracy +([\d.]+) %  \(", done.stdout)
    assert found, done.transcript
    last = max((run / "checkpoints").glob("step-*.h5"))
    return float(found[1]), tiny.vectors(last)["parameters"]
