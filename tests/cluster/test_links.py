"""Three hosts and a link that is slow, or that fails and comes back: slower, and the same result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from cluster.test_hosts import METHODS, directory, learn, result, start
from harness.environment import timeout_scale
from harness.hosts import is_on, limit_link, mend_link, set_link
from harness.launching import Launch
from harness.programs import Program

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.errors import UserError
from dbmpi.monitor.records import read_records

pytestmark = pytest.mark.timeout(300)
DOWN, UP = 2.0, 3.0
"""Seconds."""
TIMES = 3
"""How often the link fails."""
LIMITED_FROM = {"downpour": 15, "sandblaster": 40}
"""Epochs after which the link is limited, of 20 and 60."""
SHARDS = {"downpour": "2 shards", "sandblaster": "1 shard"}


@pytest.fixture
def link(hosts: list[str]) -> Iterator[str]:
    """The last host, whose link is as before when the test is over."""
    host = hosts[-1]
    yield host
    mend_link(host)


def learned(directory: Path) -> list[tuple[float, float]]:
    """Return when workers have reported, in unix seconds, and how far they had come, in epochs."""
    with suppress(UserError):  # no records yet
        return [(record["time"], record["epoch"]) for record in read_records(directory) if record["kind"] == "worker"]
    return []


def rate(reports: list[tuple[float, float]]) -> float:
    """Return the epochs in a second, by the first and the last report."""
    return (reports[-1][1] - reports[0][1]) / (reports[-1][0] - reports[0][0])


def wait_for_epochs(program: Program, run: Path, epochs: float) -> None:
    """Wait until workers have learned so much; fail the test where the run ends before."""
    __tracebackhide__ = True

    def far() -> bool:
        return program.returncode is not None or any(epoch >= epochs for _, epoch in learned(run))

    assert program.wait_until(far, 60.0 * timeout_scale()), program.stdout + program.stderr
    assert program.returncode is None, f"it has ended: {program.returncode}\n{program.stdout}{program.stderr}"


@pytest.mark.parametrize("method", METHODS)
def test_a_link_that_becomes_slow_costs_time_alone(
    launch: Launch, hosts: list[str], place: Path, link: str, method: str
) -> None:
    settings, run = METHODS[method], directory(place, hosts)
    program = start(launch, hosts, place, hosts, *settings)
    wait_for_epochs(program, run, LIMITED_FROM[method])
    limit_link(link)
    limited = time.time()
    accuracy, parameters = result(launch, program, run, SHARDS[method])
    reports = learned(run)
    fast = rate([report for report in reports if report[0] < limited])
    assert rate([report for report in reports if report[0] > limited + 1]) < fast / 2
    alone, same = learn(launch, hosts, place, [], *settings, shards=SHARDS[method])
    assert accuracy == alone
    np.testing.assert_array_equal(parameters, same)


@pytest.mark.parametrize("method", METHODS)
def test_a_link_that_fails_again_and_again_costs_time_alone(
    launch: Launch, hosts: list[str], place: Path, link: str, method: str
) -> None:
    settings, run = METHODS[method], directory(place, hosts)
    program = start(launch, hosts, place, hosts, *settings)
    wait_for_epochs(program, run, 1)
    times = 0
    while program.returncode is None:
        times += 1
        set_link(link, "down")
        program.wait_until(lambda: False, DOWN)
        set_link(link, "up")
        program.wait_until(lambda: program.returncode is not None, UP)
    accuracy, parameters = result(launch, program, run, SHARDS[method])
    assert times >= TIMES
    alone, same = learn(launch, hosts, place, [], *settings, shards=SHARDS[method])
    assert accuracy == alone
    np.testing.assert_array_equal(parameters, same)


def test_a_host_that_is_cut_off_is_done_without(launch: Launch, hosts: list[str], place: Path, link: str) -> None:
    """The others learn everything, and then nothing waits for the host; nor do its ranks wait for anything."""
    run, stall = directory(place, hosts), 8 * timeout_scale()
    settings = (f"monitor.stall_timeout={stall:g}", "monitor.on_stall=drop", "topology.shards=1", "optimizer.epochs=40")
    env = {"DBMPI_STALL_SECONDS": f"{3 * stall:g}"}
    program = start(launch, hosts, place, hosts, *settings, env=env)
    wait_for_epochs(program, run, 1)
    set_link(link, "down")

    def none_is_left() -> bool:
        near = [pid for pid in program.processes() if not is_on(pid, link)]
        return program.returncode is not None and not near and not program.ranks()

    assert program.wait_until(none_is_left, 130 * timeout_scale()), program.stdout + program.stderr
    mend_link(link)
    done = launch.finish(program, 10)
    assert not done.left, done.transcript
    assert done.returncode == 75, done.transcript
    assert "and with it replica 1: the run goes on with 1 of 2 replicas" in done.stdout, done.transcript
    assert "everything is learned and in the last checkpoint, but rank 2 (replica 1" in done.stderr, done.transcript
    with Checkpoint.open(run) as checkpoint:
        assert (checkpoint.info.frontier, checkpoint.info.holes) == (checkpoint.info.total, ())


def test_a_run_whose_shard_is_cut_off_starts_again_on_the_other_hosts(
    launch: Launch, hosts: list[str], place: Path
) -> None:
    """Each host has a rank that is worker and shard, or worker alone."""
    run, stall, cut = directory(place, hosts), 8 * timeout_scale(), hosts[1]
    settings = ("topology.colocate=true", "topology.shards=2", "optimizer.epochs=40", "checkpoint.every_seconds=0.5")
    program = start(launch, hosts, place, hosts, *settings, env={"DBMPI_STALL_SECONDS": f"{stall:g}"}, restarts=1)
    try:
        wait_for_epochs(program, run, 5)
        set_link(cut, "down")

        def is_over() -> bool:
            return program.returncode is not None

        assert program.wait_until(is_over, 200 * timeout_scale()), program.stdout + program.stderr
        assert program.returncode == 0, program.stdout + program.stderr
    finally:
        mend_link(cut)
    done = launch.finish(program, 60)
    assert "stalled: nothing moved" in done.stderr, done.transcript
    assert "does not answer; started again" in done.stderr, done.transcript
    assert "3 ranks: 2 shards" in done.stdout, done.transcript
    assert "2 ranks: 2 shards" in done.stdout, done.transcript
    with Checkpoint.open(run) as checkpoint:
        assert (checkpoint.info.frontier, checkpoint.info.holes) == (checkpoint.info.total, ())
