"""Many trainings in one job of several ranks: the start of one takes longer than a small training.

Each training that is complete is one file of JSON, behind which a second start of a benchmark goes on.  Run as a
program, on all ranks of a job, it trains what a list says, one after the other.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common

Launch = Callable[[int, str, str], Sequence[str]]
"""Returns the command that runs a program with an argument on so many ranks."""
_LINES = 60
"""Of a job's output that are kept for the message of a failure."""
_NOT_FINITE = "finite"
"""In the message of a run that a too large rate has ended."""


@dataclass(frozen=True)
class Training:
    """What is trained: a configuration, and the settings that override it."""

    name: str
    """Of its file, and of its directory while it runs."""
    configuration: Path
    settings: Mapping[str, Any]
    ranks: int
    simulated: bool = False
    """In virtual time, by one process; its number of replicas is a setting."""


@dataclass(frozen=True)
class Found:
    """What a training has come to."""

    accuracy: float
    """At the end, in %; 0 where the numbers overflowed."""
    staleness: float
    samples: int
    seconds: float
    """From the first step to the last; virtual ones if it was simulated."""
    bytes: int
    """Of gradients that were pushed and parameters that were fetched."""
    epochs: list[float]
    """Passes through the samples at each evaluation, those of all replicas together."""
    accuracies: list[float]
    """In %, likewise."""
    elapsed: list[float]
    """Seconds, likewise."""


def found(folder: Path, name: str) -> Found | None:
    """Return what a training has come to, if it is complete."""
    path = folder / f"{name}.json"
    return Found(**json.loads(path.read_text())) if path.exists() else None


def complete(
    folder: Path, wanted: Iterable[Training], until: float, launch: Launch = common.on_ranks, **environment: str
) -> bool:
    """Train what is not complete, one job for each number of ranks; return whether everything is.

    Parameters
    ----------
    folder
        Of the files.
    wanted
        The trainings.
    until
        Time, as ``time.time()`` has it, after which none begins.
    launch
        How a job is started.
    environment
        Further variables of the jobs.
    """
    jobs: dict[int, list[Training]] = {}
    for one in wanted:
        jobs.setdefault(0 if one.simulated else one.ranks, []).append(one)
    for ranks, trainings in sorted(jobs.items()):
        while missing := [one for one in trainings if found(folder, one.name) is None]:
            if time.time() > until:
                return False
            command = launch(ranks, __file__, str(folder)) if ranks else (sys.executable, __file__, str(folder))
            _run_job(folder, missing, until, command, environment)
    return True


def _run_job(
    folder: Path, trainings: Sequence[Training], until: float, command: Sequence[str], variables: Mapping[str, str]
) -> None:
    """Run a job; where a run in it ended because numbers overflowed, note that."""
    begun = folder / "begun"
    begun.unlink(missing_ok=True)
    job = {"until": until, "trainings": [asdict(one) for one in trainings]}
    (folder / "job.json").write_text(json.dumps(job, default=str))
    last: deque[str] = deque(maxlen=_LINES)
    with subprocess.Popen(
        command,
        env=common.environment(1, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            last.append(line)
    if process.returncode == 0:
        return
    text = "".join(last)
    if _NOT_FINITE not in text or not begun.exists():
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}:\n{text}")
    _write(folder, begun.read_text(), Found(0.0, 0.0, 0, 0.0, 0, [], [], []))


def _write(folder: Path, name: str, one: Found) -> None:
    """Write the file of a training, whole or not at all, and remove the directory of its run."""
    new = folder / f"{name}.new"
    new.write_text(json.dumps(asdict(one)))
    new.replace(folder / f"{name}.json")
    shutil.rmtree(folder / name, ignore_errors=True)


def work(folder: Path) -> None:
    """Train what the list of a job says (collective)."""
    common.prepare_runtime()
    import numpy as np

    import dbmpi
    from dbmpi.mpi import waiting, world

    job, comm = json.loads((folder / "job.json").read_text()), world.start()
    for training in job["trainings"]:
        goes_on = np.array([time.time() < job["until"]], np.int64)
        waiting.broadcast(comm, goes_on, 0, "whether there is time")
        if not goes_on[0]:
            return
        name, directory = training["name"], folder / training["name"]
        if comm.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            (folder / "begun").write_text(name)
        overrides = {**training["settings"], "run.directory": directory}
        run = dbmpi.load(training["configuration"], [f"{key}={value}" for key, value in overrides.items()])
        result = dbmpi.simulate(run, comm=comm) if training["simulated"] else dbmpi.train(run, comm)
        if comm.rank == 0:
            one = _read(directory, result)
            _write(folder, name, one)
            print(f"  {name}: {one.accuracy:.2f} % in {one.seconds:.1f} s", file=sys.stderr, flush=True)


def _read(directory: Path, result: Any) -> Found:
    """Return what a run has come to, from its result and its records."""
    from dbmpi.monitor.history import RunHistory
    from dbmpi.monitor.records import read_records

    history = RunHistory(read_records(directory))
    evaluations = history.evaluations
    reports = [report for own in history.workers.values() for report in own]
    return Found(
        100 * result.test.accuracy,
        result.staleness,
        result.samples,
        history.summary().seconds,
        sum(report["pushed_bytes"] + report["fetched_bytes"] for report in reports),
        [record["epoch"] for record in evaluations],
        [100 * record["accuracy"] for record in evaluations],
        [record["elapsed"] for record in evaluations],
    )


if __name__ == "__main__":
    work(Path(sys.argv[1]))
