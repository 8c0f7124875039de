"""Other processes: running a program to ask it something, and what the system knows of one that runs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_TO_END = 10.0
"""Seconds for which a program that took too long may end by itself, e.g. mpirun, which has ranks to end."""
_START_TIME = 19
"""Position in the fields that :func:`stat` returns."""


def ask(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, seconds: float
) -> subprocess.CompletedProcess[str] | None:
    """Run a program without input and return its exit code and output; None if it cannot be run or takes too long.

    Parameters
    ----------
    command
        The program and its arguments.
    environment
        Its environment variables; by default those of this process.
    seconds
        Limit on its time.
    """
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=nothing, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace"
        )
    except OSError:
        return None
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_TO_END)
            return None
        process.kill()
        process.communicate()
        return None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def stat(process: int) -> tuple[str, list[str]]:
    """Return the name of a process, and the fields of its ``/proc/PID/stat`` from the third on; none if it is gone.

    Parameters
    ----------
    process
        Its process id.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", []
    # "pid (name) state parent ...", where the name may itself contain blanks and parentheses
    name, _, fields = text.partition("(")[2].rpartition(")")
    return name, fields.split()


def children(process: int) -> list[int]:
    """Return the ids of the children of a process on this host; none if the system does not list them.

    Parameters
    ----------
    process
        Its process id.
    """
    with suppress(OSError, ValueError):
        files = Path(f"/proc/{process}/task").glob("*/children")
        return [int(child) for file in files for child in file.read_text().split()]
    return []


def system() -> str:
    """Return a text that tells apart hosts of the same name, boots of one machine, and containers on it."""
    boot, processes = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with suppress(OSError):
        processes = os.readlink("/proc/self/ns/pid")
    return f"{os.uname().nodename} {boot} {processes}"


def started(process: int) -> str:
    """Return when a process started, in clock ticks since boot; an empty string if it has ended or is ending.

    Parameters
    ----------
    process
        Its process id.
    """
    fields = stat(process)[1]
    return "" if not fields or fields[0] in "ZX" else fields[_START_TIME]


def lives(process: int, start: str) -> bool:
    """Return whether a process of this host still runs, and is not another one with the same id.

    Parameters
    ----------
    process
        Its process id.
    start
        What :func:`started` returned for it.
    """
    now = started(process)
    if now:
        return now == start
    try:  # a system without /proc, or one that hides the processes of other users
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not Path("/proc/self/stat").exists()  # where there is /proc, one of ours that is not in it is a zombie
