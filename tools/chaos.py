"""Many small training runs that are disturbed at random moments, and what became of them.

``python tools/chaos.py --what kill --method sandblaster --runs 20`` kills random workers; ``stop`` suspends them for a
while; ``job`` kills the whole job, a third of the times while a checkpoint is written, and resumes it.  With
``--learn counts``, the gradient of Downpour's objective is -1 everywhere and the rate is 1, so that the parameters
count the updates.  Prints a table, and then one line of JSON: how many runs survived (or, with ``job``, came to the
same end after a resume), how many ended as documented with exit code 75, hung, or went wrong.  A process or a file in
``/dev/shm`` that is left is wrong.  A run that was over before it was disturbed does not count, and is run again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.errors import UserError
from dbmpi.index.layout import cut
from dbmpi.monitor.records import read_records

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from harness.environment import plain_environment, timeout_scale
from harness.programs import Program

LIMIT = 60.0
"""Seconds after which an undisturbed run would long have ended: one that goes on has hung."""
POINTS = 1.0
"""Percentage points by which the accuracy may differ from that of the undisturbed run."""
LONGEST_STOP = 20.0
ATTEMPTS = 20
"""Runs of which one must be disturbed before it is over."""
SHARDS = 2
CONFIGURATION = """
[run]
directory = "run"
[data]
train = "train.h5"
test = "test.h5"
LEARN
[topology]
shards = 2
[optimizer]
method = "METHOD"
learning_rate = RATE
batch_size = 20
epochs = EPOCHS
[sandblaster]
gtol = 0
ftol = 0
l2 = 1e-4
[checkpoint]
every_seconds = 0.3
resume = "auto"
[monitor]
report_seconds = 0.1
evaluate_epochs = 0
progress = "lines"
"""
LEARN = {
    "digits": """[[network.layers]]
units = 64
activation = "tanh"
[[network.layers]]
units = 10""",
    "counts": """[objective]
use = "counts:Counts\"""",
}
"""What is learned: a network, or the number of updates."""
RATES = {"digits": "0.01", "counts": "1.0\nrule = 'sgd'"}
COUNTS = """
import numpy as np

class Counts:
    parameters = {"weights": np.zeros((64, 100)), "biases": np.zeros(77)}

    def loss_and_gradient(self, parameters, batch):
        return 1.0, {name: -np.ones_like(values) for name, values in parameters.items()}
"""
EPOCHS = {"downpour": 60, "sandblaster": 150}


@dataclass
class Outcome:
    """What became of a run."""

    what: str
    """``survived``, ``ended``, ``hung``, ``wrong``, or ``missed`` where the run was over before."""
    happened: str
    """What was done to it."""
    why: str = ""


class Laboratory:
    """Starts runs of one kind, each in a directory of its own.

    Parameters
    ----------
    directory
        For all of them.
    method, learn, ranks
        The optimizer, what is learned, and the number of ranks.
    everyone
        Whether ranks that hold shards are disturbed, too.
    """

    def __init__(self, directory: Path, method: str, learn: str, ranks: int, *, everyone: bool) -> None:
        self._directory, self._method, self._learn, self._ranks = directory, method, learn, ranks
        shards = {0, ranks // SHARDS}
        self._victims = [rank for rank in range(ranks) if everyone or rank not in shards]
        program = self.start(directory := self.new("undisturbed"))
        program.wait_until(lambda: program.returncode is not None or self.way(directory) > 0, LIMIT * timeout_scale())
        began = time.monotonic()
        code = self.ended(program)
        if code != 0:
            raise SystemExit(f"the undisturbed run ended with {code}:\n{program.stdout}{program.stderr}")
        self.accuracy = self.accuracy_of(program)
        self.seconds = time.monotonic() - began
        """For which it has learned, about."""
        program.end()

    def new(self, name: str) -> Path:
        """Make the directory of a run."""
        directory = self._directory / name
        directory.mkdir()
        words = {"METHOD": self._method, "EPOCHS": str(EPOCHS[self._method])}
        words |= {"LEARN": LEARN[self._learn], "RATE": RATES[self._learn]}
        text = CONFIGURATION
        for word, value in words.items():
            text = text.replace(word, value)
        (directory / "config.toml").write_text(text, encoding="utf-8")
        (directory / "counts.py").write_text(COUNTS, encoding="utf-8")
        write_data(directory)
        return directory

    def start(self, directory: Path) -> Program:
        """Start or resume the run of a directory."""
        launch = [sys.executable, "-m", "dbmpi", "launch", "-n", str(self._ranks), "--"]
        return Program([*launch, "train", "config.toml"], directory=directory, env=plain_environment(), cwd=directory)

    def ended(self, program: Program) -> int | None:
        """Return the exit code of a run, or None if it does not end."""
        return program.returncode if program.wait(LIMIT * timeout_scale()) else None

    def accuracy_of(self, program: Program) -> float:
        """Return the accuracy in percent, as a run has printed it at its end; NaN if it has not."""
        found = re.search(r"^ *test accuracy +([\d.]+) %  \(", program.stdout, re.MULTILINE)
        return float(found[1]) if found else float("nan")

    def way(self, directory: Path) -> float:
        """Return which part of its way the run of a directory has come, by the records of its workers."""
        with suppress(UserError):  # no records yet
            epochs = [record["epoch"] for record in read_records(directory / "run") if record["kind"] == "worker"]
            return max(epochs, default=0.0) / EPOCHS[self._method]
        return 0.0

    def disturb(self, number: int, what: str, seed: int) -> Outcome:
        """Let a run be disturbed, and return what became of it."""
        for attempt in range(ATTEMPTS):
            dice = random.Random(f"{seed} {number} {attempt}")  # noqa: S311 - no secret
            directory = self.new(f"{what}-{number}-{attempt}")
            program = self.start(directory)
            try:
                outcome = self._disturb(program, directory, what, dice)
            finally:
                program.end()
            if outcome.what != "missed":
                shutil.rmtree(directory)
                return outcome
        return Outcome("wrong", f"nothing: {ATTEMPTS} runs were over before")

    def _disturb(self, program: Program, directory: Path, what: str, dice: random.Random) -> Outcome:
        """Wait for a random moment of the run: a part of its way, and a while so that it is not that of a report."""
        part, while_ = dice.uniform(0, 1), dice.uniform(0, 0.2)
        limit = LIMIT * timeout_scale()
        if not program.wait_until(lambda: program.returncode is not None or self.way(directory) >= part, limit):
            return Outcome("hung", f"nothing: it did not come to {part:.0%} of its way")
        program.wait_until(lambda: False, while_)
        happened = f"at {part:.0%}"
        if program.returncode is not None:
            return Outcome("missed", happened)
        if what == "job":
            return self._kill_all(program, directory, dice, happened)
        return self._disturb_one(program, directory, what, dice, happened)

    def _disturb_one(self, program: Program, directory: Path, what: str, dice: random.Random, happened: str) -> Outcome:
        alive = program.ranks()
        victim = dice.choice(self._victims)
        happened = f"{what} of rank {victim} {happened}"
        if victim not in alive:
            return Outcome("missed", happened)
        if what == "kill":
            program.send([alive[victim]], signal.SIGKILL)
        else:
            seconds = dice.uniform(0.1, LONGEST_STOP)
            program.send([alive[victim]], signal.SIGSTOP)
            program.wait_until(lambda: False, seconds)
            program.send([alive[victim]], signal.SIGCONT)
            happened += f" for {seconds:.1f} s"
        return self._judge(program, directory, self.ended(program), happened)

    def _kill_all(self, program: Program, directory: Path, dice: random.Random, happened: str) -> Outcome:
        place = directory / "run" / "checkpoints"
        before = set(place.iterdir()) if place.exists() else set()
        writing = dice.random() < 1 / 3
        if writing:
            program.wait_until(
                lambda: program.returncode is not None or (place.exists() and not set(place.iterdir()) <= before), LIMIT
            )
            if program.returncode is not None:
                return Outcome("missed", happened)
        happened = f"kill of the job {happened}{', while it wrote' if writing else ''}"
        program.end()
        step = 0
        try:
            if (place / "latest").exists():
                with Checkpoint.open(directory / "run") as checkpoint:
                    checkpoint.verify()
                    step = checkpoint.info.step
        except UserError as error:
            return Outcome("wrong", happened, f"no checkpoint can be read: {error}")
        again = self.start(directory)
        try:
            outcome = self._judge(again, directory, self.ended(again), f"{happened}, resumed after step {step:,}")
            if outcome.what == "survived" and step and f"after {step:,} steps" not in again.stdout:
                return Outcome("wrong", happened, f"it did not resume from step {step}")
            return outcome
        finally:
            again.end()

    def _judge(self, program: Program, directory: Path, code: int | None, happened: str) -> Outcome:
        if code is None:
            return Outcome("hung", happened, program.stdout[-300:] + program.stderr[-700:])
        program.wait_until(lambda: not program.processes(), 5.0 * timeout_scale())
        left = [f"process {pid}" for pid in program.processes()] + [
            str(path) for path in program.segments if path.exists()
        ]
        if left:
            return Outcome("wrong", happened, f"exit code {code}, and left: {', '.join(left)}")
        if code == 75:
            return Outcome("ended", happened)
        if code != 0:
            return Outcome("wrong", happened, f"exit code {code}: {program.stderr[-700:]}")
        problem = counts(directory / "run", self._method)
        if self._learn == "counts":
            problem = problem or updates(directory / "run")
        elif not abs((accuracy := self.accuracy_of(program)) - self.accuracy) <= POINTS:
            problem = f"an accuracy of {accuracy:g} %, and {self.accuracy:g} % undisturbed"
        return Outcome("wrong" if problem else "survived", happened, problem)


def counts(run: Path, method: str) -> str:
    """Return what is wrong with the counts of a run that has come to its end; empty if nothing is."""
    with Checkpoint.open(run) as checkpoint:
        info = checkpoint.info
    if method == "downpour":
        whole = info.frontier == info.total and not info.holes and info.step >= info.total
        return "" if whole else f"{info.step} steps, frontier {info.frontier} of {info.total}, {len(info.holes)} holes"
    portions = {len(record["ledger"]) for record in read_records(run) if record["kind"] == "batch"}
    counted = {sum(record["portions"].values()) for record in read_records(run) if record["kind"] == "batch"}
    return "" if portions == counted and len(portions) == 1 else f"batches of {portions}, {counted} portions"


def updates(run: Path) -> str:
    """Return what is wrong with the parameters of a run that count its updates; empty if nothing is."""
    records = list(read_records(run))
    repeated = sum(record["repeated"] for record in records if record["kind"] == "loss")
    versions = {record["number"]: record["version"] for record in records if record["kind"] == "shard"}
    with Checkpoint.open(run) as checkpoint:
        values, batches = checkpoint.parameters(), checkpoint.info.total
    problems = []
    for shard, held in enumerate(cut(len(values), SHARDS)):
        least, most = int(values[held.start : held.stop].min()), int(values[held.start : held.stop].max())
        if not (batches <= least <= most <= batches + repeated and least == versions[shard]):
            problems.append(f"shard {shard}: {least} to {most} updates, {versions[shard]} counted")
    return "; ".join(problems) and f"{'; '.join(problems)}, of {batches} and {repeated} repeated"


def write_data(directory: Path) -> None:
    """Write data that look like the digits: ten blurred patterns of 8x8, with noise."""
    patterns = np.random.default_rng(1).uniform(0, 1, (10, 64))
    for name, count, seed in (("train", 1200, 2), ("test", 1000, 3)):
        dice = np.random.default_rng(seed)
        targets = dice.integers(0, 10, count)
        with h5py.File(directory / f"{name}.h5", "w") as file:
            file["inputs"] = (patterns[targets] + dice.normal(0, 0.5, (count, 64))).astype(np.float32)
            file["targets"] = targets
            file["targets"].attrs["classes"] = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return 1 if a run hung or went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="number of runs (20)")
    parser.add_argument("--method", choices=EPOCHS, default="sandblaster")
    parser.add_argument("--learn", choices=LEARN, default="digits", help="(digits); counts is for Downpour")
    parser.add_argument("--what", choices=("kill", "stop", "job"), default="kill")
    parser.add_argument("--ranks", type=int, default=6, help="of each run, of which two hold shards (6)")
    parser.add_argument("--everyone", action="store_true", help="disturb ranks with shards, too")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print only the last line")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="dbmpi-chaos-") as folder:
        laboratory = Laboratory(Path(folder), given.method, given.learn, given.ranks, everyone=given.everyone)
        found: Counter[str] = Counter()
        with ThreadPoolExecutor(given.jobs) as pool:
            runs = range(given.runs)
            for number, outcome in enumerate(pool.map(lambda n: laboratory.disturb(n, given.what, given.seed), runs)):
                found[outcome.what] += 1
                if not given.json:
                    print(f"{number:>4}  {outcome.what:<9} {outcome.happened}  {outcome.why}", flush=True)
    print(json.dumps({"runs": given.runs} | {name: found[name] for name in ("survived", "ended", "hung", "wrong")}))
    return 1 if found["hung"] or found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
