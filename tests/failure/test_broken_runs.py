"""Runs that break in the middle: the whole job ends by itself, soon, with a reason, and keeps its last checkpoint."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import h5py
import numpy as np
import pytest
from failure.jobs import FOR_EVER, LIMIT, SECONDS, STALL, Jobs, messages
from failure.survival import FAULT_TOLERANCE
from harness.environment import command, mpi_environment, timeout_scale
from harness.launching import Completed
from parallel import tiny

OFTEN = "checkpoint.every_seconds=0.1"
ALWAYS = f"optimizer.epochs={FOR_EVER}"


def assert_failed(done: Completed, *patterns: str, code: int = 1) -> None:
    """The job has ended as one that cannot go on."""
    assert done.returncode == code, done.transcript
    assert done.seconds < 2 * SECONDS * timeout_scale(), done.transcript
    for pattern in patterns:
        assert any(re.search(pattern, line) for line in messages(done)), done.transcript


# What one rank finds out


@pytest.mark.parametrize("n", [None, 3])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(trained: Jobs, n: int | None) -> None:
    with trained.checkpoint() as checkpoint:
        before = checkpoint.info
    kept = re.escape(f"step-{before.step:09d}.h5")
    hot = ["optimizer.rule=sgd", "optimizer.learning_rate=1e30", "network.layers.0.activation=linear"]
    done = trained(n, "optimizer.epochs=4", *hot)
    assert_failed(done, rf"the loss is (nan|inf) at step .*{kept}.*lower optimizer.learning_rate \(1e\+30\)")
    assert "Traceback" not in done.output, done.transcript
    with trained.checkpoint() as checkpoint:
        assert np.isfinite(checkpoint.parameters()).all()
    trained.assert_resumes()


@pytest.mark.parametrize("n", [None, 2])
def test_test_data_that_overflow_end_a_run_as_a_failure_with_its_checkpoint(jobs: Jobs, n: int | None) -> None:
    with h5py.File(jobs.directory / "test.h5", "r+") as file:
        file["inputs"][::4] = 3e38
    layers = ["network.layers.0.activation=linear", "network.layers.0.initial_scale=100.0"]
    done = jobs(n, *layers, "optimizer.learning_rate=1e-6")
    assert_failed(done)
    assert "warning: some outputs for the test data are NaN or infinite" in done.output, done.transcript
    assert "test accuracy" in done.output, done.transcript
    with jobs.checkpoint() as checkpoint:
        assert checkpoint.info.frontier == checkpoint.info.total


@pytest.mark.parametrize("n", [None, 3])
def test_memory_that_is_not_there_ends_a_run_with_a_sentence(jobs: Jobs, n: int | None) -> None:
    (jobs.directory / "greedy.py").write_text(
        "import sys, numpy\n"
        "from dbmpi.data.source import Source\n"
        "Source.batch = lambda self, indices: numpy.empty(2**55)\n"
        "from dbmpi.cli.main import main\n"
        "sys.exit(main(['train', 'config.toml']))\n"
    )
    done = jobs.launch(n, [sys.executable, "greedy.py"], cwd=jobs.directory)
    assert_failed(done, r"out of memory: Unable to allocate 256. PiB .* are available here")
    assert "Traceback" not in done.output, done.transcript


def test_parameters_that_are_not_finite_never_replace_a_checkpoint(trained: Jobs) -> None:
    """The last step overflows: no loss is computed any more that would show it."""
    with trained.checkpoint() as checkpoint:
        before = checkpoint.info
    targets = np.full((1, 3), 1e30, np.float32)
    tiny.write_file(trained.directory / "huge.h5", np.ones((1, tiny.FEATURES)), targets, classes=None)
    done = trained(
        2,
        "run.directory=huge",
        "data.train=huge.h5",
        "data.test=huge.h5",
        "network.loss=squared",
        "optimizer.rule=sgd",
        "optimizer.learning_rate=1e20",
        "optimizer.epochs=1",
    )
    assert_failed(done, "after 1 steps some parameters are NaN or infinite.*there is no earlier checkpoint")
    assert list((trained.directory / "huge" / "checkpoints").iterdir()) == []
    with trained.checkpoint() as checkpoint:
        assert checkpoint.info == before


BATCH_METHOD = [
    "optimizer.method=sandblaster",
    "sandblaster.algorithm=gradient_descent",
    "sandblaster.gtol=0",
    "sandblaster.ftol=0",
]
ENDLESS = [*BATCH_METHOD, "sandblaster.l2=0.01", "sandblaster.batch_portions=3", "sandblaster.batch_iterations=1"]
"""It does not come to a minimum: each iteration is on other samples.  So every worker gets its portions in the end."""


@pytest.mark.parametrize("method", [[], [*BATCH_METHOD, "sandblaster.batch_portions=100"]], ids=["downpour", "batches"])
def test_data_that_vanish_while_training_end_the_job(jobs: Jobs, method: list[str]) -> None:
    """Read batch by batch, from a file that somebody cuts off; found by a worker alone, in the middle of a step."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60_000, tiny.FEATURES))
    tiny.write_file(jobs.directory / "train.h5", inputs, rng.integers(0, tiny.CLASSES, len(inputs)))
    program = jobs.start(3, "data.memory_mib=1", ALWAYS, *method)
    jobs.wait_until_all_learn(program, 2)
    if method:
        jobs.wait_for_passes(program, 10)
    os.truncate(jobs.directory / "train.h5", 10_000)
    done = jobs.finish(program)
    assert_failed(done, "train.h5: has become shorter while it was read", code=2)
    assert "Traceback" not in done.output, done.transcript
    with jobs.checkpoint() as checkpoint:
        assert checkpoint.info.step > 0


SABOTAGE = """
import importlib, os, signal, sys


def sabotage(kind, module, owner, name, count):
    owner, count = getattr(importlib.import_module(module), owner), int(count)
    method = getattr(owner, name)

    def broken(*arguments, **named):
        nonlocal count
        count -= 1
        if count < 0 and kind == "raise":
            raise ZeroDivisionError("sabotage")
        if count < 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return method(*arguments, **named)

    setattr(owner, name, broken)


command = sys.argv.index("train")
for kind, rank, *target in zip(*[iter(sys.argv[1:command])] * 6):
    if rank == os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")):
        sabotage(kind, *target)
from dbmpi.cli.main import main

sys.exit(main(sys.argv[command:]))
"""


def sabotaged(
    jobs: Jobs,
    kind: str,
    rank: int,
    target: str,
    *settings: str,
    env: dict[str, str] | None = None,
    also: str = "",
    options: str = "",
) -> Completed:
    """Run to the end with three ranks, one of which raises, or halts, at its n-th call of a method.

    `also` is another one: kind, rank and target; `options` are further ones of the launcher.
    """
    (jobs.directory / "sabotage.py").write_text(SABOTAGE)
    words = [word for setting in settings for word in ("--set", setting)]
    ways = [kind, str(rank), *target.split(), *also.split()]
    argv = [sys.executable, "sabotage.py", *ways, "train", "config.toml", *words]
    launch = command(3, argv)
    launch[1:1] = options.split()
    return jobs.finish(jobs.launch.start(None, launch, mpi_environment() | (env or {}), jobs.directory))


@pytest.mark.parametrize("options", ["", FAULT_TOLERANCE], ids=["", "ulfm"])
@pytest.mark.parametrize(
    ("rank", "target", "epochs"),
    [
        (2, "dbmpi.downpour.worker Worker load 10", ALWAYS),
        (2, "dbmpi.data.source Source load 0", ALWAYS),
        (1, "dbmpi.mpi.topology Communicators __init__ 0", ALWAYS),
        (0, "dbmpi.downpour.lead Lead __init__ 0", ALWAYS),
        (0, "dbmpi.checkpoint.writer CheckpointWriter commit 1", ALWAYS),
        (1, "dbmpi.downpour.worker Worker evaluate 0", "optimizer.epochs=2"),
        (0, "dbmpi.session Session conclude 0", "optimizer.epochs=1"),
    ],
    ids=["a step", "opening data", "topology", "preparing shards", "a checkpoint", "the last evaluation", "the end"],
)
def test_an_exception_of_one_rank_ends_the_job_with_its_traceback(
    jobs: Jobs, request: pytest.FixtureRequest, rank: int, target: str, epochs: str, options: str
) -> None:
    """Wherever it happens: the other ranks wait at another place for ever, were they not told."""
    if options:
        request.getfixturevalue("needs_fault_tolerance")
    done = sabotaged(jobs, "raise", rank, target, "checkpoint.every_seconds=0.01", epochs, options=options)
    assert_failed(done, f"rank {rank} failed and ends the job:")
    assert done.output.count("Traceback (most recent call last)") == 1, done.transcript
    assert "ZeroDivisionError: sabotage" in done.stderr


BROKEN_IMPORT = """
import os, sys


class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            raise ZeroDivisionError("sabotage")


if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("options", ["", FAULT_TOLERANCE], ids=["", "ulfm"])
@pytest.mark.parametrize("module", ["mpi4py", "dbmpi.runs.training"])
def test_an_import_that_fails_on_one_rank_ends_the_job(
    jobs: Jobs, request: pytest.FixtureRequest, module: str, options: str
) -> None:
    """Before MPI starts, where the other ranks wait inside of it, and after."""
    if options:
        request.getfixturevalue("needs_fault_tolerance")
    (jobs.directory / "sitecustomize.py").write_text(BROKEN_IMPORT.replace("MODULE", module))
    done = jobs.finish(jobs.start(None, launcher=3, options=options, env={"PYTHONPATH": str(jobs.directory)}))
    assert done.returncode == 1, done.transcript
    assert done.seconds < 10 * timeout_scale(), done.transcript
    assert done.output.count("Traceback (most recent call last)") == 1, done.transcript
    assert "ZeroDivisionError: sabotage" in done.stderr, done.transcript


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("dbmpi.downpour.worker Worker load 10", ()),
        ("dbmpi.paramserver.client Client push 41", ("server.consistent=true", "server.overlap=threads")),
    ],
    ids=["between steps", "half a push"],
)
def test_what_was_learned_is_written_before_a_worker_fails(jobs: Jobs, target: str, settings: tuple[str, ...]) -> None:
    """Although no checkpoint was due; and although shards wait for the other half of a push before they apply it."""
    done = sabotaged(jobs, "raise", 2, target, "checkpoint.every_seconds=0", ALWAYS, *settings)
    assert_failed(done, "rank 2 failed and ends the job:")
    with jobs.checkpoint() as checkpoint:
        assert checkpoint.info.step >= 10
        assert np.isfinite(checkpoint.parameters()).all()
    jobs.assert_resumes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    [
        ["topology.shards=1"],
        ["topology.shards=3", "topology.colocate=true"],
        ["topology.shards=1", "topology.partitions=2"],
        ["server.transport=p2p"],
    ],
    ids=["apart", "colocated", "partitions", "messages"],
)
def test_what_a_batch_method_has_learned_is_written_before_a_worker_fails(jobs: Jobs, topology: list[str]) -> None:
    target = "dbmpi.sandblaster.work PortionWork compute 40"
    done = sabotaged(jobs, "raise", 2, target, ALWAYS, *ENDLESS, *topology)
    assert_failed(done, "rank 2 failed and ends the job:")
    assert done.output.count("Traceback (most recent call last)") == 1, done.transcript
    assert re.search("replica [012] has failed: a checkpoint is written, and the run ends", done.stdout)
    with jobs.checkpoint() as checkpoint:
        assert checkpoint.info.step > 0
        assert np.isfinite(checkpoint.parameters()).all()
    jobs.assert_resumes()


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_job_where_a_shard_does_not_answer(jobs: Jobs) -> None:
    """No checkpoint can be written then, and the job says both."""
    done = sabotaged(
        jobs,
        "raise",
        2,
        "dbmpi.sandblaster.work PortionWork compute 40",
        ALWAYS,
        "topology.shards=2",
        *ENDLESS,
        env=STALL,
        also="halt 1 dbmpi.sandblaster.shard ShardSpace snapshot 0",
    )
    assert_failed(done, "rank 2 failed and ends the job:")
    assert re.search(
        "no checkpoint could be written: stalled: .* shard 1 on rank 1 to write into a checkpoint", done.output
    )
    assert done.output.count("Traceback (most recent call last)") == 1, done.transcript


def test_a_crash_of_one_rank_ends_the_job_with_its_stack(jobs: Jobs) -> None:
    program = jobs.start(3, ALWAYS, OFTEN)
    jobs.wait_until_all_learn(program, 2)
    jobs.wait_for_checkpoint(program)
    os.kill(program.ranks()[1], signal.SIGABRT)  # the fault handler writes where the rank was
    done = jobs.finish(program)
    assert done.returncode != 0, done.transcript
    assert "Fatal Python error: Aborted" in done.stderr, done.transcript
    assert "in downpour" in done.stderr, done.transcript
    jobs.assert_resumes()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_ends_the_job(jobs: Jobs, rank: int) -> None:
    program = jobs.start(3, ALWAYS, OFTEN, "topology.shards=2")
    jobs.wait_until_all_learn(program, 1)
    jobs.wait_for_checkpoint(program)
    killed = time.monotonic()
    program.signal(signal.SIGKILL, rank)
    done = jobs.finish(program)
    assert done.returncode != 0, done.transcript
    assert time.monotonic() - killed < SECONDS * timeout_scale(), done.transcript
    jobs.assert_resumes()


# Ranks that stand still


@pytest.mark.slow
def test_a_worker_that_is_halted_for_a_while_takes_part_again(jobs: Jobs) -> None:
    program = jobs.start(3, ALWAYS)
    jobs.wait_until_all_learn(program, 2)
    lead, halted, _ = program.ranks().values()
    os.kill(halted, signal.SIGSTOP)
    jobs.wait_for_reports(program, 1, count=10)  # the other one goes on
    os.kill(halted, signal.SIGCONT)
    jobs.wait_for_reports(program, 0, 1, count=2)
    os.kill(lead, signal.SIGTERM)
    done = jobs.finish(program)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    jobs.assert_whole()


@pytest.mark.slow
def test_a_job_that_is_halted_as_a_whole_goes_on(jobs: Jobs) -> None:
    """As a scheduler does that suspends jobs: longer than the stall limit, and nobody is to blame."""
    program = jobs.start(3, ALWAYS, env=STALL)
    jobs.wait_until_all_learn(program, 2)
    ranks = program.ranks().values()
    program.send(ranks, signal.SIGSTOP)
    time.sleep(LIMIT + 0.5)
    program.send(ranks, signal.SIGCONT)
    jobs.wait_for_reports(program, 0, 1, count=2)


@pytest.mark.parametrize(
    ("rank", "target", "told"),
    [
        (
            0,
            "dbmpi.paramserver.rules Adagrad apply 50",
            r"rank [12]: stalled: nothing moved for .* s while waiting for shard 0 on rank 0 to apply the last push",
        ),
        (
            2,
            "dbmpi.downpour.worker Worker load 10",
            r"rank 0: stalled: nothing moved for .* s while waiting for replica 1 on rank 2 to push or to finish",
        ),
    ],
    ids=["shard", "worker"],
)
def test_a_rank_that_stands_still_for_good_ends_the_job(jobs: Jobs, rank: int, target: str, told: str) -> None:
    """No silent hang: the job says who waits for whom, and ends."""
    done = sabotaged(jobs, "halt", rank, target, "optimizer.epochs=30", env=STALL)
    assert_failed(done, told, code=75)
    assert "Traceback" not in done.output, done.transcript
