"""Runs the parallel tests of a plain session: one start of the launcher for each rank count.

The start costs seconds and is paid once for all tests of a count.  It is paid again after a test that hangs, loses a
rank, or fails on some ranks only: what such a test leaves under way must not spoil the next one.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import pytest

from harness import reports
from harness.selection import seconds_of, size_of
from harness.world import World


class Supervisor:
    """The plugin of a session without a launcher."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._world: World | None = None
        self._cannot_start: dict[int, reports.Broken] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Generator[None, object, object]:
        """Put the parallel tests last, in the order of their rank counts."""
        result = yield
        items.sort(key=lambda item: size_of(item) or 0)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        size = size_of(item)
        if size is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._run(item, size, last=nextitem is None or size_of(nextitem) != size):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self) -> None:
        self._end()

    def _run(self, item: pytest.Item, size: int, *, last: bool) -> list[pytest.TestReport]:
        """Return the reports of one test; the world that runs it may have run ahead already."""
        started = time.monotonic()
        if size in self._cannot_start:
            return [reports.incomplete(item, size, {}, self._cannot_start[size], 0.0)]
        world = self._world_for(item, size)
        broken = None if world.begun else world.wait_for_begin()
        if broken is not None:
            self._cannot_start[size] = broken
        else:
            broken = world.wait_for(item.nodeid, seconds_of(item))
        own = world.reports[item.nodeid]
        if broken is not None:
            self._end()
            return [reports.incomplete(item, size, own, broken, time.monotonic() - started)]
        fresh = reports.differ(own)
        merged = reports.merge(item, dict(sorted(own.items())))
        if last and not fresh:
            broken = world.wait_for_end()
            if broken is not None:
                merged.append(reports.incomplete(item, size, {}, broken, 0.0))
                merged[-1].when = "teardown"
        if last or fresh:
            self._end()
        return merged

    def _world_for(self, item: pytest.Item, size: int) -> World:
        """Return the world in which the test is; a new one runs it and all that follow on as many ranks."""
        if self._world is None:
            items = item.session.items
            following = items[items.index(item) :]
            self._world = World(self._config, size, [other.nodeid for other in following if size_of(other) == size])
        return self._world

    def _end(self) -> None:
        if self._world is not None:
            self._world.end()
            self._world = None
