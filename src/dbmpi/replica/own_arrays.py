"""Arrays by name, as a user's own objective gives them: dictionaries, which may be within one another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dbmpi.errors import UserError

KEY = re.compile(r"[A-Za-z0-9_][\w.\-]*")
EXAMPLE = "expected a dictionary of float arrays, e.g. {'weights': numpy.zeros((3, 2))}, also within one another"


def flat_floats(given: Any, what: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and arrays of what is `given`, as floating-point numbers; `what` it is, for messages.

    Raises
    ------
    UserError
        If it is something else than a dictionary of such arrays.
    """
    for name, value in flat(given, what):
        array = np.asarray(value)
        if array.dtype.kind != "f" or array.size == 0:
            raise UserError(f"{what}: {name} is {shown(value)}; {EXAMPLE}")
        yield name, array


def flat(given: Any, what: str, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names such as ``layer/weights`` and what a dictionary has under them.

    Parameters
    ----------
    given
        The dictionary.
    what
        What it is, for messages.
    before
        What names begin with.

    Raises
    ------
    UserError
        If it is no dictionary, or one of its keys cannot be a name.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{what}: given {shown(given)}; {EXAMPLE}")
    if before and not given:
        raise UserError(f"{what}: the dictionary {before[:-1]!r} is empty; {EXAMPLE}")
    for key, value in given.items():
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise UserError(f"{what}: {key!r} is no name for an array; expected letters, digits, '_', '.' and '-'")
        if isinstance(value, Mapping):
            yield from flat(value, what, f"{before}{key}/")
        else:
            yield f"{before}{key}", value


def single(values: np.ndarray) -> np.ndarray:
    """Return the `values` as they will be kept."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def shown(value: Any) -> str:
    """Describe a `value` that a user's code gave."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    return f"{type(value).__name__} {value!r:.60}"
