"""Waiting: it serves, sleeps longer and longer, and ends with a reason; a slow or suspended run is no stall."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from dbmpi.errors import RunFailed, UserError
from dbmpi.mpi import waiting


class Clock:
    """A clock that only sleeps of the test's own thread and the test move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []
        self._thread, self._really_sleep = threading.get_ident(), time.sleep
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)
        monkeypatch.setattr(os, "sched_yield", lambda: self.sleep(0))

    def sleep(self, seconds: float) -> None:
        if threading.get_ident() != self._thread:  # the watchdog of an earlier test
            self._really_sleep(seconds)
            return
        self.sleeps.append(seconds)
        self.now += max(seconds, 1e-6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_what_holds_already_is_not_waited_for(clock: Clock) -> None:
    waiting.until(lambda: True, "nothing")
    assert clock.sleeps == []


def test_sleeps_grow_up_to_the_longest(clock: Clock) -> None:
    backoff = waiting.Backoff(shortest=1e-5, longest=1e-3)
    for _ in range(140):
        backoff.sleep()
    yields = clock.sleeps.count(0)  # the first sleep included
    assert sum(clock.sleeps) + 1e-6 * yields == pytest.approx(clock.now)
    assert 1e-6 * yields == pytest.approx(1e-4, rel=0.1)
    assert clock.sleeps[yields : yields + 3] == pytest.approx([1e-5, 1.25e-5, 1.5625e-5])
    assert clock.sleeps[-3:] == [1e-3] * 3
    assert clock.sleeps == sorted(clock.sleeps)
    backoff.reset()
    backoff.sleep()
    assert clock.sleeps[-1] == 0


def test_a_stall_ends_with_what_was_waited_for(clock: Clock) -> None:
    with pytest.raises(RunFailed, match="nothing moved for 5 s while waiting for the tide"):
        waiting.until(lambda: False, "the tide", seconds=5)
    assert 5 < clock.now < 5.1


def test_what_is_waited_for_is_asked_when_it_is_needed(clock: Clock) -> None:
    state = ["early"]

    def look() -> bool:
        state[0] = "late"
        return False

    with pytest.raises(RunFailed, match="waiting for late"):
        waiting.until(look, lambda: state[0], seconds=0.5)


def test_the_default_limit_is_that_of_the_module(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "STALL_SECONDS", 0.25)
    with pytest.raises(RunFailed, match=r"0\.25 s"):
        waiting.until(lambda: False, "anything")


def test_signs_of_life_put_the_end_off(clock: Clock) -> None:
    """Something moves every three seconds: far longer than the limit in all, never as long at a time."""
    moves = iter(range(3, 40, 3))
    due = [next(moves)]

    def serve() -> bool:
        if clock.now < due[0]:
            return False
        due[0] = next(moves, 10**9)
        return True

    with pytest.raises(RunFailed):
        waiting.until(lambda: False, "anything", serve=serve, seconds=5)
    assert 44 < clock.now < 44.2


def test_a_sign_of_life_makes_the_sleeps_short_again(clock: Clock) -> None:
    served = [False] * 150 + [True] + [False] * 5
    answers = iter(served)
    waiting.until(lambda: len(clock.sleeps) >= 155, "sleeps", serve=lambda: next(answers))
    assert clock.sleeps[149] == 1e-3
    assert clock.sleeps[150] == 0


def test_what_others_want_is_served_in_every_wait_and_is_no_sign_of_life(clock: Clock) -> None:
    looks = []
    with waiting.serving(lambda: bool(looks.append(0)) or True), pytest.raises(RunFailed):
        waiting.until(lambda: False, "anything", seconds=1e-4)
    assert len(looks) > 10
    assert not any(clock.sleeps)
    served = len(looks)
    waiting.until(lambda: len(clock.sleeps) > 200, "sleeps")
    assert len(looks) == served


def test_a_suspended_process_has_not_waited_all_that_time(clock: Clock) -> None:
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 10:
            clock.now += 3600
        return looks == 50

    waiting.until(look, "the rest", seconds=5)
    assert clock.now > 3600


@pytest.mark.parametrize("text", ["soon", "", "0", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBMPI_STALL_SECONDS", text)
    with pytest.raises(UserError, match=r"DBMPI_STALL_SECONDS.*a number of seconds above 0"):
        waiting.stall_seconds()


def test_the_limit_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBMPI_STALL_SECONDS", "12.5")
    assert waiting.stall_seconds() == 12.5
    monkeypatch.delenv("DBMPI_STALL_SECONDS")
    assert waiting.stall_seconds() == 600


def test_waiting_costs_little() -> None:
    """Half a second of waiting uses a small part of a core; a loop that spins would use all of it."""
    program = (
        "import time; from dbmpi.mpi import waiting; ends = time.monotonic() + 0.5; before = time.process_time();"
        "waiting.until(lambda: time.monotonic() > ends, 'the end'); print(time.process_time() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.15
