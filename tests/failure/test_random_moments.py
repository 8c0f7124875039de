"""Deaths, stalls and numbers that go wrong at moments drawn at random: each counted exactly, twenty times.

The gradient of an objective is -1 everywhere and the rate is 1, so that every parameter of a shard is the number of
pushes applied there.  ``DBMPI_TEST_SEED`` draws other moments.
"""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest
from failure.jobs import SECONDS, Jobs, messages
from failure.survival import FAULT_TOLERANCE, killing
from failure.test_dead_downpour import BATCHES, CONFIGURATION, MINE, SIZE, losses
from harness.environment import timeout_scale
from harness.launching import Completed
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import TopologySection
from dbmpi.index.layout import cut
from dbmpi.monitor.records import read_records
from dbmpi.mpi import topology

pytestmark = pytest.mark.timeout(240)

RUNS = 20
SEED = int(os.environ.get("DBMPI_TEST_SEED", "1"))
TIMEOUT = 1.0 * timeout_scale()
"""Seconds after which a rank counts as stalled."""
OFTEN = ("compute", "fetch", "push", "post")
"""What a worker does for each batch."""
SPOILT = """
import os, time

class Spoilt(Ones):
    # The process that comes there first gives so many gradients in a row that are not finite.
    def loss_and_gradient(self, parameters, batch):
        time.sleep(0.004)
        loss, gradient = super().loss_and_gradient(parameters, batch)
        if batch.step < {first}:
            return loss, gradient
        try:
            open("spoilt", "x").close()
        except FileExistsError:
            pass
        else:
            os.environ["LEFT"] = "{number}"
        if (left := int(os.environ.get("LEFT", "0"))) == 0:
            return loss, gradient
        os.environ["LEFT"] = str(left - 1)
        return loss, {{name: np.full_like(values, np.nan) for name, values in gradient.items()}}
"""
SLOW = """
class Slow(Ones):
    def loss_and_gradient(self, parameters, batch):
        import time
        time.sleep(0.004)
        return super().loss_and_gradient(parameters, batch)
"""


def prepare(jobs: Jobs, use: str = "Ones", more: str = "") -> None:
    """Write the configuration of a run, and its objective."""
    (jobs.directory / "config.toml").write_text(CONFIGURATION.replace("mine:Ones", f"mine:{use}"))
    (jobs.directory / "mine.py").write_text(MINE + more)


def draw_run(dice: random.Random, workers: int) -> tuple[topology.Plan, list[str]]:
    """Return how a run is laid out whose server works in one way or another, and its settings."""
    shards = dice.randint(1, 2)
    ways = [
        (),
        ("server.push=copied",),
        ("server.push=copied", "server.transport=p2p"),
        ("server.overlap=threads",),
        ("server.fetch=shared",),
        ("server.consistent=true",),
    ]
    plan = topology.plan(TopologySection(shards=shards), shards + workers)
    return plan, [f"topology.shards={shards}", *dice.choice(ways)]


def assert_counts(jobs: Jobs, batches: int = BATCHES) -> None:
    """Everything is learned; each shard has applied what it says, and beyond only what is counted as repeated."""
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
        checkpoint.verify()
    assert (info.step, info.frontier, info.total, info.holes) == (batches, batches, batches, ())
    assert (sum(info.done), info.samples) == (batches, batches // 7 * tiny.SAMPLES)
    repeated = sum(record["repeated"] for record in losses(jobs))
    for held, version in zip(cut(SIZE, info.shards), info.shard_versions, strict=True):
        least, most = values[held.start : held.stop].min(), values[held.start : held.stop].max()
        assert batches <= least <= most <= batches + repeated
        assert least == version  # which counts whole pushes


def beyond(jobs: Jobs) -> list[int]:
    """Return for each shard how many updates the last checkpoint has there beyond its steps."""
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
    held = [values[part.start : part.stop] for part in cut(SIZE, info.shards)]
    assert all((part == part[0]).all() for part in held)
    return [int(part[0]) - info.step for part in held]


def assert_lost(jobs: Jobs, replica: int, share: int, takers: list[int]) -> None:
    """One replica was given up: what it had learned counts, and the rest of its share was dealt to others."""
    [loss] = losses(jobs)
    assert (loss["lost"], loss["takers"]) == (replica, takers)
    assert loss["pushes"] + loss["left"] == share
    assert 0 <= loss["repeated"] <= loss["dropped"] <= 2


def spare(jobs: Jobs, dice: random.Random) -> None:
    """A worker dies, and a spare replica takes its place."""
    prepare(jobs)
    plan, settings = draw_run(dice, 4)
    victim = dice.randrange(3)
    kills = f"{plan.worker_ranks[victim]}:{dice.choice(OFTEN)}:{dice.randint(2, 130)}"
    words = (*settings, "topology.spares=1")
    program = jobs.start(None, *words, launcher=plan.world, options=FAULT_TOLERANCE, env=killing(kills))
    done = jobs.finish(program, 60.0)
    assert done.returncode == 0, done.transcript
    assert done.stderr.count("sabotage: SIGKILL") == 1, done.transcript
    assert_lost(jobs, victim, BATCHES // 3, [3])
    assert_counts(jobs)


def replace(jobs: Jobs, dice: random.Random) -> None:
    """A rank dies, and a new process takes its place: at once for a shard, at the next checkpoint for a worker."""
    prepare(jobs, "Slow", SLOW)
    plan, settings = draw_run(dice, 2)
    victim = dice.randrange(plan.world)
    if plan.shard_of(victim) is None:
        phase, most = dice.choice([("start", 1), *((phase, 100) for phase in OFTEN)])
    else:
        phase, most = dice.choice([("start", 1), ("apply", 250), ("checkpoint", 2), ("write", 4), ("commit", 2)])
    kills = f"{victim}:{phase}:{dice.randint(1, most)}"
    words = (*settings, "topology.replacements=1")
    program = jobs.start(None, *words, launcher=plan.world, options=FAULT_TOLERANCE, env=killing(kills))
    done = jobs.finish(program, 60.0)
    assert done.returncode == 0, done.transcript
    assert done.stderr.count("sabotage: SIGKILL") == 1, done.transcript
    assert done.stderr.count("the run goes on with a new process") == 1, done.transcript
    assert "lost replicas" not in done.stdout, done.transcript
    assert len(losses(jobs)) == (plan.shard_of(victim) is None and phase != "start")
    assert_counts(jobs)


def stall(jobs: Jobs, dice: random.Random, on_stall: str, workers: int = 3) -> tuple[Completed, int, topology.Plan]:
    """Let a worker be stopped until the lead has reacted; return what became of the run, and the replica."""
    prepare(jobs, "Slow", SLOW)
    plan, settings = draw_run(dice, workers)
    victim = dice.randrange(workers)
    rank = plan.worker_ranks[victim]
    words = (*settings, f"monitor.stall_timeout={TIMEOUT:g}", f"monitor.on_stall={on_stall}")
    stops = f"{rank}:{dice.choice(OFTEN)}:{dice.randint(2, 100)}:STOP"
    program = jobs.start(plan.world, *words, env=killing(stops))
    if on_stall != "end":
        jobs.wait_for_output(program, f"rank {rank} (replica {victim}, after ", " has been silent for ")
        program.send([program.ranks()[rank]], signal.SIGCONT)
    done = jobs.finish(program, 60.0)
    assert done.stderr.count("sabotage: SIGSTOP") == 1, done.transcript
    named = f"rank {rank} (replica {victim}, after "
    assert len([line for line in done.output.splitlines() if named in line and "has been silent" in line]) == 1
    return done, victim, plan


def warn(jobs: Jobs, dice: random.Random) -> None:
    """A worker is stopped, and named; it goes on without harm."""
    done, victim, plan = stall(jobs, dice, "warn")
    assert done.returncode == 0, done.transcript
    assert f"warning: rank {plan.worker_ranks[victim]} (" in done.output, done.transcript
    assert done.output.count(" is back after ") == 1, done.transcript
    assert not losses(jobs)
    assert_counts(jobs)


def drop(jobs: Jobs, dice: random.Random) -> None:
    """A worker is stopped, and done without; it leaves when it continues."""
    done, victim, _ = stall(jobs, dice, "drop")
    assert done.returncode == 0, done.transcript
    assert_lost(jobs, victim, BATCHES // 3, [replica for replica in range(3) if replica != victim])
    assert_counts(jobs)


def end(jobs: Jobs, dice: random.Random) -> None:
    """A worker is stopped, and the run ends soon; it resumes."""
    done, victim, plan = stall(jobs, dice, "end")
    assert done.returncode == 75, done.transcript
    assert done.seconds < 2 * SECONDS * timeout_scale() + 2 * TIMEOUT, done.transcript
    [said] = [line for line in messages(done) if "has been silent" in line]
    assert f"stalled: rank {plan.worker_ranks[victim]} (replica {victim}, after " in said
    before = beyond(jobs) if (jobs.run_directory / "checkpoints" / "latest").exists() else [0] * plan.shards
    assert all(0 <= number <= 1 for number in before)  # of the push that the worker was at
    again = jobs(plan.world, f"topology.shards={plan.shards}", "checkpoint.resume=auto")
    assert again.returncode == 0, again.transcript
    with jobs.checkpoint() as checkpoint:
        assert (checkpoint.info.step, checkpoint.info.holes) == (BATCHES, ())
    assert beyond(jobs) == before


def roll_back(jobs: Jobs, dice: random.Random) -> None:
    """A replica has gradients that are not finite, and the run goes back to its last checkpoint, once or twice."""
    first, times, most = dice.randint(1, 300), dice.randint(1, 2), dice.randint(0, 3)
    prepare(jobs, "Spoilt", SPOILT.format(first=first, number=times * (most + 1)))
    plan, settings = draw_run(dice, dice.randint(1, 3))
    words = (*settings, "optimizer.roll_back=0.5", f"optimizer.most_withheld={most}", "checkpoint.keep=1000")
    done = jobs.finish(jobs.start(plan.world, *words), 60.0)
    assert done.returncode == 0, done.transcript
    rates = [line.rpartition(" ")[2] for line in messages(done) if ": back to " in line]
    assert rates == ["0.5", "0.25"][:times], done.transcript
    found = [int(number.replace(",", "")) for number in re.findall(r"going on after ([\d,]+) steps", done.stdout)]
    starts = [0] * (times - len(found)) + found
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
    assert (info.step, info.holes) == (BATCHES, ())
    expected, steps, version = 0.0, BATCHES, info.shard_versions[0]
    assert {*info.shard_versions} == {version}
    for session in range(times, 0, -1):
        start = starts[session - 1]
        before = version_at(jobs, start)
        withheld = (steps - start) - (version - before)  # some of what is withheld may be before a checkpoint
        assert 0 <= withheld <= (0 if session == times else most)
        expected += 0.5**session * (version - before)
        steps, version = start, before
    assert (values == expected + version).all(), done.transcript


def mirror(jobs: Jobs, dice: random.Random) -> None:
    """A shard dies, and a new process goes on with its mirror: what it has lost is counted, and bounded."""
    prepare(jobs, "Slow", SLOW)
    shards, workers, every = dice.randint(2, 4), dice.randint(1, 3), dice.choice([1, 4, 12, 60])
    plan = topology.plan(TopologySection(shards=shards), shards + workers)
    _, (_, *way) = draw_run(dice, workers)
    dead = dice.randrange(1, shards)
    words = (f"topology.shards={shards}", *way, f"server.mirror={every}", "topology.replacements=1")
    kills = f"{plan.shard_ranks[dead]}:apply:{dice.randint(1, 300)}"
    often = ("checkpoint.every_seconds=1000",)
    program = jobs.start(None, *words, *often, launcher=plan.world, options=FAULT_TOLERANCE, env=killing(kills))
    done = jobs.finish(program, 60.0)
    assert done.returncode == 0, done.transcript
    assert done.stderr.count("sabotage: SIGKILL") == 1, done.transcript
    found = [record for record in read_records(jobs.run_directory) if record["kind"] == "rescue"]
    if not found:  # the run begins again
        assert "before its first mirror was whole" in done.output, done.transcript
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
        checkpoint.verify()
    assert (info.step, info.frontier, info.total, info.holes) == (BATCHES, BATCHES, BATCHES, ())
    lost, repeated = sum(record["updates"] for record in found), sum(record["repeated"] for record in found)
    assert 0 <= lost <= every + workers
    for shard, held in enumerate(cut(SIZE, shards)):
        least, most = values[held.start : held.stop].min(), values[held.start : held.stop].max()
        expected = BATCHES - (lost if shard == dead else 0)
        assert expected <= least <= most <= expected + repeated


def version_at(jobs: Jobs, step: int) -> int:
    """Return the version of all shards in the checkpoint of a step, which has applied all but what was withheld."""
    if not step:
        return 0
    with Checkpoint.open(jobs.run_directory / "checkpoints" / f"step-{step:09}.h5") as checkpoint:
        [version] = {*checkpoint.info.shard_versions}
    return version


CASES: tuple[Callable[[Jobs, random.Random], None], ...] = (spare, replace, warn, drop, end, roll_back, mirror)
NEED_FAULT_TOLERANCE = (spare, replace, mirror)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("seed", range(SEED, SEED + RUNS))
def test_everything_counts_once(jobs: Jobs, request: pytest.FixtureRequest, case: Any, seed: int) -> None:
    if case in NEED_FAULT_TOLERANCE:
        request.getfixturevalue("needs_fault_tolerance")
    case(jobs, random.Random(f"{case.__name__} {seed}"))
