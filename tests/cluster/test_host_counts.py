"""Runs that are trained, evaluated and gone on with on different numbers of hosts, and hosts that cannot be used."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import harness.hosts
import numpy as np
import pytest
from harness.environment import is_open_mpi
from harness.launching import Completed, Launch
from parallel import tiny

pytestmark = pytest.mark.timeout(300)
ONE_REPLICA = ("topology.replicas=1", "monitor.evaluate_epochs=0")
"""Nothing depends on timing, however many shards there are."""


def job(
    launch: Launch,
    hosts: list[str],
    place: Path,
    ranks: int,
    *words: str,
    slots: int = 1,
    options: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
) -> Completed:
    """Run a command of dbmpi on so many ranks of these hosts, started on the first one."""
    more, environment = harness.hosts.spread(hosts, slots)
    more += options
    command = [
        sys.executable,
        "-m",
        "dbmpi",
        "launch",
        "-n",
        str(ranks),
        f"--mpi-args={shlex.join(more)}",
        "--",
        *words,
    ]
    argv = harness.hosts.at(hosts[0], command, place)
    return launch.finish(launch.start(None, argv, environment | (env or {}), place), 110)


def train(launch: Launch, hosts: list[str], place: Path, ranks: int, directory: str, epochs: int) -> Completed:
    """Train, from the last checkpoint if there is one."""
    overrides = [
        *ONE_REPLICA,
        f"topology.shards={ranks - 1}",
        f"run.directory={directory}",
        f"optimizer.epochs={epochs}",
        "checkpoint.resume=auto",
    ]
    words = [word for text in overrides for word in ("--set", text)]
    done = job(launch, hosts, place, ranks, "train", "train.toml", *words)
    assert done.returncode == 0, done.transcript
    return done


def parameters(run: Path) -> np.ndarray:
    """Return those of the last checkpoint."""
    return tiny.vectors(max((run / "checkpoints").glob("step-*.h5")))["parameters"]


def test_a_run_goes_on_and_is_evaluated_on_other_numbers_of_hosts(
    launch: Launch, hosts: list[str], place: Path
) -> None:
    """Three hosts, two, one and three again, with as many shards as are left: what one process learns at one go."""
    for number, (count, ranks) in enumerate(((3, 3), (2, 2), (1, 2), (3, 3))):
        done = train(launch, hosts[:count], place, ranks, "run", 2 * (number + 1))
        assert f"{ranks} ranks: {ranks - 1} shard" in done.stdout, done.transcript
        assert ("going on after" in done.stdout) == (number > 0), done.transcript
        told = re.search(r"test accuracy +[\d.]+ %  \((\d+) of (\d+)\)", done.stdout)
        assert told is not None, done.transcript
        for few in (3, 1) if number == 1 else ():
            found = job(launch, hosts[:few], place, few, "evaluate", "run", "--data", "data/digits-test.h5")
            assert found.returncode == 0, found.transcript
            assert f"{told[1]} of {told[2]}" in found.stdout, found.transcript
    train(launch, hosts[:1], place, 2, "alone", 8)
    # A start chooses the faster one of several products, which round differently.
    np.testing.assert_allclose(parameters(place / "run"), parameters(place / "alone"), atol=1e-4)


def test_ranks_that_are_dealt_to_the_hosts_in_turn_are_put_together(
    launch: Launch, hosts: list[str], place: Path
) -> None:
    settings = ("topology.shards=2", "topology.replicas=2", "topology.partitions=2", "optimizer.epochs=3")
    words = [word for text in (*settings, "run.directory=run") for word in ("--set", text)]
    # Hydra begins at the first host again when each has its rank.
    options = ("--map-by", "node") if is_open_mpi() else ()
    done = job(
        launch, hosts[:2], place, 6, "train", "train.toml", *words, slots=3 if is_open_mpi() else 1, options=options
    )
    assert done.returncode == 0, done.transcript
    assert f"{hosts[0]} (ranks 0, 2, 4): shard 0, replica 0" in done.stdout, done.transcript
    assert f"{hosts[1]} (ranks 1, 3, 5): shard 1, replica 1" in done.stdout, done.transcript
    found = job(launch, hosts, place, 3, "doctor", "--map", "train.toml")
    assert found.returncode == 0, found.transcript
    assert f"{hosts[0]} (rank 0): shard 0" in found.stdout
    assert f"{hosts[2]} (rank 2): replica 1" in found.stdout


def test_hosts_that_do_not_reach_each_other_are_named(launch: Launch, hosts: list[str], place: Path) -> None:
    if not is_open_mpi():
        pytest.skip("MPICH connects all ranks in MPI_Init, and waits there")
    with harness.hosts.cut_between(hosts[1], hosts[2]):
        done = job(launch, hosts, place, 3, "train", "train.toml", env={"DBMPI_STALL_SECONDS": "60"})
    assert done.returncode == 2, done.transcript
    assert f"rank 1 on {hosts[1]} hears nothing from rank 2 on {hosts[2]}" in done.stderr, done.transcript
    assert "Open all ports between them" in done.stderr
    assert not (place / "runs").exists()
