"""Whether the numbers of a checkpoint agree with one another, whichever program wrote them."""

from __future__ import annotations

import math
from datetime import datetime
from itertools import pairwise

from dbmpi.checkpoint import schema

_MOST = 2**62
"""Counts are added to and stored as 64-bit integers."""
_LAST_YEAR = 9000
"""Moments are added to times, and there is no year 10000."""
_PLACES = schema.INTEGERS | schema.OPTIONAL_INTEGERS | schema.INTEGER_LISTS | schema.TEXTS | schema.OPTIONAL_NUMBERS


class Contradiction(Exception):
    """Which field is wrong, what it holds, and what was expected."""


def check(info: schema.CheckpointInfo) -> None:
    """Raise Contradiction at the first field of `info` that no run can have written beside the others."""
    for name in schema.INTEGERS:
        least = 1 if name in ("shards", "replicas", "partitions") else 0
        _expect(name, least <= getattr(info, name) < _MOST, getattr(info, name), f"at least {least}, and below 2^62")
    for name in schema.INTEGER_LISTS:
        least, numbers = (1 if name == "input_shape" else 0), getattr(info, name)
        wrong = [number for number in numbers if not least <= number < _MOST]
        _expect(name, not wrong, wrong[:1], f"numbers of at least {least}, and below 2^62")
    frontier, learned = info.frontier, info.frontier - len(info.holes)
    _expect("frontier", frontier <= info.total, frontier, f"at most {_where('total')} = {info.total}")
    rising = all(left < right for left, right in pairwise((-1, *info.holes, frontier)))
    _expect("holes", rising, info.holes, f"increasing numbers below {_where('frontier')} = {frontier}")
    versions, done = info.shard_versions, info.done
    _expect("shard_versions", len(versions) == info.shards, versions, f"one for each of {info.shards} shards")
    _expect(
        "begun", 0 <= info.begun <= max(versions), info.begun, f"at least 0, and at most {max(versions)}, a version"
    )
    _expect("done", len(done) in (0, info.replicas), done, f"one for each of {info.replicas} replicas, or none")
    _expect("done", sum(done) <= learned, done, f"no more than the {learned} batches that are learned")
    _expect("step", info.step >= sum(done), info.step, f"at least the {sum(done)} steps of {_where('done')}")
    # A loop of a user's own has no stream, and counts samples only where it needs them.
    enough = info.samples >= info.step or info.total == 0
    _expect("samples", enough, info.samples, f"at least one for each of {info.step} steps")
    _check_measures(info)
    try:
        sound = datetime.fromisoformat(info.created).year <= _LAST_YEAR
    except ValueError:
        sound = False
    _expect("created", sound, info.created[:40], "a time as ISO 8601")


def _check_measures(info: schema.CheckpointInfo) -> None:
    """Check what is said of losses, data and time."""
    for name in schema.OPTIONAL_NUMBERS:
        value = getattr(info, name)
        _expect(name, value is None or math.isfinite(value), value, "a finite number")
    for name in ("accuracy", "test_accuracy"):
        value = getattr(info, name)
        _expect(name, value is None or 0 <= value <= 1, value, "a fraction from 0 to 1")
    for name, value in info.test_metrics.items():
        if not math.isfinite(value) or not is_metric(name):
            raise Contradiction(f"/{schema.TEST_METRICS}/{name[:40]} is {value}, expected a name and a finite number")
    _expect("seconds", info.seconds is None or info.seconds >= 0, info.seconds, "at least 0")
    _expect("data_samples", 0 <= info.data_samples < _MOST, info.data_samples, "at least 0, and below 2^62")
    _expect("test_step", 0 <= info.test_step <= info.step, info.test_step, f"at least 0, and at most {info.step}")
    for name in ("warm_samples", "best_step", "best_waited"):
        value = getattr(info, name)
        _expect(name, 0 <= value < _MOST, value, "at least 0, and below 2^62")


def is_metric(name: str) -> bool:
    """Return whether a metric can have this `name` in a checkpoint."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()


def _expect(name: str, sound: bool, found: object, expected: str) -> None:
    if not sound:
        text = str(found)
        raise Contradiction(f"{_where(name)} is {text if len(text) <= 60 else text[:60] + '...'}, expected {expected}")


def _where(name: str) -> str:
    return f"/{_PLACES[name]}"
