"""Grids of settings: several values in ``--set section.key=a,b,c``, and every combination of them."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dbmpi.errors import UserError

MOST_COMBINATIONS = 1000
_LONGEST_NAME = 100
"""Letters of the name of a directory."""
_PAIRS = {"[": "]", "{": "}", "(": ")"}


class Combination(NamedTuple):
    """One point of a grid."""

    name: str
    """For people and for a directory: ``learning_rate=0.01,rule=sgd``."""
    settings: tuple[tuple[str, str], ...]
    """The settings that vary, and their values here, as they were written."""
    overrides: tuple[str, ...]
    """All settings as ``section.key=value``, also those that do not vary."""


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """Return every combination of the values in some overrides, in the order in which they were given.

    Values are separated by commas; one inside quotes, brackets or braces belongs to its value.

    Parameters
    ----------
    overrides
        Each ``"section.key=value,value,..."``.

    Raises
    ------
    UserError
        If nothing varies, a value is missing, a setting is given twice, or the combinations are too many.

    Examples
    --------
    >>> [each.name for each in combinations(["optimizer.rule=sgd,adam", "optimizer.epochs=5"])]
    ['rule=sgd', 'rule=adam']
    """
    keys, choices = [], []
    for override in overrides:
        key, equals, text = override.partition("=")
        key, values = key.strip(), list(_values(text))
        if not equals or not all(values):
            raise UserError(f"--set {override}: expected section.key=value,value,...; a value is missing")
        if key in keys:
            raise UserError(f"--set {override}: {key} is given twice; give all of its values at once, {key}=a,b,c")
        if len(set(values)) < len(values):
            raise UserError(f"--set {override}: a value is given twice, and its runs would be the same")
        keys.append(key)
        choices.append(values)
    number = math.prod(map(len, choices))
    if number < 2:
        raise UserError(
            "a sweep needs a setting with several values, e.g. --set optimizer.learning_rate=0.01,0.03,0.1; for one "
            "run there is dbmpi train"
        )
    if number > MOST_COMBINATIONS:
        raise UserError(
            f"{number:,} combinations ({' x '.join(str(len(values)) for values in choices)}); expected at most "
            f"{MOST_COMBINATIONS:,}: give fewer values, or sweep one part after the other"
        )
    varied = [place for place, values in enumerate(choices) if len(values) > 1]
    short = _short([keys[place] for place in varied])
    found = []
    for chosen in itertools.product(*choices):
        values = [chosen[place] for place in varied]
        name = _directory(",".join(f"{key}={value}" for key, value in zip(short, values, strict=True)))
        settings = tuple((keys[place], chosen[place]) for place in varied)
        found.append(
            Combination(name, settings, tuple(f"{key}={each}" for key, each in zip(keys, chosen, strict=True)))
        )
    return found


def _values(text: str) -> Iterator[str]:
    """Yield the parts of a text between commas that are in no brackets and no quotes."""
    expected, quote, begin = [], "", 0
    for position, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in _PAIRS:
            expected.append(_PAIRS[letter])
        elif expected and letter == expected[-1]:
            expected.pop()
        elif letter == "," and not expected:
            yield text[begin:position].strip()
            begin = position + 1
    yield text[begin:].strip()


def _short(keys: Sequence[str]) -> list[str]:
    """Return the last words of keys, or the keys where these would be the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return list(keys) if len(set(last)) < len(last) else last


def _directory(name: str) -> str:
    """Return a name for a directory, with a digest where letters had to go."""
    safe = re.sub(r"[^\w.,=+-]+", "_", name)[:_LONGEST_NAME]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
