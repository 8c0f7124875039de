"""How much memory there is, and what to say where it is not enough."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

_GIB = 2**30


def available(meminfo: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process can still have: of the machine, of its control group, and of its limits.

    Memory that others take later is not known; nor is what the pages of a file in the cache would be missed for.
    """
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [most, *_of_machine(meminfo), *_of_group(groups), *_of_limits()]
    return max(0, min(found))


def shown(nbytes: float) -> str:
    """Return a number of bytes for people."""
    return f"{nbytes / _GIB:,.1f} GiB" if nbytes >= _GIB / 10 else f"{nbytes / 2**20:,.1f} MiB"


def explain(error: MemoryError) -> str:
    """Return what to tell a user in place of a traceback."""
    reason = " ".join(str(error).split()) or "no more memory could be had"
    return (
        f"out of memory: {reason}; {shown(available())} are available here.  Lower optimizer.batch_size or "
        "data.memory_mib, cut the network over more partitions, or use more hosts"
    )


def _of_machine(meminfo: Path) -> Iterator[int]:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            yield int(rest.split()[0]) * 1024


def _of_group(groups: Path, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield what is left of the limits of the control groups above this process (version 2 and 1)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current") if not controllers else _FIRST_VERSION
        place = (groups / "memory" if controllers else groups) / path.lstrip("/")
        for folder in (place, *place.parents):
            try:
                most, used = ((folder / name).read_text().strip() for name in names)
            except OSError:
                continue
            if most.isdigit() and used.isdigit():
                yield int(most) - int(used) + _given_back(folder)


def _given_back(folder: Path) -> int:
    """Return the bytes of a group that are copies of files, and would be given back."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))


_FIRST_VERSION = ("memory.limit_in_bytes", "memory.usage_in_bytes")


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
