"""MPI's own abort may wait without end for a launcher that is cut off: the process ends all the same."""

from __future__ import annotations

import subprocess
import sys
import time

from harness.environment import timeout_scale

PROGRAM = """
import ctypes
from dbmpi.errors import RunFailed
from dbmpi.mpi import world

class Job:
    rank, size = 1, 2

    def Abort(self, code):
        ctypes.PyDLL(None).sleep(300)  # holds Python's lock, as MPICH's does

world._job, world._FOR_THE_ABORT = Job(), 1.0
world.report_and_abort(RunFailed("stalled"))
"""


def test_a_process_ends_where_the_abort_does_not_return() -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stderr) == (1, "dbmpi: rank 1: stalled\n")
    assert time.monotonic() - begun < 30 * timeout_scale()
