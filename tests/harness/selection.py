"""What a test's markers say: on how many ranks it runs, how long it may take, and whether a shorter session has it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from harness.environment import timeout_scale

DEFAULT_SECONDS = 60.0
QUICK_RANKS = (2, 3)
"""Rank counts of a quick session, which starts the launcher once for each."""


def sizes_of(node: pytest.Item) -> list[int] | None:
    """Return the rank counts of a parallel test, or None for one that runs without a launcher."""
    marker = node.get_closest_marker("parallel")
    if marker is None:
        return None
    given = marker.args[0] if len(marker.args) == 1 else marker.kwargs.get("sizes")
    sizes = [given] if isinstance(given, int) else given
    if not isinstance(sizes, list | tuple) or not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise pytest.UsageError(f"{node.nodeid}: expected @pytest.mark.parallel([1, 2, 3]), not {given!r}")
    unknown = set(marker.kwargs) - {"sizes", "timeout"}
    if unknown:
        raise pytest.UsageError(f"{node.nodeid}: @pytest.mark.parallel knows no {sorted(unknown)}")
    return list(sizes)


def size_of(item: pytest.Item) -> int | None:
    """Return the number of ranks that this item runs on, or None if it is not a parallel test."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or item.get_closest_marker("parallel") is None:
        return None
    return int(callspec.params["ranks"])


def seconds_of(item: pytest.Item) -> float:
    """Return the time limit of a test in seconds."""
    seconds = DEFAULT_SECONDS
    for name in ("timeout", "parallel"):
        marker = item.get_closest_marker(name)
        if marker is not None:
            seconds = marker.kwargs.get("timeout", marker.args[0] if name == "timeout" and marker.args else seconds)
    return float(seconds) * timeout_scale()


def quick(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the cross-section that a quick session runs.

    That is every test of `tests/unit` that is not marked ``slow``; of every function in `tests/parallel` the first
    variant on the smallest of `QUICK_RANKS`, if it is not slow; and elsewhere those that are marked ``quick``.
    """
    chosen: dict[str, pytest.Item] = {}
    for item in items:
        size = size_of(item)
        function = item.nodeid.partition("[")[0]
        if "unit" not in item.path.parts and "parallel" not in item.path.parts:
            wanted = item.get_closest_marker("quick") is not None
        else:
            wanted = item.get_closest_marker("slow") is None and (size is None or size in QUICK_RANKS)
        if not wanted:
            continue
        if size is None:
            chosen[item.nodeid] = item
        elif function not in chosen or size < (size_of(chosen[function]) or 0):
            chosen[function] = item
    return list(chosen.values())


def each_value(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return what runs every value of every parameter of each test, though not every combination of them.

    The number of ranks is such a parameter, so that each test still runs on every number of ranks that it names, except
    that a test of several ranks does not run on one, too, which proves little about what ranks exchange.  A test of
    which every combination matters is marked ``combinations``.
    """
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen: set[str] = set()
    for variants in functions.values():
        if variants[0].get_closest_marker("combinations") is not None:
            chosen.update(item.nodeid for item in variants)
            continue
        several = [item for item in variants if (size_of(item) or 1) > 1]
        values = {item.nodeid: _values(item) for item in several or variants}
        missing = set().union(*values.values())
        if not missing:
            chosen.update(values)
        while missing:
            best = max(values, key=lambda name: len(values[name] & missing))  # the first of those that are as good
            missing -= values.pop(best)
            chosen.add(best)
    return [item for item in items if item.nodeid in chosen]


def _values(item: pytest.Item) -> set[tuple[object, ...]]:
    """Return what a variant of a test runs with: for each ``parametrize``, its names and the values they have here."""
    callspec = getattr(item, "callspec", None)
    params: dict[str, object] = {} if callspec is None else callspec.params
    together = [marker.args[0] for marker in item.iter_markers("parametrize") if marker.args]
    groups = [names.replace(",", " ").split() if isinstance(names, str) else list(names) for names in together]
    alone = params.keys() - {name for names in groups for name in names}
    # Variants of a test share the values, and not all of them can be compared.
    return {(*names, *(id(params[name]) for name in names)) for names in [*groups, *([name] for name in alone)]}
