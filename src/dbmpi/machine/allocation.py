"""Memory that the C library keeps when it is freed, for programs that allocate as much again in every step."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``."""


def keep_freed_memory() -> bool:
    """Let malloc reuse large blocks that were freed, instead of giving them back; return whether it will.

    glibc asks the system for each block of more than 32 MiB, which fills it with zeros page by page, and that takes
    several times as long as to copy it.  Settings of malloc in the environment are respected.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
