"""Amounts of memory, bandwidths and times as people write them: ``64 GiB``, ``10 Gbit/s``, ``20 us``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from dbmpi.errors import UserError

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_BYTES = {f"{prefix}B": factor for prefix, factor in (_DECIMAL | {"K": 1e3} | _BINARY).items()}
_PER_SECOND = {f"{unit}/s": factor for unit, factor in _BYTES.items()}
_BITS_PER_SECOND = {f"{prefix}bit/s": factor / 8 for prefix, factor in _DECIMAL.items()}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*")


def memory(text: str) -> float:
    """Return the bytes that a `text` like ``64 GiB`` says.

    Raises
    ------
    UserError
        If it is no positive number with a unit.

    Examples
    --------
    >>> memory("64 GiB") == 64 * 2**30
    True
    """
    return _amount(text, _BYTES, "memory", "64 GiB or 64 GB")


def bandwidth(text: str) -> float:
    """Return the bytes a second that a `text` like ``10 Gbit/s`` says.

    Raises
    ------
    UserError
        If it is no positive number with a unit.

    Examples
    --------
    >>> bandwidth("10 Gbit/s")
    1250000000.0
    """
    return _amount(text, _PER_SECOND | _BITS_PER_SECOND, "a bandwidth", "10 Gbit/s or 1.2 GB/s")


def seconds(text: str) -> float:
    """Return the seconds that a `text` like ``20 us`` says.

    Raises
    ------
    UserError
        If it is no positive number with a unit.

    Examples
    --------
    >>> seconds("250 ms")
    0.25
    """
    return _amount(text, _SECONDS, "a time", "20 us or 0.1 ms")


def shown_bandwidth(value: float) -> str:
    """Return a bandwidth as text for people.

    Parameters
    ----------
    value
        Bytes a second.
    """
    bits = 8 * value
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bits >= factor:
            return f"{bits / factor:.4g} {prefix}bit/s"
    return f"{bits:.4g} bit/s"


def shown_seconds(value: float) -> str:
    """Return a time as text for people.

    Parameters
    ----------
    value
        Seconds.
    """
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _amount(text: str, units: Mapping[str, float], what: str, example: str) -> float:
    found = _NUMBER.fullmatch(text)
    unit = found[2].replace(" ", "") if found else ""
    if found is None or unit not in units:
        raise UserError(f"{text[:40]!r} is no {what.removeprefix('a ')}: expected a number and a unit, e.g. {example}")
    value = float(found[1]) * units[unit]
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{text[:40]!r}: expected more than 0, e.g. {example}")
    return value
