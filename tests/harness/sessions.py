"""All tests, in four sessions at a time, because tests that start jobs, and those that end them, mostly wait.

    python tests/harness/sessions.py [pytest's options]

Shows the session of tests on several ranks as it goes, then what the others have written; ends with the code of the
first that failed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

SHOWN = ("tests/parallel",)
UNIT = sorted(path.as_posix() for path in Path("tests/unit").glob("test_*.py"))
# Without a file, pytest would run everything.
ASIDE = tuple(
    session
    for session in (
        ("tests/harness", *UNIT[::2]),
        tuple(UNIT[1::2]),
        ("tests/failure", "tests/cluster", "tests/families"),
    )
    if session
)
NOTHING_COLLECTED = 5
SCALE = {"DBMPI_TEST_TIMEOUT_SCALE": "3"}
"""Unless it is set: the sessions share the cores, and the first one on a machine compiles."""


def main(options: list[str]) -> int:
    """Run all sessions, and return an exit code."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    pytest = [sys.executable, "-m", "pytest", *options]
    with ExitStack() as stack:
        written = [stack.enter_context(tempfile.TemporaryFile()) for _ in ASIDE]
        aside = [_start([*pytest, *folders], stack, file) for folders, file in zip(ASIDE, written, strict=True)]
        codes = [session.wait() for session in (_start([*pytest, *SHOWN], stack), *aside)]
        for file in written:
            file.seek(0)
            shutil.copyfileobj(file, sys.stdout.buffer)
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
