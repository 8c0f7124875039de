"""Arithmetic of whole vectors against NumPy, and their sums against exact rational arithmetic."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbmpi.kernels import sums, vectors

DTYPES = [np.float32, np.float64]
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([2047, 2049, 5000, vectors.BLOCK, vectors.BLOCK + 1, 70_001]))
SEEDS = st.integers(0, 2**32)


def random_vector(random, size, dtype):
    """Return numbers of many magnitudes, with zeros among them."""
    values = random.normal(size=size) * 10.0 ** random.uniform(-6, 6, size)
    values[random.random(size) < 0.1] = 0
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(size=SIZES, kinds=st.lists(st.booleans(), min_size=1, max_size=25), seed=SEEDS, own=st.booleans())
@settings(max_examples=60)
def test_combine_sums_in_double_precision_and_rounds_once(dtype, size, kinds, seed, own):
    random = np.random.default_rng(seed)
    sources = [random_vector(random, size, np.float32 if single else np.float64) for single in kinds]
    coefficients = random.normal(size=len(sources))
    target = np.full(size, 7, dtype)
    if own:
        sources[-1] = target
    expected = np.zeros(size, np.longdouble)
    spread = np.zeros(size)
    for coefficient, source in zip(coefficients, sources, strict=True):
        expected += np.longdouble(coefficient) * source
        spread += abs(coefficient * source)
    largest = vectors.combine(target, coefficients.tolist(), sources)
    error = np.abs(target - expected)
    rounding = np.finfo(dtype).eps / 2 * np.abs(expected) + np.finfo(dtype).smallest_subnormal
    assert np.all(error <= 1.001 * rounding + 2 * len(sources) * np.finfo(np.float64).eps * spread)
    assert largest == np.abs(target).max(initial=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_the_largest(dtype, count, value):
    sources = [np.ones(5000, dtype) for _ in range(count)]
    sources[-1][4321] = value
    target = np.zeros(5000, dtype)
    expected = np.nan if np.isnan(value) else np.inf
    assert not np.isfinite(vectors.combine(target, [1.0] * count, sources))
    assert not np.isfinite(target[4321])
    assert np.isfinite(target).sum() == 4999
    np.testing.assert_equal(vectors.largest_magnitude(sources[-1]), expected)
    assert vectors.largest_magnitude(target[:4321]) == count


@pytest.mark.parametrize("dtype", DTYPES)
@given(size=SIZES, seed=SEEDS)
@settings(max_examples=30)
def test_elementwise_operations(dtype, size, seed):
    random = np.random.default_rng(seed)
    x, y = random_vector(random, size, dtype), random_vector(random, size, dtype)
    product = np.empty(size, dtype)
    vectors.multiply(x, y, product)
    np.testing.assert_array_equal(product, (x.astype(np.float64) * y).astype(dtype))
    point, origin = x.copy(), np.empty(size, dtype)
    vectors.advance(point, origin, 0.3, y)
    np.testing.assert_array_equal(origin, x)
    np.testing.assert_array_equal(point, (x.astype(np.float64) + 0.3 * y.astype(np.float64)).astype(dtype))
    assert vectors.largest_magnitude(x) == np.abs(x).max(initial=0)
    vectors.accrue(origin, 0.3, y)
    np.testing.assert_array_equal(origin, x + dtype(0.3) * y)


def naive_pseudo_gradient(x, g, strength):
    """Equation (4) of Andrew and Gao, from the two one-sided derivatives."""
    right = g + strength * (np.sign(x) if x else 1)
    left = g + strength * (np.sign(x) if x else -1)
    return left if left > 0 else right if right < 0 else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS)
@settings(max_examples=30)
def test_orthant_operations(dtype, seed):
    random = np.random.default_rng(seed)
    x, g, d = (random.integers(-2, 3, 300).astype(dtype) for _ in range(3))
    pseudo = np.empty(300, dtype)
    vectors.pseudo_gradient(x, g, 1.5, pseudo)
    np.testing.assert_array_equal(pseudo, [naive_pseudo_gradient(*pair, 1.5) for pair in zip(x, g, strict=True)])

    aligned = d.copy()
    vectors.align(aligned, g)
    np.testing.assert_array_equal(aligned, np.where(np.sign(d) == np.sign(-g), d, 0))

    projected = d.copy()
    vectors.project(projected, x, pseudo)
    orthant = np.where(x != 0, np.sign(x), np.sign(-pseudo))
    np.testing.assert_array_equal(projected, np.where(np.sign(d) == orthant, d, 0))


def integers(values):
    """Return numbers as integers, exactly: in units of 2^-300."""
    ratios = [value.as_integer_ratio() for value in values.tolist()]
    return [numerator << (301 - denominator.bit_length()) for numerator, denominator in ratios]


def exact(x, y):
    """Return the sum of the products of integers in these units."""
    return Fraction(sum(a * b for a, b in zip(x, y, strict=True)), 1 << 600)


def bounds_of(arrays):
    return [sums.bound(float(np.abs(array).max(initial=0))) for array in arrays]


@given(
    size=st.integers(0, 200),
    kinds=st.lists(st.booleans(), min_size=1, max_size=9),
    seed=SEEDS,
    share=st.floats(0.05, 1),
)
@settings(max_examples=60)
def test_sums_of_products_are_as_precise_as_they_say(size, kinds, seed, share):
    random = np.random.default_rng(seed)
    arrays = [random_vector(random, size, np.float32 if single else np.float64) for single in kinds]
    pairs = [(i, j) for i in range(len(arrays)) for j in range(len(arrays)) if random.random() < share] or [(0, 0)]
    bounds, exactly = bounds_of(arrays), [integers(array) for array in arrays]
    magnitudes = [[abs(value) for value in values] for values in exactly]
    for levels in (sums.COARSE, sums.FINE):
        if levels == sums.COARSE and not all(kinds):
            continue
        limbs = sums.sum_products(arrays, pairs, bounds, levels)
        values = sums.values(limbs, [(bounds[i], bounds[j]) for i, j in pairs])
        for (i, j), found in zip(pairs, values, strict=True):
            expected = exact(exactly[i], exactly[j])
            top = 2.0 ** (bounds[i] + bounds[j])
            error = abs(Fraction(found) - expected)
            if levels == sums.COARSE:
                assert error <= size * 2.0**-52 * top + 2.0**-53 * abs(expected)
            else:
                magnitude = exact(magnitudes[i], magnitudes[j])
                rounded = 0 if kinds[i] and kinds[j] else 2.0**-53 * float(magnitude)
                assert error <= size * 2.0**-104 * top + rounded + 2.0**-53 * abs(expected)


@given(size=st.integers(1, 9000), cuts=st.lists(st.integers(0, 9000), max_size=6), seed=SEEDS, fine=st.booleans())
@settings(max_examples=40)
def test_sums_do_not_depend_on_cuts_or_order(size, cuts, seed, fine):
    random = np.random.default_rng(seed)
    dtype = np.float64 if fine else np.float32
    arrays = [random_vector(random, size, dtype) for _ in range(7)]
    pairs = [(0, j) for j in range(7)] + [(1, j) for j in range(7)] + [(4, 4)]
    bounds, levels = bounds_of(arrays), sums.FINE if fine else sums.COARSE
    whole = sums.sum_products(arrays, pairs, bounds, levels)
    order = random.permutation(size)
    borders = [0, *sorted(min(cut, size) for cut in cuts), size]
    parts = [
        sums.sum_products([array[order][a:b] for array in arrays], pairs, bounds, levels) for a, b in pairwise(borders)
    ]
    random.shuffle(parts)
    total = np.sum(parts, axis=0)
    of_pairs = [(bounds[i], bounds[j]) for i, j in pairs]
    assert sums.values(whole, of_pairs) == sums.values(total, of_pairs)


def test_sums_are_exact_over_many_blocks():
    random = np.random.default_rng(3)
    size = 9 * sums.BLOCK + 12_345
    arrays = [random.integers(-1000, 1000, size).astype(np.float32) for _ in range(12)]
    pairs = [(i, j) for i in range(12) for j in range(i + 1)]
    bounds = bounds_of(arrays)
    expected = [int(np.sum(arrays[i].astype(np.int64) * arrays[j].astype(np.int64))) for i, j in pairs]
    for levels in (sums.COARSE, sums.FINE):
        limbs = sums.sum_products(arrays, pairs, bounds, levels)
        assert sums.values(limbs, [(bounds[i], bounds[j]) for i, j in pairs]) == expected
    magnitudes = sums.sum_magnitudes(arrays[0], bounds[0])
    assert sums.values(magnitudes, [(bounds[0], 0)])[0] == np.abs(arrays[0].astype(np.int64)).sum()


def test_sums_that_one_level_cannot_hold_are_doubtful():
    size = 1000
    x = np.geomspace(1e-9, 1e9, size).astype(np.float32)
    y = (1 / x).astype(np.float32)
    bounds = bounds_of([x, y])
    coarse = sums.sum_products([x, y], [(0, 1), (0, 0)], bounds, sums.COARSE)
    assert sums.doubtful(coarse, size) == [True, False]
    fine = sums.sum_products([x, y], [(0, 1)], bounds, sums.FINE)
    assert sums.values(fine, [(bounds[0], bounds[1])])[0] == pytest.approx(
        math.fsum(x.astype(np.float64) * y), rel=1e-13
    )


@given(
    totals=st.lists(st.lists(st.integers(-(2**62), 2**62), min_size=4, max_size=4), min_size=1, max_size=5),
    ranks=st.integers(1, 1000),
)
def test_limbs_hold_every_integer(totals, ranks):
    """Beside Python's integers; a rank's sum in two levels has less than 2^155 grains, and so has that of all."""
    totals = [[high >> 12, *others] for high, *others in totals]
    limbs = ranks * sums.to_limbs(np.array(totals, np.int64))
    expected = [ranks * ((((high << 32) + low) << 52) + (top << 32) + rest) for high, low, top, rest in totals]
    assert sums.from_limbs(limbs) == expected


@pytest.mark.parametrize("scale", [1e-320, 1e-160, 1e150])
def test_sums_at_the_ends_of_double_precision(scale):
    x = np.array([1.0, 2.0, -3.0]) * scale
    bound = bounds_of([x])
    limbs = sums.sum_products([x], [(0, 0)], bound, sums.FINE)
    # Products below 2^-800 keep an absolute precision of 2^-903 only.
    assert sums.values(limbs, [(bound[0], bound[0])])[0] == pytest.approx(14 * scale**2, rel=1e-12, abs=1e-270)


def test_a_bound_is_the_smallest_power_of_two():
    assert [sums.bound(x) for x in (1.0, 1.5, 2.0, 0.5, 0.75, 3e-310)] == [0, 1, 1, -1, 0, -1028]
