"""Speeds that were measured at some sizes, and what lies between them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

Points = Sequence[Sequence[float]]
"""Rows of one or two sizes and the speed that was measured there."""


def between(points: Points, size: float) -> float:
    """Return the speed at a size: between two points by a power law, beyond the last ones theirs.

    Parameters
    ----------
    points
        Rows ``(size, speed)``, at least one.
    size
        Where the speed is asked for, positive.
    """
    rows = sorted((float(row[0]), float(row[1])) for row in points)
    sizes = [row[0] for row in rows]
    if size <= sizes[0]:
        return rows[0][1]
    if size >= sizes[-1]:
        return rows[-1][1]
    above = bisect_left(sizes, size)
    (low, slow), (high, fast) = rows[above - 1], rows[above]
    share = math.log(size / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(slow) + share * math.log(fast))


def between_both(points: Points, size: float, samples: float) -> float:
    """Return the speed at a size and a number of samples, as `between` does in both.

    Parameters
    ----------
    points
        Rows ``(size, samples, speed)``, at least one.
    size, samples
        Where the speed is asked for, positive.
    """
    by_size: dict[float, list[tuple[float, float]]] = {}
    for row in points:
        by_size.setdefault(float(row[0]), []).append((float(row[1]), float(row[2])))
    return between([(one, between(rows, samples)) for one, rows in by_size.items()], size)
