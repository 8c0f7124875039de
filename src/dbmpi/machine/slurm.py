"""Slurm by its commands: submitting a script, and the state of jobs; without such commands, a note says so."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dbmpi.errors import UserError
from dbmpi.machine import processes

_SECONDS = 30.0
"""Limit on a command; the controller of a large cluster may be busy."""
_NUMBER = re.compile(r"\d+(?:[_+]\d+)?")
_QUEUE = "%i|%T|%M|%l|%r|%N|%o"
_ACCOUNT = "JobID,State,Elapsed,Timelimit,Reason,NodeList"
_FIELDS = 6
"""Before the script, whose path may contain anything."""
_WAITING = ("PENDING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING")


@dataclass(frozen=True)
class SlurmJob:
    """A job, or a task of an array, as Slurm shows it."""

    number: str
    """``17``, or ``17_2`` for task 2 of array 17."""
    state: str
    """``PENDING``, ``RUNNING``, ``COMPLETED``, ..."""
    elapsed: str
    """How long it has run since its last start."""
    limit: str
    """Its time limit."""
    reason: str
    """Why it waits or has ended, a word of Slurm's; ``None`` without one."""
    nodes: str
    """Its nodes; empty while it waits."""
    script: str = ""
    """Path of the batch script; empty if unknown."""

    @property
    def alive(self) -> bool:
        """Whether it waits or runs."""
        return self.state in _WAITING or self.state in _RUNNING

    @property
    def order(self) -> tuple[int, ...]:
        """What sorts jobs: the number, and that of the task of an array or of a component of a heterogeneous job."""
        return tuple(map(int, re.findall(r"\d+", self.number)))

    def belongs_to(self, script: Path) -> bool:
        """Return whether the job is of a `script`, which need not exist any more."""
        return bool(self.script) and Path(self.script).resolve() == script.resolve()

    def __str__(self) -> str:
        if self.state in _WAITING:
            why = "" if self.reason in ("None", "") else f": {self.reason}"
            return f"{self.number}  {self.state}{why}"
        where = f" on {self.nodes}" if self.nodes else ""
        limit = f" of {self.limit}" if self.state in _RUNNING and self.limit else ""
        return f"{self.number}  {self.state}{where}, {self.elapsed}{limit}"


def is_number(text: str) -> bool:
    """Return whether a text is the number of a job, or of a task of an array."""
    return _NUMBER.fullmatch(text) is not None


def submit(script: Path) -> str:
    """Submit a script and return the number of its job.

    Parameters
    ----------
    script
        Its path.

    Raises
    ------
    UserError
        If there is no sbatch here, or it refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch: there is no such command, so {script} was written and not submitted; submit it on a host of the "
            "cluster, or use dbmpi launch without Slurm"
        )
    done = processes.ask(["sbatch", "--parsable", str(script)], seconds=_SECONDS)
    if done is None:
        raise UserError(f"sbatch {script}: no answer within {_SECONDS:g} s; squeue shows whether the job was accepted")
    number = done.stdout.strip().partition(";")[0]
    if done.returncode != 0 or not is_number(number):
        raise UserError(f"sbatch {script}: {_last(done.stderr) or f'exit code {done.returncode}'}")
    return number


def queue(numbers: Sequence[str] = ()) -> tuple[list[SlurmJob], str]:
    """Return jobs that Slurm still holds in memory, with those that ended lately, and a note if it does not answer.

    Parameters
    ----------
    numbers
        Of the jobs; by default all of this user.
    """
    chosen = [f"--jobs={','.join(numbers)}"] if numbers else ["--me"]
    return _jobs(["squeue", "--noheader", "--array", "--states=all", *chosen, f"--format={_QUEUE}"])


def account(numbers: Sequence[str]) -> tuple[list[SlurmJob], str]:
    """Return jobs of any age, where the site keeps account of them, and a note if it does not.

    Parameters
    ----------
    numbers
        Of the jobs.
    """
    words = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(numbers)}"]
    return _jobs([*words, f"--format={_ACCOUNT}"])


def has_plugin(name: str) -> bool:
    """Return whether srun can start ranks in a way, ``srun --mpi=NAME``; False without an srun.

    Parameters
    ----------
    name
        Of the way.
    """
    done = processes.ask(["srun", "--mpi=list"], seconds=_SECONDS)
    return done is not None and name in re.split(r"[\s,]+", done.stdout + done.stderr)


def _jobs(command: list[str]) -> tuple[list[SlurmJob], str]:
    if shutil.which(command[0]) is None:
        return [], f"{command[0]}: there is no such command here"
    done = processes.ask(command, seconds=_SECONDS)
    if done is None:
        return [], f"{command[0]}: no answer within {_SECONDS:g} s"
    if done.returncode != 0:
        return [], f"{command[0]}: {_last(done.stderr) or f'exit code {done.returncode}'}"
    lines = (line.split("|", _FIELDS) for line in done.stdout.splitlines())
    return [_job(fields) for fields in lines if len(fields) >= _FIELDS], ""


def _job(fields: list[str]) -> SlurmJob:
    number, state, *others = (field.strip() for field in fields)
    return SlurmJob(number, state.split(" ")[0], *others)


def _last(text: str) -> str:
    """Return the last line of what a program has written, without what could control the terminal."""
    lines = text.strip().splitlines()
    return "".join(letter if letter.isprintable() else "?" for letter in lines[-1]) if lines else ""
