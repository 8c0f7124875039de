"""Training jobs under the real launcher, to be fed bad input, signalled, halted and killed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness.environment import timeout_scale
from harness.launching import Completed, Launch
from harness.programs import Program
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.monitor.records import Record, read_records

BATCHES_PER_EPOCH = -(-tiny.SAMPLES // 6)
FOR_EVER = 10_000_000
"""Epochs that no test sees the end of."""
_MESSAGE = re.compile(r"\s*\S?\s*(dbmpi\b.*)")
SECONDS = 20.0
"""In which a job that cannot go on must be gone, on a busy machine too."""
LIMIT = 3 * timeout_scale()
"""Seconds without movement after which a job ends that is started with `STALL`: enough to start on a busy machine."""
STALL = {"DBMPI_STALL_SECONDS": f"{LIMIT:g}"}
"""Environment."""

_CONFIGURATION = """
[run]
directory = "run"

[data]
train = "train.h5"
test = "test.h5"

[network]
loss = "softmax"

[[network.layers]]
units = 7
activation = "tanh"

[[network.layers]]
units = 3

[optimizer]
learning_rate = 0.01
batch_size = 6
epochs = 2

[checkpoint]
every_seconds = 0
resume = "auto"

[monitor]
report_seconds = 0.1
evaluate_epochs = 0
progress = "lines"
"""


@dataclass
class Jobs:
    """A directory with data and a configuration, and the launcher."""

    directory: Path
    launch: Launch

    def __post_init__(self) -> None:
        tiny.write_data(self.directory)
        (self.directory / "config.toml").write_text(_CONFIGURATION)

    @property
    def run_directory(self) -> Path:
        """Where the runs write."""
        return self.directory / "run"

    def start(
        self,
        n: int | None,
        *settings: str,
        env: dict[str, str] | None = None,
        launcher: int | None = None,
        options: str = "",
        own: Sequence[str] = (),
    ) -> Program:
        """Start a run on `n` ranks, with ``section.key=value`` settings.

        `launcher` is the number of ranks that ``dbmpi launch`` is to start, in place of the harness's mpirun, with
        further `options` for its mpirun, and options of its `own`.
        """
        launch = [] if launcher is None else ["launch", "-n", str(launcher), f"--mpi-args={options}", *own, "--"]
        words = [word for setting in settings for word in ("--set", setting)]
        argv = [sys.executable, "-m", "dbmpi", *launch, "train", "config.toml", *words]
        return self.launch.start(n, argv, env=env, cwd=self.directory)

    def finish(self, program: Program, timeout: float = 40.0) -> Completed:
        """Wait for the end of a run; nothing may be left of it."""
        done = self.launch.finish(program, timeout)
        assert not done.left, done.transcript
        return done

    def __call__(self, n: int | None, *settings: str, env: dict[str, str] | None = None) -> Completed:
        """Run to the end."""
        return self.finish(self.start(n, *settings, env=env))

    def wait_until_all_learn(self, program: Program, workers: int) -> None:
        """Wait until so many workers have reported."""
        self.wait_for_reports(program, *range(workers))

    def wait_for_reports(self, program: Program, *workers: int, count: int = 1) -> None:
        """Wait until each of these workers has reported so many times more; the run goes on after that."""

        def reports() -> dict[int, int]:
            files = {worker: self.run_directory / "records" / f"worker-{worker}.jsonl" for worker in workers}
            return {
                worker: file.read_bytes().count(b'"kind": "worker"') if file.exists() else 0
                for worker, file in files.items()
            }

        before = reports()
        self.wait_for(program, lambda: all(now >= before[worker] + count for worker, now in reports().items()))

    def wait_for_checkpoint(self, program: Program, directory: str = "run") -> None:
        """Wait until there is a checkpoint; the run goes on after it."""
        self.wait_for(program, (self.directory / directory / "checkpoints" / "latest").exists)

    def wait_for_output(self, program: Program, *words: str) -> None:
        """Wait until a program has written all these words to standard output; it goes on after that."""
        self.wait_for(program, lambda: all(word in program.stdout for word in words))

    def wait_for_passes(self, program: Program, count: int) -> None:
        """Wait for so many further passes over batches of Sandblaster; the run goes on after them."""
        path = self.run_directory / "records" / "shard-0.jsonl"

        def passes() -> int:
            return path.read_text().count('"kind": "batch"') if path.exists() else 0

        wanted = passes() + count
        self.wait_for(program, lambda: passes() > wanted)

    def wait_for(self, program: Program, condition: Callable[[], bool], seconds: float = 40.0) -> None:
        """Wait for what a running program does; fail the test if it ends before, or right after."""
        __tracebackhide__ = True
        came = program.wait_until(lambda: program.returncode is not None or condition(), seconds * timeout_scale())
        assert came, f"nothing for {seconds * timeout_scale():g} s\n{program.stdout}{program.stderr}"
        assert program.returncode is None, f"it has ended: {program.returncode}\n{program.stdout}{program.stderr}"

    def passes(self) -> list[Record]:
        """Return the records of Sandblaster's passes over batches, so far."""
        return [record for record in read_records(self.run_directory) if record["kind"] == "batch"]

    def checkpoint(self, directory: str = "run") -> Checkpoint:
        """Open the last checkpoint."""
        return Checkpoint.open(self.directory / directory)

    def assert_whole(self) -> None:
        """The last checkpoint can be read, and its steps are the batches that it says are learned."""
        with self.checkpoint() as checkpoint:
            info = checkpoint.info
            assert np.isfinite(checkpoint.parameters()).all()
        assert 0 < info.step == info.frontier - len(info.holes) == sum(info.done)

    def assert_resumes(self) -> None:
        """Go on from the last checkpoint to the end of an epoch, as a user would; one process is enough for that."""
        with self.checkpoint() as checkpoint:
            before = checkpoint.info
        epochs = before.frontier // BATCHES_PER_EPOCH + 2
        done = self(None, f"optimizer.epochs={epochs}")
        assert done.returncode == 0, done.transcript
        assert f"going on after {before.step:,} steps" in done.stdout
        with self.checkpoint() as checkpoint:
            after = checkpoint.info
        assert (after.step, after.holes, after.frontier) == (after.total, (), epochs * BATCHES_PER_EPOCH)


def messages(done: Completed) -> list[str]:
    """Return what dbmpi says about errors, apart from what launchers add.

    That is lines of their own, and before ours spaces without an end of line, or a stray byte: Open MPI 5.0's mpirun
    now and then writes one byte of its memory more than a text has.
    """
    return [found[1].rstrip("\0 ") for line in done.output.split("\n") if (found := _MESSAGE.match(line))]
