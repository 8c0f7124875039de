"""Rounding to bfloat16, and products of it, against float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.kernels import bfloat16


def nearest(values):
    """Return the nearest number with 8 significant bits, the even one of two, in float64; beyond the largest, inf."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    quantum = np.exp2(np.maximum(exponent - 8, -133))  # below 2**-126 all numbers are equally far apart
    found = np.rint(np.ldexp(mantissa, exponent) / quantum) * quantum
    return np.where(np.abs(found) >= 2.0**128, np.copysign(np.inf, found), found)


def bits_to_float(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def rounded(values):
    half, back = np.empty(values.shape, np.uint16), np.empty(values.shape, np.float32)
    bfloat16.rounded(values, half)
    bfloat16.widened(half, back)
    far = np.full(values.size + 40, 7, np.uint16)  # from any place in a cache line on, and nothing beside
    for start in (3, 32):
        bfloat16.rounded(values, far[start : start + values.size].reshape(values.shape), far=True)
        np.testing.assert_array_equal(far[start : start + values.size], half.ravel())
        assert far[start + values.size :].tolist() == [7] * (40 - start)
        far[:] = 7
    return half, back


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.integers(1, 3))
def test_rounding_is_to_the_nearest_and_to_even(bits, rows):
    values = bits_to_float(np.tile(bits, (rows, 1)))
    half, back = rounded(values)
    numbers = np.isfinite(values)
    np.testing.assert_array_equal(back[numbers], nearest(values[numbers]))
    np.testing.assert_array_equal(np.signbit(back), np.signbit(values))
    np.testing.assert_array_equal(np.isnan(back), np.isnan(values))
    np.testing.assert_array_equal(np.isinf(back) & ~numbers, np.isinf(values))
    np.testing.assert_array_equal(half, back.view(np.uint32) >> 16)


def test_rounding_at_its_borders():
    halfway = 0x3F808000 + np.arange(0, 2**17, 2**16)  # between two, of which the first is even, then odd
    cases = [*halfway, *(halfway - 1), *(halfway + 1), 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0xFFFFFFFF]
    cases += [0, 0x80000000, 1, 0x8000, 0x8001, 0x18000]
    values = bits_to_float(np.array(cases))
    half, back = rounded(values)
    assert half[:6].tolist() == [0x3F80, 0x3F82, 0x3F80, 0x3F81, 0x3F81, 0x3F82]
    assert half[6:9].tolist() == [0x7F7F, 0x7F80, 0x7F80]
    assert np.isnan(back[9:11]).all()
    assert half[11:].tolist() == [0, 0x8000, 0, 0, 1, 2]


def test_a_large_array_and_one_with_gaps():
    values = np.random.default_rng(1).normal(size=(300, 1001)).astype(np.float32)
    np.testing.assert_array_equal(rounded(values)[1], nearest(values))
    part = values[::2, 1:-1]
    np.testing.assert_array_equal(rounded(part)[1], nearest(part))
    with pytest.raises(ValueError, match="expected a C-contiguous one"):
        bfloat16.rounded(part, np.empty(values.shape, np.uint16)[::2, 1:-1])


def transposable(random, rows, columns, transposed):
    half, wide = rounded(random.normal(size=(columns, rows) if transposed else (rows, columns)).astype(np.float32))
    return (half.T, wide.T) if transposed else (half, wide)


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 150), st.integers(1, 70)),
    transposed=st.tuples(st.booleans(), st.booleans()),
    add=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_against_float64(shape, transposed, add, seed):
    random, (m, k, n) = np.random.default_rng(seed), shape
    a, wide_a = transposable(random, m, k, transposed[0])
    b, wide_b = transposable(random, k, n, transposed[1])
    before = random.normal(size=(m, n)).astype(np.float32)
    out = before.copy() if add else np.full((m, n), np.nan, np.float32)
    bfloat16.product(a, b, out, add)
    wide_a, wide_b = wide_a.astype(np.float64), wide_b.astype(np.float64)
    expected = wide_a @ wide_b + (before if add else 0)
    bound = np.abs(wide_a) @ np.abs(wide_b) + np.abs(before)
    assert (np.abs(out - expected) <= 2.0**-24 * (k + 2) * bound).all()


@pytest.mark.parametrize("gaps", ["a", "b", "out"])
def test_products_of_matrices_with_gaps(gaps):
    random, (m, k, n) = np.random.default_rng(3), (37, 70, 33)
    step = {name: 2 if name == gaps else 1 for name in ("a", "b", "out")}
    half_a, wide_a = rounded(random.normal(size=(m, k * step["a"])).astype(np.float32))
    half_b, wide_b = rounded(random.normal(size=(k, n * step["b"])).astype(np.float32))
    whole = np.full((m, n * step["out"]), np.nan, np.float32)
    bfloat16.product(half_a[:, :: step["a"]], half_b[:, :: step["b"]], whole[:, :: step["out"]])
    expected = wide_a[:, :: step["a"]].astype(np.float64) @ wide_b[:, :: step["b"]].astype(np.float64)
    np.testing.assert_allclose(whole[:, :: step["out"]], expected, atol=1e-4)
    if gaps == "out":
        assert np.isnan(whole[:, 1::2]).all()


@pytest.mark.parametrize("wrong", range(3))
def test_numbers_of_another_type_are_refused(wrong):
    kinds = [np.uint16, np.uint16, np.float32]
    kinds[wrong] = np.float64 if wrong == 2 else np.float32
    a, b, out = (np.zeros((32, 32), kind) for kind in kinds)
    given = "{} @ {} into {}".format(*(np.dtype(kind) for kind in kinds))
    with pytest.raises(ValueError, match=f"given {given}, expected uint16 @ uint16 into float32"):
        bfloat16.product(a, b, out)


def test_shapes_that_do_not_fit_are_refused():
    a, b = np.zeros((3, 4), np.uint16), np.zeros((5, 2), np.uint16)
    with pytest.raises(ValueError, match=r"\(3, 4\) @ \(5, 2\)"):
        bfloat16.product(a, b, np.zeros((3, 2), np.float32))


def test_the_engine_is_one_of_the_known_and_has_a_reason():
    assert bfloat16.engine() in bfloat16.ENGINES
    assert bool(bfloat16.reason()) == (bfloat16.engine() != bfloat16.ENGINES[-1])
