"""When checkpoints are tried again, by a clock that the test sets."""

import pytest

from dbmpi.checkpoint.attempts import Attempts
from dbmpi.config import CheckpointSection
from dbmpi.errors import DiskFailed, RunFailed

FULL = DiskFailed("step-5.h5: could not be written: No space left on device; the last checkpoint is step-4.h5")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(**settings) -> tuple[Attempts, Clock, list[str]]:
    clock, said = Clock(), []
    return Attempts(CheckpointSection(**settings), 60.0, said.append, clock), clock, said


def test_a_failure_is_said_once_and_tried_again_sooner():
    attempts, clock, said = make(every_seconds=600)
    assert not attempts.due
    clock.now += 600
    assert attempts.due
    for _ in range(3):
        attempts.fail(FULL)
        assert not attempts.due
        clock.now += 30
        assert attempts.due
    assert said == [
        f"{FULL}; the run goes on without a new checkpoint, and tries again every 30 s until one is written"
    ]
    attempts.succeed()
    assert said[1:] == ["a checkpoint is written again, after 3 failed attempts"]
    clock.now += 599
    assert not attempts.due
    clock.now += 1
    assert attempts.due
    attempts.succeed()
    assert len(said) == 2


def test_without_checkpoints_in_the_middle_none_is_due():
    attempts, clock, _ = make(every_seconds=0)
    clock.now += 1e9
    assert not attempts.due


def test_the_last_one_is_tried_at_once_and_then_for_a_while():
    attempts, clock, said = make(every_seconds=600)
    attempts.fail(FULL)
    assert attempts.ready_at_the_end
    began, tries = clock.now, 0
    while clock.now < began + 60:
        if attempts.ready_at_the_end:
            attempts.fail_at_the_end(FULL)
            tries += 1
        clock.now += 0.5
    assert 5 <= tries <= 12
    with pytest.raises(RunFailed, match=r"given up after 60 s: .*the last checkpoint is step-4\.h5"):
        attempts.fail_at_the_end(FULL)
    assert "is tried again for 60 s" in said[1]
    assert all("still cannot be written" in line for line in said[2:])
