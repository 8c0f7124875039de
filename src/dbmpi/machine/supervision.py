"""Waiting for mpirun where it would itself wait without end: for ranks to start MPI, or for hosts that are cut off."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from dbmpi.machine import processes
from dbmpi.machine.endings import explained

_BETWEEN_POLLS = 0.2
_GRACE = 2.0
"""Seconds that mpirun is given to end by itself, or the first rank to start."""
_FOR_ALL = 4.0
"""Seconds that mpirun is given besides to start all ranks, on a busy machine."""
_FOR_OTHERS = 20.0
"""Seconds that mpirun is given to end when no rank is left on its host, and the first was there."""
_RANK_HERE = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Variables of a rank: its number, that among the ranks of its host, and how many these are."""


def wait(mpirun: subprocess.Popen[bytes], note: Path, kill: signal.Signals) -> int:
    """Wait for mpirun and return its exit code; end it where it would wait without end.

    At the start the other ranks are inside ``MPI_Init``, where no Python runs, and would wait without end for one that
    ends before the first has started MPI: hydra ends them if a rank is killed, but not if it leaves; Open MPI does
    neither where ranks outlive a death.  At the end mpirun waits for its daemons on all hosts, so for ever if one is
    cut off the network.

    Parameters
    ----------
    mpirun
        The launcher.
    note
        File that the first rank makes once MPI has started, if it is on this host; otherwise nothing is watched.
    kill
        The signal that ends the launcher with all ranks.
    """
    code = _through_start(mpirun, note, kill)
    return _through_end(mpirun, note, kill) if code is None else code


def _through_start(mpirun: subprocess.Popen[bytes], note: Path, kill: signal.Signals) -> int | None:
    """Return None once the first rank has started MPI, or the exit code if mpirun has ended."""
    complete = time.monotonic() + _FOR_ALL
    while not note.exists():
        with suppress(subprocess.TimeoutExpired):
            return mpirun.wait(_BETWEEN_POLLS)
        missing = _some_are_missing(mpirun.pid)
        if missing is None:
            return mpirun.wait()  # the first rank is on another host
        if not missing:
            complete = max(complete, time.monotonic())
        elif time.monotonic() - complete > _GRACE and not note.exists():
            return _end(mpirun, note, kill, "a rank has died while MPI started, and the others would wait for it")
    return None


def _through_end(mpirun: subprocess.Popen[bytes], note: Path, kill: signal.Signals) -> int:
    """Return the exit code of an mpirun that has started the first rank, on this host."""
    seen = float("inf")  # where the system does not list processes, nothing is ended
    while True:
        with suppress(subprocess.TimeoutExpired):
            return mpirun.wait(5 * _BETWEEN_POLLS)
        if _ranks(mpirun.pid):
            seen = time.monotonic()
        elif time.monotonic() - seen > _FOR_OTHERS:
            return _end(mpirun, note, kill, "the ranks on this host have ended, and mpirun waits for another host")


def _end(mpirun: subprocess.Popen[bytes], note: Path, kill: signal.Signals, why: str) -> int:
    """End mpirun, and say why if no rank has; return the exit code of the job."""
    code = explained(note)
    if code is None:
        sys.stderr.write(f"dbmpi launch: {why}\n")
    mpirun.send_signal(kill)
    with suppress(subprocess.TimeoutExpired):
        mpirun.wait(_GRACE)
    mpirun.kill()
    mpirun.wait()
    return 128 + signal.SIGKILL if code is None else code


def _ranks(mpirun: int) -> list[dict[str, str]]:
    """Return the environment variables of each rank that mpirun has started here and that lives."""
    found = []
    below = processes.children(mpirun)  # Open MPI's ranks, or hydra's daemon
    for process in (*below, *(rank for child in below for rank in processes.children(child))):
        with suppress(OSError):
            text = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
            variables = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
            if any(name in variables for name, _, _ in _RANK_HERE):
                found.append(variables)
    return found


def _some_are_missing(mpirun: int) -> bool | None:
    """Return whether fewer ranks live on this host than mpirun has started here; None if all do, but not the first."""
    living, expected, first = set(), 0, False
    for variables in _ranks(mpirun):
        with suppress(KeyError, ValueError, StopIteration):
            rank, local, count = next(names for names in _RANK_HERE if names[0] in variables)
            expected = int(variables[count])
            living.add(variables[local])
            # The ranks of a host are counted from 0 in their order: only that of the first has one that agrees.
            first |= variables[rank] == variables[local]
    if living and len(living) == expected and not first:
        return None
    return first and len(living) < expected
