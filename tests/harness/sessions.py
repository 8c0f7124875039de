"""All tests, in two sessions at a time: without MPI most tests keep one core busy, with MPI they wait a good deal.

    python tests/harness/sessions.py [pytest's options]

Shows the session with MPI as it goes, then what the other one has written; ends with the code of the first that failed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack

WITHOUT_MPI = ("tests/unit", "tests/harness")
NOTHING_COLLECTED = 5
SCALE = {"DBMPI_TEST_TIMEOUT_SCALE": "3"}
"""Unless it is set: the sessions share the cores, and the first one on a machine compiles."""


def main(options: list[str]) -> int:
    """Run both sessions, and return an exit code."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    pytest = [sys.executable, "-m", "pytest", *options]
    with ExitStack() as stack, tempfile.TemporaryFile() as written:
        without_mpi = _start([*pytest, *WITHOUT_MPI], stack, written)
        with_mpi = _start([*pytest, "tests", *(f"--ignore={folder}" for folder in WITHOUT_MPI)], stack)
        codes = [with_mpi.wait(), without_mpi.wait()]
        written.seek(0)
        shutil.copyfileobj(written, sys.stdout.buffer)
    chosen = [code for code in codes if code != NOTHING_COLLECTED]
    return next((code for code in chosen if code), 0) if chosen else NOTHING_COLLECTED


def _start(argv: list[str], stack: ExitStack, output: object = None) -> subprocess.Popen[bytes]:
    """Start a session, which is ended in order if this program is."""
    session = subprocess.Popen(argv, env=SCALE | os.environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output)  # type: ignore[call-overload]
    stack.callback(session.wait)
    stack.callback(session.terminate)
    return session


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
