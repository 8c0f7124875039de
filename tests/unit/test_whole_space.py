"""Few parameters that lie whole on every rank: beside NumPy, in any number and of any size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbmpi.kernels import rows
from dbmpi.methods.local_space import LocalSpace
from dbmpi.methods.whole_space import WholeSpace


@given(st.integers(0, 70), st.integers(1, 25), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_all_operations_beside_a_shard_that_holds_everything(size, count, dtype, seed):
    random = np.random.default_rng(seed)
    names = [f"v{number}" for number in range(count)]
    spaces = WholeSpace(size, dtype), LocalSpace(size, dtype)
    for name in names:
        values = random.normal(size=size) * 10.0 ** random.integers(-5, 5)
        for space in spaces:
            space.create(name, "float32" if name == "v3" else None)  # as a history may be
            space.writable(name)[:] = values
    first, second, third = (names[random.integers(count)] for _ in range(3))
    terms = [(float(random.normal()), name) for name in names]
    step, strength = random.normal(size=2).tolist()
    for space in spaces:
        space.create("a")
        space.create("b")
        space.combine(first, terms)  # which is one of them
        space.advance("a", "b", step, second)
        space.axpy(step, "a", third)
        space.multiply(first, third, "b")
        space.pseudo_gradient(first, second, abs(strength), "a")
        space.scale(second, strength)
        space.align(second, "a")
        space.project(first, third, "a")
    found, expected = spaces
    close = {"rtol": 1e-5 if dtype == np.float32 or count > 3 else 1e-12}
    for name in found.names:
        assert found.array(name).dtype == expected.array(name).dtype
        largest = np.abs(expected.array(name)).max(initial=0)
        np.testing.assert_allclose(found.array(name), expected.array(name), **close, atol=close["rtol"] * largest)
    for name in found.names:
        expected.writable(name)[:] = found.array(name)
    pairs = [(left, right) for left in found.names for right in found.names]
    double = {name: found.array(name).astype(np.float64) for name in found.names}
    sizes = [np.linalg.norm(double[left]) * np.linalg.norm(double[right]) for left, right in pairs]
    exact = np.array([double[left] @ double[right] for left, right in pairs])
    products = found.dots(pairs, names)
    assert (np.abs(products[: len(pairs)] - exact) <= 1e-14 * np.array(sizes)).all()
    np.testing.assert_array_equal(products[len(pairs) :], expected.norms(names))
    np.testing.assert_allclose(found.norms(names, "one"), expected.norms(names, "one"), rtol=1e-14)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e200])
def test_products_without_a_number(bad):
    space = WholeSpace(5, np.float64)
    for name, values in {"bad": [1, 2, bad, 3, 4], "good": [1, 0, 2, 0, 1], "zero": [0, 0, 0, 0, 0]}.items():
        space.create(name)
        space.writable(name)[:] = values
    square, product, other, largest = space.dots([("bad", "bad"), ("bad", "zero"), ("good", "good")], ["bad"])
    assert np.isnan(square)
    assert np.isnan(product) == (bad != 1e200)
    assert other == 6
    np.testing.assert_equal(largest, abs(bad))


def test_sums_keep_their_order_on_every_processor():
    """The compiled loops give what Python's do, to the last bit."""
    random = np.random.default_rng(5)
    table, pairs = random.normal(size=(7, 123)), np.array([(a, b) for a in range(7) for b in range(7)])
    results = np.empty((2, 49))
    for one, result in zip((rows.products, rows.products.py_func), results, strict=True):
        one(table, pairs, result)
    assert results[0].tobytes() == results[1].tobytes()
    targets = np.empty((2, 123), np.float32)
    for one, target in zip((rows.combine, rows.combine.py_func), targets, strict=True):
        one(target, np.arange(1, 8) / 3, table.copy())
    assert targets[0].tobytes() == targets[1].tobytes()


def test_mistakes_are_named():
    space = WholeSpace(3, np.float64)
    space.create("x")
    with pytest.raises(ValueError, match="no vector 'y'"):
        space.dots([("x", "y")])
    with pytest.raises(ValueError, match="no vector 'y'"):
        space.combine("y", [(1.0, "x")])
    with pytest.raises(ValueError, match="nothing to combine"):
        space.combine("x", [])
    with pytest.raises(ValueError, match="a vector of its own"):
        space.advance("x", "x", 1.0, "x")
    with pytest.raises(ValueError, match="order 'max' or 'one'"):
        space.norms(["x"], "two")
