"""``dbmpi status``: jobs of Slurm, and how far their runs are; of several runs, in one table."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbmpi.cli import options
from dbmpi.cli.submit import SCRIPT
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from dbmpi.machine.slurm import SlurmJob
    from dbmpi.monitor.live_run import LiveRun

SUMMARY = "show jobs of Slurm and how far their runs are; of several runs, one table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.usage = "dbmpi status [-h] [--json] [RUN ...]"
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="directory of a run, or number of a job (default: runs whose jobs wait or run, as dbmpi submit made them)",
    )
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show the runs that these `arguments` name, and return the exit code."""
    import json

    from dbmpi.cli.tables import printable, table

    shown, note = _look(arguments.runs)
    if arguments.json:
        print(json.dumps([one.facts() for one in shown], indent=2, allow_nan=False))
        return 0
    if note:
        print(f"{note}; what the runs have recorded:" if any(one.live for one in shown) else note)
    if len(shown) == 1:
        for name, value in shown[0].lines():
            print(f"{name:>14}  {printable(value)}")
    elif shown:
        for line in table(_HEADING, [[printable(cell) for cell in one.cells()] for one in shown], left=(0, 1, 2)):
            print(line)
    return 0


@dataclass(frozen=True)
class RunStatus:
    """A run, its job, or both."""

    name: str
    """Directory of the run as the user wrote it; the number of the job where the directory is unknown."""
    job: SlurmJob | None
    """The job of the run; None if there is none, or Slurm does not know it any more."""
    live: LiveRun | None
    """What the run has recorded; None without records."""
    working: bool
    """Whether a process of the run is at work."""

    @property
    def state(self) -> str:
        """What the run does, in a few words."""
        if self.working:
            return "running"
        if self.job is not None and self.job.alive:
            return "starting" if self.job.state == "RUNNING" else "waiting"
        if self.live is None:
            return "not begun"
        return "complete" if self.live.complete else "incomplete"

    def facts(self) -> dict[str, Any]:
        """Return everything as JSON has it; numbers that are unknown, or not finite, are None."""
        live, job = self.live, self.job
        known: dict[str, Any] = {"run": self.name, "state": self.state}
        known["job"] = None if job is None else {key: getattr(job, key) for key in ("number", "state", "elapsed")}
        if live is not None:
            display = live.display(working=self.working)
            evaluation = live.evaluations[-1] if live.evaluations else {}
            known |= {
                "epochs": live.epochs,
                "of": live.total_epochs,
                "samples_per_second": display.rate,
                "loss": display.loss if math.isfinite(display.loss) else None,
                "test_loss": evaluation.get("loss"),
                "test_accuracy": evaluation.get("accuracy"),
                "checkpoint": None if live.checkpoint is None else live.checkpoint["name"],
                "checkpoint_time": None if live.checkpoint is None else live.checkpoint["time"],
                "starts": live.session,
            }
        return known

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield name and value of what is known, for people."""
        facts = self.facts()
        yield "run", f"{self.name}  {self.state}"
        if self.job is not None:
            yield "job", str(self.job)
        if self.live is not None:
            cells = dict(zip(_CELLS, self.cells()[3:], strict=True))
            age = "" if facts["checkpoint_time"] is None else f", {_age(facts['checkpoint_time'])} ago"
            cells["checkpoint"] = f"{facts['checkpoint'] or '-'}{age}"
            cells["starts"] = f"{facts['starts']}" + (" (resumed)" if facts["starts"] > 1 else "")
            yield from ((name, value) for name, value in cells.items() if value != "-")

    def cells(self) -> list[str]:
        """Return the row of a table."""
        facts = self.facts()
        job = "-" if self.job is None else f"{self.job.number} {self.job.state}"
        row = [self.name, self.state, job]
        if self.live is None:
            return row + ["-"] * len(_CELLS)
        from dbmpi.monitor.display import digits

        def number(key: str) -> str:
            return "-" if facts[key] is None else digits(facts[key]).strip()

        of = "" if facts["of"] is None else f"/{facts['of']:.4g}"
        accuracy = "-" if facts["test_accuracy"] is None else f"{100 * facts['test_accuracy']:.2f} %"
        checkpoint = "-" if facts["checkpoint"] is None else facts["checkpoint"].removesuffix(".h5")
        rate = f"{facts['samples_per_second']:,.0f}"
        middle = [f"{facts['epochs']:.4g}{of}", rate, number("loss"), number("test_loss"), accuracy]
        return [*row, *middle, checkpoint, f"{facts['starts']}"]


_HEADING = ("run", "state", "job", "epochs", "samples/s", "loss", "test loss", "accuracy", "checkpoint", "starts")
_CELLS = ("epochs", "samples/s", "loss", "test loss", "test accuracy", "checkpoint", "starts")


def _look(names: Sequence[str]) -> tuple[list[RunStatus], str]:
    """Return the state of runs and jobs, and a note if Slurm could not be asked."""
    from dbmpi.machine import slurm

    jobs, note = slurm.queue()
    if not names:
        chosen = [job for job in jobs if job.alive and Path(job.script).name == SCRIPT]
        if not chosen:
            raise UserError(
                f"status: {note or 'no job of dbmpi submit waits or runs'}; expected the directory of a run, or the "
                "number of a job"
            )
        directories = dict.fromkeys(Path(job.script).parent for job in chosen)
        return [_of_run(directory, jobs) for directory in directories], ""
    shown: list[RunStatus] = []
    for name in names:
        if not slurm.is_number(name) or Path(name).exists():
            shown.append(_of_run(Path(name), jobs))
            continue
        found = [job for job in jobs if name in (job.number, job.number.partition("_")[0])]
        if not found and not note:
            found, note = slurm.account([name])
        if not found:
            raise UserError(f"job {name}: {note or 'Slurm does not know it'}; give the directory of its run instead")
        for job in found:
            run = Path(job.script).parent
            known = job.script and Path(job.script).name == SCRIPT
            shown.append(_of_run(run, [job]) if known else RunStatus(f"job {job.number}", job, None, working=False))
    return shown, note


def _of_run(directory: Path, jobs: list[SlurmJob]) -> RunStatus:
    """Return the state of a run; its job is one with the script in its directory, or the one that it has recorded."""
    from dbmpi.checkpoint.run_presence import RunPresence
    from dbmpi.machine import slurm
    from dbmpi.monitor.live_run import LiveRun
    from dbmpi.monitor.records import without_records
    from dbmpi.monitor.tail import RecordTail

    options.refuse_configuration(directory, "status", "the directory of a run, or the number of a job")
    working = RunPresence(directory).look()
    live = LiveRun()
    live.add(RecordTail(directory).poll())
    recorded = "" if live.start is None else live.start["job"]
    script = directory / SCRIPT
    # The first component of a heterogeneous job stands for all.
    found = [job for job in jobs if job.number.removesuffix("+0") == recorded or job.belongs_to(script)]
    if recorded and not found:
        found, _ = slurm.account([recorded])
    if not live.session and not found:
        raise UserError(without_records(directory))
    found.sort(key=lambda job: (job.alive, job.order[0], [-part for part in job.order[1:]]))
    job = found[-1] if found else None
    if job is not None and job.number.removesuffix("+0") == recorded and not job.alive:
        working = False  # a job that was killed leaves its lock behind, which on another host looks like a living one
    shown = os.path.relpath(directory) if directory.is_relative_to(Path.cwd()) else str(directory)
    return RunStatus(shown, job, live if live.session else None, working)


def _age(written: float) -> str:
    from dbmpi.monitor.display import duration

    return duration(max(0.0, time.time() - written))
