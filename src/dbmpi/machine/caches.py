"""Sizes of a core's caches, as the system describes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_DESCRIPTIONS = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True)
class Caches:
    """Bytes of the caches that each core has for data.

    The defaults are what processors have at least where matrices are multiplied.
    """

    first: int = 32 << 10
    second: int = 512 << 10


@cache
def found(descriptions: Path = _DESCRIPTIONS) -> Caches:
    """Return the caches of this machine's first core; the defaults for what the system does not describe.

    Parameters
    ----------
    descriptions
        Directory of the system's descriptions, one folder a cache.
    """
    sizes = {}
    for folder in sorted(descriptions.glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        known = re.fullmatch(r"([1-9]\d*)([KM]?)", size)
        if kind in ("Data", "Unified") and known is not None:
            sizes[level] = int(known[1]) * _UNITS[known[2]]
    return Caches(sizes.get("1", Caches.first), sizes.get("2", Caches.second))
