"""How much memory a process can have, and the message where it is not enough."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GIB = 2**30
_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MEMORY_FILES = {
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""Limit and use of a control group, of version 2 and of version 1."""


def available(meminfo: Path = Path("/proc/meminfo"), groups: Path = _GROUPS) -> int:
    """Return the bytes that this process can still have: of the machine, its control groups, and its own limits.

    What other processes will take is unknown, and so is what it costs to drop the cached pages of files.

    Parameters
    ----------
    meminfo
        The system's file of that name.
    groups
        Folder of the system's control groups.
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *of_group(groups), *_of_limits()]
    if (free := _table(meminfo).get("MemAvailable")) is not None:
        found.append(1024 * free)
    return max(0, min(found))


def control_groups(controller: str, root: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> Iterator[Path]:
    """Yield the folder of this process's control group and of all those above it.

    Parameters
    ----------
    controller
        Of version 1, e.g. ``memory``; empty for version 2.
    root
        Folder of the system's control groups.
    membership
        File with the groups of this process.
    """
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = root / controller / path.lstrip("/")
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def shown(nbytes: float) -> str:
    """Return a number of bytes as text for people.

    Parameters
    ----------
    nbytes
        The number.
    """
    return f"{nbytes / _GIB:,.1f} GiB" if nbytes >= _GIB / 10 else f"{nbytes / 2**20:,.1f} MiB"


def explain(error: MemoryError) -> str:
    """Return the message that a user gets in place of a traceback.

    Parameters
    ----------
    error
        The error; its own text says what the memory was for.
    """
    reason = " ".join(str(error).split()) or "no more memory could be had"
    return (
        f"out of memory: {reason}; {shown(available())} are available here.  Lower optimizer.batch_size or "
        "data.memory_mib, cut the network over more partitions, or use more hosts"
    )


def of_group(root: Path, membership: Path = _MEMBERSHIP) -> Iterator[int]:
    """Yield what is left of the limits of the control groups above this process (version 2 and 1).

    Their files are below `root`, and the file `membership` names the groups of this process.  Copies of files count as
    free: they are given back.
    """
    for controller, names in _MEMORY_FILES.items():
        for group in control_groups(controller, root, membership):
            with suppress(OSError, ValueError):  # no such group, or no limit in it ("max")
                most, used = (int((group / name).read_text()) for name in names)
                files = _table(group / "memory.stat")
                yield most - used + files.get("inactive_file", 0) + files.get("active_file", 0)


def _table(path: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number on each line; none if it cannot be read."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _of_limits() -> Iterator[int]:
    """Yield what is left of ``ulimit -v`` and ``ulimit -d``."""
    try:
        pages = [int(word) for word in Path("/proc/self/statm").read_text().split()]
    except OSError:
        return
    size = os.sysconf("SC_PAGE_SIZE")
    for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            yield most - used * size
