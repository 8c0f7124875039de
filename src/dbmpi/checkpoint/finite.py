"""Whether numbers are finite, found without memory."""

from __future__ import annotations

import math

import numpy as np


def finite(values: np.ndarray) -> bool:
    """Return whether all `values` are finite: if their sum is, and else only if their float64 sum is.

    A sum with a NaN or an infinity is never finite; that of finite float32 numbers always is in float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(float(np.sum(values))):
            return True
        return math.isfinite(float(np.sum(values, dtype=np.float64)))
