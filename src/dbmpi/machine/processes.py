"""Processes as another process sees them: which one it was, where, and whether it lives."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def system() -> str:
    """Return what tells apart systems that have the same name, starts of a machine, and containers on it."""
    boot, processes = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with suppress(OSError):
        processes = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {processes}"


def lives(process: int, start: str) -> bool:
    """Whether a process of this system is still there, and not another one of the same number.

    Parameters
    ----------
    process
        Its number.
    start
        What :func:`started` said of it.
    """
    found = started(process)
    if found or Path("/proc/self/stat").exists():
        return bool(found) and found == start
    try:  # a system without /proc
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def started(process: int) -> str:
    """Return when a process started, in ticks since the machine did; nothing for one that has ended or is ending."""
    try:
        # The name of the program stands in parentheses, and may hold anything.
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
