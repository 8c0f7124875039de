"""Rounding to bfloat16 that keeps what it leaves, beside exact arithmetic in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dbmpi.kernels import error_feedback

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-40, 3.4028235e38, -3.4028235e38]


def nearest(value: float) -> float:
    """Return the nearest bfloat16 of a finite float32 by exact arithmetic: 8 bits, and exponents from -126 on."""
    if value == 0:
        return value
    unit = 2.0 ** (max(math.frexp(value)[1] - 1, -126) - 7)
    found = round(value / unit) * unit  # Python rounds halves to even, and all of this is exact in float64
    return math.copysign(math.inf, value) if abs(found) >= 2.0**128 else found


def wide(bits: np.ndarray) -> np.ndarray:
    """Return the numbers that the bits of bfloat16 stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("steps", [1, 20])
def test_what_left_and_what_is_kept_add_up_to_what_came(scale: float, steps: int) -> None:
    random, size = np.random.default_rng(steps), 1013
    kept, out = np.zeros(size, np.float32), np.empty(size, np.uint16)
    came, left, most = np.zeros(size), np.zeros(size), np.zeros(size)
    for _ in range(steps):
        values = (random.normal(size=size) * scale * 10.0 ** random.integers(-4, 4, size)).astype(np.float32)
        before = kept.copy()
        error_feedback.round_with_error(values, kept, out)
        total = values + before
        assert np.array_equal(wide(out), [nearest(one) for one in total.tolist()])
        came, left = came + values, left + wide(out)
        most = np.maximum(most, np.abs(total))
        assert np.all(np.abs(kept) <= np.abs(total) * 2.0**-8 + 2.0**-133)
    bound = steps * (most * 2.0**-24 + 2.0**-149)  # a rounding of float32 in each step
    assert np.all(np.abs(left + kept - came) <= bound)
    if steps > 1:  # without what is kept it would be far more
        assert np.any(np.abs(left - came) > bound)


def test_what_is_not_finite_leaves_what_is_kept_alone() -> None:
    values, kept = np.array(SPECIAL, np.float32), np.full(len(SPECIAL), 0.125, np.float32)
    out, before = np.empty(len(SPECIAL), np.uint16), kept.copy()
    error_feedback.round_with_error(values, kept, out)
    broken = ~np.isfinite(values)
    assert broken.sum() == 3
    np.testing.assert_array_equal(kept[broken], before[broken])
    np.testing.assert_array_equal(wide(out)[broken], values[broken])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_are_kept_and_never_become_infinite(sign: int) -> None:
    largest = np.finfo(np.float32).max
    values, kept = np.full(3, sign * largest, np.float32), np.zeros(3, np.float32)
    out = np.empty(3, np.uint16)
    for step in range(1, 400):
        error_feedback.round_with_error(values, kept, out)
        assert np.all(wide(out) == sign * np.float32(error_feedback.LARGEST))
        assert np.all(np.isfinite(kept))
        if step < 5:  # nothing is lost before that is more than a bfloat16 can hold
            np.testing.assert_allclose(kept, step * sign * (largest - error_feedback.LARGEST), rtol=1e-6)
