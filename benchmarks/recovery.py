"""How soon a run goes on after a rank was killed, and what it costs that ranks may outlive each other.

Runs of ``tools/chaos.py`` lose a rank by kill -9 in the middle.  Timed is, by the clock in the records, from the kill
to when the work of a dead worker is dealt to others (Downpour) or the next pass is done without it (Sandblaster), and
to the first report of a worker after a shard was replaced in the same job (``topology.replacements``), or the job was
started again (``--restarts``).  The cost is the speed of undisturbed runs with fault tolerance, over that without, in
turn.
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT / "tests"))
sys.path.insert(0, str(common.ROOT / "tools"))
import chaos_runs
from harness.environment import plain_environment
from harness.programs import Program

from dbmpi.errors import UserError
from dbmpi.monitor.lines import Record
from dbmpi.monitor.records import read_records

RANKS, SHARD, WORKER = 6, 3, 4
LIMIT = 120.0
SETTINGS = ("monitor.report_seconds=0.02", "checkpoint.every_seconds=0.2")


class Run:
    """A run in a directory of its own.

    Parameters
    ----------
    place
        The directory, which is made.
    method
        The optimizer.
    options
        For ``dbmpi launch``.
    settings
        ``section.key=value``.
    """

    def __init__(self, place: Path, method: str, options: tuple[str, ...] = (), settings: tuple[str, ...] = ()) -> None:
        place.mkdir()
        chaos_runs.write_run(place, method, "digits", 600)
        self._place = place
        launch = [sys.executable, "-m", "dbmpi", "launch", "-n", str(RANKS), *options, "--", "train", "config.toml"]
        overrides = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
        self.program = Program([*launch, *overrides], directory=place, env=plain_environment(), cwd=place)

    def records(self) -> list[Record]:
        """Return what has been recorded so far."""
        with suppress(UserError):
            return list(read_records(self._place / "run"))
        return []

    def wait(self, happened: Callable[[list[Record]], bool]) -> None:
        """Wait until it has happened, by the records."""
        if not self.program.wait_until(lambda: happened(self.records()) or self.program.returncode is not None, LIMIT):
            raise SystemExit(f"nothing after {LIMIT:g} s:\n{self.program.stdout}{self.program.stderr}")

    def kill(self, rank: int) -> float:
        """Kill a rank in the middle of the run; return when."""
        latest = self._place / "run" / "checkpoints" / "latest"
        self.wait(lambda records: latest.exists() and any(record["kind"] == "worker" for record in records))
        time.sleep(0.5)
        at = time.time()
        self.program.signal(signal.SIGKILL, rank)
        return at


def recovery(place: Path, rank: int, method: str, sign: Callable[[Record], bool], **given: Any) -> float:
    """Return the seconds from the death of a rank to the first record that is a sign of going on."""
    run = Run(place, method, **given)
    try:
        at = run.kill(rank)

        def later(records: list[Record]) -> list[float]:
            return [record["time"] - at for record in records if sign(record) and record["time"] > at]

        run.wait(lambda records: bool(later(records)))
        return min(later(run.records()))
    finally:
        run.program.end()


def speed(place: Path, *options: str) -> float:
    """Return the samples a second of a run that nothing disturbs."""
    run = Run(place, "downpour", options, ("optimizer.epochs=150",))
    try:
        run.program.wait(LIMIT)
        found = re.search(r"samples/s +([\d,]+)", run.program.stdout)
        if found is None:
            raise SystemExit(f"it did not come to its end:\n{run.program.stdout}{run.program.stderr}")
        return float(found[1].replace(",", ""))
    finally:
        run.program.end()


WAYS: dict[str, tuple[float, int, str, Callable[[Record], bool], dict[str, Any]]] = {
    "a worker of Downpour": (1.0, WORKER, "downpour", lambda record: record["kind"] == "loss", {}),
    "a worker of Sandblaster": (
        1.0,
        WORKER,
        "sandblaster",
        lambda record: record["kind"] == "batch" and bool(record["lost"]),
        {},
    ),
    "a shard, replaced": (
        3.0,
        SHARD,
        "downpour",
        lambda record: record["kind"] == "worker" and record["session"] == 2,
        {"settings": ("topology.replacements=1",)},
    ),
    "a shard, replaced from its mirror": (
        3.0,
        SHARD,
        "downpour",
        lambda record: record["kind"] == "worker" and record["session"] == 2,
        {"settings": ("topology.replacements=1", "server.mirror=20")},
    ),
    "a shard, started again": (
        10.0,
        SHARD,
        "downpour",
        lambda record: record["kind"] == "worker" and record["session"] == 2,
        {"options": ("--restarts", "1")},
    ),
}
"""Target in seconds, rank to kill, method, sign of going on, and how the run is started."""


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("recovery", options.json)
    rounds = 2 if options.quick else 10
    with tempfile.TemporaryDirectory(prefix="dbmpi-recovery-") as folder:
        rows = []
        for number, (name, (target, rank, method, sign, given)) in enumerate(WAYS.items()):
            found = [recovery(Path(folder, f"{number}-{turn}"), rank, method, sign, **given) for turn in range(rounds)]
            rows.append((name, common.median(found), min(found), max(found)))
            report.at_most(f"seconds after the death of {name}", common.median(found), target)
        report.table(f"Seconds from a death to going on, {RANKS} ranks", ("of", "median", "least", "most"), rows)
        ways = {"with": (), "without": ("--no-fault-tolerance",)}
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(1 if options.quick else 5):
            for name, words in ways.items():
                speeds[name].append(speed(Path(folder, f"{name}-{turn}"), *words))
        ratio = common.median(speeds["with"]) / common.median(speeds["without"])
        report.table(
            "Samples a second", ("fault tolerance", "median"), [(k, common.median(v)) for k, v in speeds.items()]
        )
        report.at_least("speed with fault tolerance over that without", ratio, 0.97)
    report.finish()


if __name__ == "__main__":
    main()
