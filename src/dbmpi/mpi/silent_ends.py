"""Ends of one rank that Python does not report: the other ranks wait for it, so they become failures with a message.

``sys.exit`` in a user's objective, layer, method or callback leaves no traceback, and ``os._exit`` leaves nothing at
all: MPICH's launcher then ends the job without a line, after ``os._exit(0)`` even with exit code 0.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from dbmpi.errors import RunFailed

if TYPE_CHECKING:
    from mpi4py import MPI


@contextmanager
def aloud(comm: MPI.Comm) -> Iterator[None]:
    """Let no rank leave the block by ending itself without a message.

    ``SystemExit`` becomes RunFailed, which ends all ranks like any exception; ``os._exit`` reports where it was called
    and ends all ranks.  A process alone may end in any way, and so may children that this one has forked, and a
    watchdog in another thread.

    Raises
    ------
    RunFailed
        Instead of SystemExit, if `comm` has several ranks.
    """
    if comm.size == 1:
        yield
        return
    before, ours = os._exit, (os.getpid(), threading.get_ident())

    def end(status: int) -> NoReturn:
        if (os.getpid(), threading.get_ident()) == ours:
            os._exit = before
            from dbmpi.mpi.world import report_and_abort

            caller = traceback.extract_stack(sys._getframe(1), limit=1)
            report_and_abort(RunFailed(f"os._exit({status}) was called{_where(caller)}; the other ranks cannot go on"))
        before(status)

    os._exit = end
    try:
        yield
    except SystemExit as error:
        where = _where(traceback.extract_tb(error.__traceback__))
        name = f"SystemExit: {error.code}" if error.code is not None else "SystemExit"
        raise RunFailed(f"{name}, raised{where}; the other ranks cannot go on without this one") from error
    finally:
        os._exit = before


def _where(frames: traceback.StackSummary) -> str:
    """Return the file and line of the innermost call."""
    return f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
