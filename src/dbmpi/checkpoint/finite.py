"""Whether numbers are finite."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

Value = TypeVar("Value")


def finite(values: np.ndarray) -> bool:
    """Return whether all `values` are finite, without memory: if their sum is, and else only if their float64 sum is.

    A sum with a NaN or an infinity is never finite; that of finite float32 numbers always is in float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(float(np.sum(values))):
            return True
        return math.isfinite(float(np.sum(values, dtype=np.float64)))


def finite_or_none(value: Value) -> Value | None:
    """Return a `value`, or None in place of a float that is NaN or infinite, which JSON has not."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
