"""Standard streams that a process was started without: ``dbmpi train ... >&-``, and some batch systems and daemons.

Python gives such a stream the value None, on which ``isatty`` and ``flush`` fail; and the next file that is opened gets
the free number, so that what a library writes to standard error would end up in it, for instance in a checkpoint.
"""

from __future__ import annotations

import os
import sys

_STREAMS = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_WRONLY, "w"), ("stderr", os.O_WRONLY, "w"))


def open_closed() -> None:
    """Let the standard streams that are closed lead to ``/dev/null``, for this process and those that it starts."""
    for number, (name, flags, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - to the very end
