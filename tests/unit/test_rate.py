"""The rate that is shown while a run goes on."""

from __future__ import annotations

import pytest

from dbmpi.monitor.measures import Rate


def test_a_slow_step_counts_all_its_time() -> None:
    rate = Rate()
    for _ in range(4):
        for _ in range(59):
            rate.add(0, 1.0)
        rate.add(120, 1.0)
    assert rate.per_second == pytest.approx(2.0, rel=1e-3)


def test_samples_that_are_told_of_late_do_not_look_fast() -> None:
    rate = Rate()
    for _ in range(20):
        rate.add(0, 0.999)
        rate.add(8, 0.001)
    assert rate.per_second == pytest.approx(8.0)


def test_it_follows_a_run_that_becomes_slower() -> None:
    rate = Rate(memory=5)
    assert rate.per_second == 0
    for _ in range(20):
        rate.add(100, 1.0)
    assert rate.per_second == pytest.approx(100)
    for _ in range(20):
        rate.add(10, 1.0)
    assert 10 < rate.per_second < 13
