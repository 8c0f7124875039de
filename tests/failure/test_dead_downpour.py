"""Replicas of Downpour that are killed at an exact moment: the others go on, and each update counts once.

The gradient of an objective is -1 everywhere and the rate is 1, so that every parameter of a shard is the number of
pushes applied there.
"""

from __future__ import annotations

from typing import Any

import pytest
from failure.jobs import SECONDS, Jobs, messages
from failure.survival import FAULT_TOLERANCE, killing
from harness.environment import timeout_scale
from harness.launching import Completed
from parallel import tiny

from dbmpi.index.layout import cut
from dbmpi.monitor.records import Record, read_records

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("needs_fault_tolerance")]

CONFIGURATION = """
[run]
directory = "run"
[data]
train = "train.h5"
test = "test.h5"
[objective]
use = "mine:Ones"
[optimizer]
rule = "sgd"
learning_rate = 1.0
batch_size = 6
epochs = 60
[checkpoint]
every_seconds = 0.1
[monitor]
report_seconds = 0.05
evaluate_epochs = 7
progress = "lines"
"""
MINE = """
import numpy as np

class Ones:
    parameters = {"weights": np.zeros((6, 3)), "biases": np.zeros(5)}

    def __init__(self):
        self.state = {"seen": np.zeros(1)}

    def loss_and_gradient(self, parameters, batch):
        self.state["seen"] += len(batch.inputs)
        return 1.0, {name: -np.ones_like(values) for name, values in parameters.items()}
"""
SIZE = 6 * 3 + 5
BATCHES = -(-tiny.SAMPLES // 6) * 60


def run(jobs: Jobs, kills: str, *settings: str, ranks: int = 4) -> Completed:
    """Run to the end with a death or some; where the wire rounds, as if each rank were on a host of its own."""
    env = killing(kills, apart=ROUNDED in settings)
    program = jobs.start(None, *settings, launcher=ranks, options=FAULT_TOLERANCE, env=env)
    return jobs.finish(program, 60.0)


def losses(jobs: Jobs) -> list[Record]:
    """Return the records of replicas that were given up."""
    return [record for record in read_records(jobs.run_directory) if record["kind"] == "loss"]


def assert_each_update_counts_once(jobs: Jobs, shards: int, withheld: int = 0) -> None:
    """Everything is learned; each shard has applied what it says, and once more only what is counted as repeated.

    So many batches are `withheld`, whichever replica learns them.
    """
    with jobs.checkpoint() as checkpoint:
        info, values = checkpoint.info, checkpoint.parameters()
        checkpoint.verify()
    assert (info.step, info.frontier, info.total, info.holes) == (BATCHES, BATCHES, BATCHES, ())
    assert sum(info.done) == BATCHES
    assert info.samples == 60 * tiny.SAMPLES
    repeated = sum(record["repeated"] for record in losses(jobs))
    versions: dict[int, Any] = {
        record["number"]: record["version"] for record in read_records(jobs.run_directory) if record["kind"] == "shard"
    }
    for shard, held in enumerate(cut(SIZE, shards)):
        least, most = values[held.start : held.stop].min(), values[held.start : held.stop].max()
        assert BATCHES - withheld <= least <= most <= BATCHES - withheld + repeated
        assert least == versions[shard]  # which counts whole pushes


ROUNDED = "server.wire=bfloat16"
KILLS: list[tuple[str, tuple[str, ...]]] = [
    ("1:compute:30,2:post:60", ("topology.shards=1",)),
    ("3:post:41,4:deal:1", ("topology.shards=2", "server.push=copied", "server.transport=p2p")),
    ("2:push:20", ("topology.shards=1", "server.overlap=threads")),
    ("2:fetch:11,3:fetch:25", ("topology.shards=1",)),
    ("1:evaluate:1", ("topology.shards=1", "monitor.evaluate_epochs=0")),
    ("1:evaluate:2", ("topology.shards=1",)),
    ("2:end:1", ("topology.shards=1",)),
    ("1:compute:20", ("topology.shards=1", "optimizer.warmstart=40")),
    ("2:step:1", ("topology.shards=1", "optimizer.warmstart=40")),
    ("1:compute:20", ("topology.shards=1", "optimizer.warmstart_loss=1.0", "optimizer.release_samples=300")),
    ("1:compute:110", ("topology.shards=1", "optimizer.warmstart_loss=1.0", "optimizer.release_samples=300")),
    ("2:step:1", ("topology.shards=1", "optimizer.warmstart_loss=1.0", "optimizer.release_samples=300")),
    ("1:compute:30", ("topology.shards=1", "optimizer.warmstart_samples=120", "optimizer.release_samples=600")),
    ("2:compute:5", ("topology.shards=1", "optimizer.warmstart_samples=120", "optimizer.release_samples=600")),
    ("2:compute:15,1:compute:60", ("topology.shards=1", "topology.spares=1")),
    ("3:rest:1", ("topology.shards=1",)),
    ("2:compute:9,3:deal:1", ("topology.shards=1",)),
    ("1:compute:9,2:deal:1", ("topology.shards=1",)),
    ("2:compute:25", ("topology.shards=1", "server.fetch=shared")),
    ("3:post:31", ("topology.shards=2", "server.consistent=true")),
    ("3:post:30", ("topology.shards=2", "server.overlap=threads", "checkpoint.layout='single'")),
    ("3:post:30", ("topology.shards=3",)),
    ("3:post:41,4:rest:1", ("topology.shards=2", ROUNDED)),
    ("2:post:60,3:fetch:25", ("topology.shards=1", ROUNDED, "server.overlap=threads")),
    ("3:post:31", ("topology.shards=2", ROUNDED, "server.consistent=true")),
]


@pytest.mark.parametrize(("kills", "settings"), KILLS, ids=[" ".join((kills, *words)) for kills, words in KILLS])
def test_others_go_on_and_each_update_counts_once(jobs: Jobs, kills: str, settings: tuple[str, ...]) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    shards = int(settings[0][-1])
    done = run(jobs, kills, *settings, ranks=3 + shards)
    assert done.returncode == 0, done.transcript
    deaths = 1 + kills.count(",")
    assert done.stderr.count("sabotage: SIGKILL") == deaths, done.transcript
    if ":end:" not in kills:  # where the run is over for the lead, it need not notice
        assert len(losses(jobs)) == deaths, done.transcript
        assert done.stdout.count(", and with it replica ") == deaths, done.transcript
    assert_each_update_counts_once(jobs, shards)


@pytest.mark.slow
@pytest.mark.parametrize("kills", ["1:post:60,3:compute:31", "3:post:41", "1:compute:20"])
@pytest.mark.parametrize("settings", [(), ("server.push=copied", "server.consistent=true")], ids=["in place", "copied"])
def test_pushes_that_are_withheld_are_settled_too(jobs: Jobs, kills: str, settings: tuple[str, ...]) -> None:
    """A third of the batches; some of them are the last ones before a death, and the first ones of others after it."""
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    bad = "1.0 if batch.step % 3 or batch.step % 5 == 0 else np.nan"
    (jobs.directory / "mine.py").write_text(MINE.replace("return 1.0", f"return {bad}"))
    words = ("topology.shards=2", "optimizer.most_withheld=100", *settings)
    done = run(jobs, kills, *words, ranks=5)
    assert done.returncode == 0, done.transcript
    assert done.stdout.count(", and with it replica ") == 1 + kills.count(","), done.transcript
    assert_each_update_counts_once(jobs, 2, withheld=sum(step % 3 == 0 and step % 5 > 0 for step in range(BATCHES)))


@pytest.mark.slow
@pytest.mark.parametrize("kills", ["3:exchange:30", "4:compute:12", "3:step:15"])
def test_a_replica_of_two_partitions_is_lost_with_one_of_them(jobs: Jobs, kills: str) -> None:
    words = ("topology.shards=1", "topology.replicas=2", "topology.partitions=2", "optimizer.epochs=40")
    done = run(jobs, kills, *words, "monitor.report_seconds=0.02", ranks=5)
    assert done.returncode == 0, done.transcript
    assert "sabotage: SIGKILL" in done.stderr, done.transcript
    [loss] = losses(jobs)
    assert (loss["lost"], loss["takers"]) == (1, [0])
    jobs.assert_whole()
    with jobs.checkpoint() as checkpoint:
        assert (checkpoint.info.step, checkpoint.info.holes) == (checkpoint.info.total, ())


@pytest.mark.slow
def test_after_the_last_replica_a_checkpoint_is_written_and_the_run_resumes(jobs: Jobs) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    words = ("checkpoint.every_seconds=600", "checkpoint.resume='auto'")
    done = run(jobs, "1:compute:30,2:compute:50", *words, ranks=3)
    assert done.returncode == 75, done.transcript
    assert done.seconds < SECONDS * timeout_scale()
    said = [line for line in messages(done) if not line.startswith("dbmpi launch:")]
    assert len(said) == 1, done.transcript
    assert "no replica is left" in said[0]
    with jobs.checkpoint() as checkpoint:
        step = checkpoint.info.step
    assert 29 <= step <= 29 + 49
    again = jobs(None, *words)
    assert again.returncode == 0, again.transcript
    assert f"going on after {step:,} steps" in again.stdout
    with jobs.checkpoint() as checkpoint:
        assert (checkpoint.info.step, checkpoint.info.holes) == (BATCHES, ())


@pytest.mark.parametrize("kills", ["0:apply:40", "2:apply:40", "2:compute:20,0:settle:1", "3:compute:20,2:settle:1"])
def test_the_death_of_a_shard_ends_the_run(jobs: Jobs, kills: str) -> None:
    (jobs.directory / "config.toml").write_text(CONFIGURATION)
    (jobs.directory / "mine.py").write_text(MINE)
    shards = 1 if "2:compute" in kills else 2
    done = run(jobs, kills, f"topology.shards={shards}", "optimizer.epochs=100000")
    assert done.returncode == 75, done.transcript
    said = [line for line in messages(done) if not line.startswith("dbmpi launch:")]
    assert len(said) == 1, done.transcript
    assert "which holds shard" in said[0]
