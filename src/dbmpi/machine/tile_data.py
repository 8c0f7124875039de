"""Asks the kernel for the tile registers of AMX, whose contents it does not keep for every process."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18
"""Numbers of Linux on x86-64: of the call, of the request for a state that is not kept by default, and of tile data."""


@cache
def refusal() -> str:
    """Ask for tile data, for all threads of the process; return why not, empty if granted."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"{sys.platform} on {platform.machine()} has no request for tile data"
    libc = ctypes.CDLL(None, use_errno=True)
    request = (ctypes.c_long(number) for number in (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA))
    if libc.syscall(*request):
        return f"the kernel refuses tile data: {os.strerror(ctypes.get_errno())}"
    return ""
