"""Many small training runs that are disturbed at random moments, and what became of them.

``python tools/chaos.py --what kill --method sandblaster --runs 20`` kills random workers; ``stop`` suspends them for a
while; ``job`` kills the whole job, a third of the times while a checkpoint is written, and resumes it; ``link`` runs
over three hosts (network namespaces; needs root), of which the link of a random one fails and comes back, or is slow
for a while, or is cut for good, in turn.  With
``--learn counts``, the gradient of Downpour's objective is -1 everywhere and the rate is 1, so that the parameters
count the updates.  Prints a table, and then one line of JSON: how many runs survived (or, with ``job``, came to the
same end after a resume), how many ended as documented with exit code 75 (where a host is cut off: 1), hung, or went
wrong.  A process or a file in
``/dev/shm`` that is left is wrong.  A run that was over before it was disturbed does not count, and is run again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from chaos_runs import EPOCHS, LEARN, SHARDS, counts, updates, write_run

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.errors import DIED, UserError
from dbmpi.monitor.records import read_records

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from harness.environment import plain_environment, timeout_scale
from harness.hosts import NoHostsError, at, hosts, is_on, limit_link, mend_link, set_link, spread
from harness.programs import Program

LIMIT = 60.0
"""Seconds after which an undisturbed run would long have ended: one that goes on has hung."""
POINTS = 1.0
"""Percentage points by which the accuracy may differ from that of the undisturbed run."""
LONGEST_STOP = 20.0
LINKS = ("fails", "is slow", "is cut")
"""What happens to the link of a host."""
SLOWER = 3
"""How many times fewer epochs a run over several hosts has."""
CUT_OFF = (("monitor.stall_timeout=8", "monitor.on_stall=drop"), {"DBMPI_STALL_SECONDS": "30"})
"""Settings and environment of a run of which a host is cut off: when it counts as lost."""
ATTEMPTS = 20
"""Runs of which one must be disturbed before it is over."""


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
    hosts
        Over which the ranks are spread; none: all are on this one.
    """

    def __init__(
        self, directory: Path, method: str, learn: str, ranks: int, *, everyone: bool, hosts: Sequence[str] = ()
    ) -> None:
        self._hosts, self._epochs = hosts, EPOCHS[method] // (SLOWER if hosts else 1)
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
        write_run(directory, self._method, self._learn, self._epochs)
        return directory

    def start(self, directory: Path, what: str = "") -> Program:
        """Start or resume the run of a directory, to which this is going to happen."""
        settings, variables = CUT_OFF if what == "is cut" else ((), {})
        launch = [sys.executable, "-m", "dbmpi", "launch", "-n", str(self._ranks)]
        train = ["--", "train", "config.toml", *(word for setting in settings for word in ("--set", setting))]
        argv = [*launch, *train]
        if self._hosts:
            options, more = spread(self._hosts, -(-self._ranks // len(self._hosts)))
            argv = at(self._hosts[0], [*launch, f"--mpi-args={shlex.join(options)}", *train], directory)
            variables = variables | more
        return Program(argv, directory=directory, env=plain_environment() | variables, cwd=directory)

    def ended(self, program: Program) -> int | None:
        """Return the exit code of a run, or None if it does not end."""
        return program.returncode if program.wait(LIMIT * timeout_scale()) else None

    def accuracy_of(self, program: Program) -> float:
        """Return the accuracy in percent, as a run has printed it at its end; NaN if it has not."""
        found = re.findall(r"test accuracy +([\d.]+) %", program.stdout)
        return float(found[-1]) if found else float("nan")

    def way(self, directory: Path) -> float:
        """Return which part of its way the run of a directory has come, by the records of its workers."""
        with suppress(UserError):  # no records yet
            epochs = [record["epoch"] for record in read_records(directory / "run") if record["kind"] == "worker"]
            return max(epochs, default=0.0) / self._epochs
        return 0.0

    def disturb(self, number: int, what: str, seed: int) -> Outcome:
        """Let a run be disturbed, and return what became of it."""
        for attempt in range(ATTEMPTS):
            dice = random.Random(f"{seed} {number} {attempt}")  # noqa: S311 - no secret
            directory = self.new(f"{what}-{number}-{attempt}")
            program = self.start(directory, what)
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
        if what in LINKS:
            return self._disturb_link(program, directory, what, dice, happened)
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

    def _disturb_link(
        self, program: Program, directory: Path, what: str, dice: random.Random, happened: str
    ) -> Outcome:
        host = dice.choice(self._hosts)
        try:
            happened = f"link of {host} {what} {happened}{disturb_link(program, host, what, dice)}"
            code = self.ended(program)
            if what != "is cut" or code is None:
                return self._judge(program, directory, code, happened)
            # Ranks end by themselves, and all else that mpirun can reach; what it cannot reach, when the link is back.
            reached = [self._hosts[0]] if host == self._hosts[0] else [name for name in self._hosts if name != host]
            program.wait_until(lambda: not left(program, reached), LIMIT * timeout_scale())
            if still := left(program, reached):
                return Outcome("wrong", happened, f"exit code {code}, and left while the link was down: {still}")
        finally:
            mend_link(host)
        if code == DIED and "everything is learned and in the last checkpoint, but " in program.stderr:
            code = 0
        return self._judge(program, directory, code, happened)

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
            resumed = f"going on after {step:,} steps", f"learned in {step:,} steps"  # or there was nothing left
            if outcome.what == "survived" and step and not any(line in again.stdout for line in resumed):
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
        if code == DIED:
            return Outcome("ended", happened)
        if code != 0:
            return Outcome("wrong", happened, f"exit code {code}: {program.stderr[-700:]}")
        problem = counts(directory / "run", self._method)
        if self._learn == "counts":
            problem = problem or updates(directory / "run")
        elif not abs((accuracy := self.accuracy_of(program)) - self.accuracy) <= POINTS:
            problem = f"an accuracy of {accuracy:g} %, and {self.accuracy:g} % undisturbed"
        return Outcome("wrong" if problem else "survived", happened, problem)


def disturb_link(program: Program, host: str, what: str, dice: random.Random) -> str:
    """Do something of `LINKS` to the link of a host, and return for how long; one that is cut stays so."""
    if what == "is cut":
        set_link(host, "down")
        return ""
    if what == "is slow":
        limit_link(host)
        program.wait(seconds := dice.uniform(1.0, 10.0))
        mend_link(host)
        return f" for {seconds:.1f} s"
    lengths = [dice.uniform(0.5, 3.0) for _ in range(dice.randint(1, 4))]
    for seconds in lengths:
        set_link(host, "down")
        program.wait_until(lambda: False, seconds)
        set_link(host, "up")
        program.wait(dice.uniform(0.5, 3.0))
    return f" for {', '.join(f'{seconds:.1f}' for seconds in lengths)} s"


def left(program: Program, on: Sequence[str]) -> str:
    """Return which ranks of a program are left, and which processes on these hosts; empty if none are."""
    processes = [pid for pid in program.processes() if any(is_on(pid, host) for host in on)]
    return ", ".join([*(f"rank {rank}" for rank in program.ranks()), *(f"process {pid}" for pid in processes)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return 1 if a run hung or went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="number of runs (20)")
    parser.add_argument("--method", choices=EPOCHS, default="sandblaster")
    parser.add_argument("--learn", choices=LEARN, default="digits", help="(digits); counts is for Downpour")
    parser.add_argument("--what", choices=("kill", "stop", "job", "link"), default="kill")
    parser.add_argument("--ranks", type=int, default=6, help="of each run, of which two hold shards (6)")
    parser.add_argument("--everyone", action="store_true", help="disturb ranks with shards, too")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print only the last line")
    given = parser.parse_args(arguments)
    if given.what == "link" and given.jobs > 1:
        parser.error("--jobs: runs over hosts share their links, so that only one at a time can be disturbed")
    kinds = LINKS if given.what == "link" else (given.what,)
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        try:
            names = stack.enter_context(hosts()) if given.what == "link" else []
        except NoHostsError as why:
            print(f"chaos.py: --what link {why}", file=sys.stderr)
            return 2
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dbmpi-chaos-")))
        laboratory = Laboratory(folder, given.method, given.learn, given.ranks, everyone=given.everyone, hosts=names)

        def disturb(number: int) -> Outcome:
            return laboratory.disturb(number, kinds[number % len(kinds)], given.seed)

        pool = stack.enter_context(ThreadPoolExecutor(given.jobs))
        for number, outcome in enumerate(pool.map(disturb, range(given.runs))):
            found[outcome.what] += 1
            if not given.json:
                print(f"{number:>4}  {outcome.what:<9} {outcome.happened}  {outcome.why}", flush=True)
    print(json.dumps({"runs": given.runs} | {name: found[name] for name in ("survived", "ended", "hung", "wrong")}))
    return 1 if found["hung"] or found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
