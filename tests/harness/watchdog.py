"""A time limit on every test that runs without a launcher, so that a hang is a failure with stacks.

After the limit an alarm raises in the main thread: the test fails there and the session goes on.  A main thread that
hangs in compiled code never gets to Python's handler; some seconds later the fault handler's own thread, which needs no
interpreter lock, therefore writes all stacks and ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Generator, Iterator
from types import FrameType

import pytest

from harness.environment import timeout_scale
from harness.selection import seconds_of

_GRACE_SECONDS = 15.0
# The test may swallow the first failure, as Hypothesis does when it shrinks an example: it then comes again.
_AGAIN_SECONDS = 5.0


class Watchdog:
    """Puts the limit on setup, call and teardown of each test, and lets SIGTERM end the session in order."""

    def __init__(self, config: pytest.Config) -> None:
        self._stderr = os.dup(2)  # while tests run, pytest keeps what they write to descriptor 2
        config.add_cleanup(lambda: os.close(self._stderr))
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # Fixtures are torn down then, which ends the programs that tests have started.
            signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit("terminated", returncode=128 + number))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._limit(item):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._limit(item):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._limit(item):
            return (yield)

    @contextlib.contextmanager
    def _limit(self, item: pytest.Item) -> Iterator[None]:
        seconds = seconds_of(item)

        def give_up(number: int, frame: FrameType | None) -> None:
            pytest.fail(f"still running after {seconds:g} s\n{_stacks()}")

        before = signal.signal(signal.SIGALRM, give_up)
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS * timeout_scale(), exit=True, file=self._stderr)
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, before)


def _stacks() -> str:
    """Return the stacks of all threads, as text."""
    return "\n".join(
        f"Thread {thread}:\n" + "".join(traceback.format_stack(frame))
        for thread, frame in sys._current_frames().items()
    )
