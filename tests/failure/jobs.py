"""Training jobs under the real launcher, to be fed bad input, signalled, halted and killed."""

from __future__ import annotations

import re
import sys
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
    ) -> Program:
        """Start a run on `n` ranks, with ``section.key=value`` settings.

        `launcher` is the number of ranks that ``dbmpi launch`` is to start, in place of the harness's mpirun, with
        further `options` for its mpirun.
        """
        own = [] if launcher is None else ["launch", "-n", str(launcher), f"--mpi-args={options}", "--"]
        words = [word for setting in settings for word in ("--set", setting)]
        argv = [sys.executable, "-m", "dbmpi", *own, "train", "config.toml", *words]
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
        records = self.run_directory / "records"

        def reported() -> bool:
            files = [records / f"worker-{number}.jsonl" for number in range(workers)]
            return all(file.exists() and file.stat().st_size > 0 for file in files)

        came = program.wait_until(lambda: reported() or program.returncode is not None, 40 * timeout_scale())
        assert came, program.stdout + program.stderr
        assert program.returncode is None, program.stdout + program.stderr

    def passes(self) -> list[Record]:
        """Return the records of Sandblaster's passes over batches, so far."""
        return [record for record in read_records(self.run_directory) if record["kind"] == "batch"]

    def wait_for_passes(self, program: Program, count: int, seconds: float = 40.0) -> bool:
        """Wait for so many further passes; return whether they came and the run goes on after them."""
        path = self.run_directory / "records" / "shard-0.jsonl"

        def passes() -> int:
            return path.read_text().count('"kind": "batch"') if path.exists() else 0

        wanted = passes() + count
        program.wait_until(lambda: passes() > wanted or program.returncode is not None, seconds * timeout_scale())
        return passes() > wanted and program.returncode is None

    def wait_for_output(self, program: Program, *words: str, seconds: float = 40.0) -> None:
        """Wait until a running program has written all these words to standard output."""

        def written() -> bool:
            return all(word in program.stdout for word in words)

        program.wait_until(lambda: written() or program.returncode is not None, seconds * timeout_scale())
        assert written(), f"not written: {words}\n{program.stdout}{program.stderr}"

    def checkpoint(self) -> Checkpoint:
        """Open the last checkpoint."""
        return Checkpoint.open(self.run_directory)

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
