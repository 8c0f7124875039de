"""Matrix products of every provider against NumPy in float64."""

import os
import subprocess
import sys
import threading
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.errors import UserError
from dbmpi.kernels import matmul, tiles
from dbmpi.kernels.tiles import SHAPES, TiledProduct, tile_shape

SIZES = st.integers(1, 150)
COLUMNS = {
    np.float32: SIZES,
    np.float64: st.sampled_from([n for n in range(1, 151) if tile_shape(n, np.dtype(np.float64)) in (SHAPES[0], None)]),
}
"""Of an output: for float32 tiles of every shape, for float64 one (each is compiled anew, as long as all else)."""
ORDERS = st.sampled_from("CF")


@pytest.fixture
def provider():
    """Gives a function that chooses a provider, and restores the choice afterwards."""
    before = matmul._Choice.names
    yield lambda name: matmul.use([name] * len(matmul.KINDS))
    matmul._Choice.names = before


def _matrices(m, k, n, orders, dtype, seed):
    random = np.random.default_rng(seed)
    a = np.asarray(random.normal(size=(m, k)), dtype, order=orders[0])
    b = np.asarray(random.normal(size=(k, n)), dtype, order=orders[1])
    return a, b


def _check(out, a, b):
    _check_against(_exact(a, b), out, a, b)


def _exact(a, b):
    """Return the product in a type whose rounding is nothing beside that of the matrices' own."""
    exact = np.longdouble if a.dtype == np.float64 else np.float64
    return a.astype(exact) @ b.astype(exact)


def _check_against(exact, out, a, b):
    bound = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)  # of the errors of any order of summation
    assert (np.abs(out - exact) <= a.shape[1] * np.finfo(out.dtype).eps * bound).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(
    m=SIZES,
    k=st.integers(1, 400),
    orders=st.tuples(ORDERS, ORDERS),
    seed=st.integers(0, 2**32),
    add=st.booleans(),
    data=st.data(),
)
def test_tiled_products(dtype, m, k, orders, seed, add, data):
    n = data.draw(COLUMNS[dtype], "n")
    a, b = _matrices(m, k, n, orders, dtype, seed)
    memory = np.full(m * n + 2, 7, dtype)
    out = memory[1:-1].reshape(m, n)
    TiledProduct()(a, b, out, add)
    if add:  # as one more column of `a` and row of `b`
        a, b = np.c_[a, np.full(m, 7, dtype)], np.r_[b, np.ones((1, n), dtype)]
    _check(out, a, b)
    assert memory[0] == memory[-1] == 7


@pytest.mark.parametrize("orders", ["CC", "CF", "FC", "FF"])
@given(k=st.integers(1, 1500), n=SIZES, add=st.booleans())
def test_tiled_products_in_several_pieces(orders, k, n, add):
    a, b = _matrices(40, k, n, orders, np.float32, 1)
    out, expected = np.ones((2, 40, n), np.float32)
    TiledProduct()(a, b, expected, add)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "PACKED_BYTES", 100_000)
        TiledProduct()(a, b, out, add)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", matmul.PROVIDERS)
@pytest.mark.parametrize("orders", ["CC", "CF", "FC", "FF"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_products_of_every_provider(name, orders, dtype, provider):
    provider(name)
    a, b = _matrices(331, 517, 192, orders, dtype, 1)
    assert a.size * b.shape[1] > matmul.LARGE
    out, exact = np.empty((331, 192), dtype), _large(dtype)
    matmul.product(a, b, out)
    _check_against(exact, out, a, b)
    matmul.product(a, b, out, add=True)
    _check_against(2 * exact, out, np.c_[a, a], np.r_[b, b])


@cache
def _large(dtype):
    """Return the exact product of the matrices of `test_large_products_of_every_provider`, whose order is any."""
    return _exact(*_matrices(331, 517, 192, "CC", dtype, 1))


@pytest.mark.parametrize("name", matmul.PROVIDERS)
def test_products_of_parts_of_arrays(name, provider):
    """Arrays with gaps are nobody's speciality, but must be right."""
    provider(name)
    a, b = _matrices(700, 600, 256, "CC", np.float32, 1)
    out = np.zeros((700, 512), np.float32)
    matmul.product(a[::2, 5:505], b[5:505], out[::2, :256])
    _check(out[::2, :256], a[::2, 5:505], b[5:505])
    assert not out[1::2].any()


def test_not_a_number_reaches_its_row_and_column_only():
    a, b = _matrices(50, 300, 70, "CC", np.float32, 1)
    a[20, 7] = np.nan
    out = np.empty((50, 70), np.float32)
    TiledProduct()(a, b, out)
    assert np.isnan(out[20]).all()
    assert not np.isnan(np.delete(out, 20, axis=0)).any()


@pytest.mark.parametrize("add", [False, True])
def test_an_overflow_is_infinite_without_a_word(add, recwarn):
    """Otherwise every rank of a run that diverges would print a warning of its own beside the one message."""
    out = np.ones((2, 3), np.float32)
    matmul.product(np.full((2, 4), 1e30, np.float32), np.full((4, 3), 1e30, np.float32), out, add)
    assert np.isposinf(out).all()
    assert not list(recwarn)


def test_a_tiled_product_does_not_depend_on_the_other_rows_and_columns():
    a, b = _matrices(100, 300, 128, "CC", np.float32, 1)
    multiply = TiledProduct()
    whole, part = np.empty((100, 128), np.float32), np.empty((37, 50), np.float32)
    multiply(a, b, whole)
    multiply(a[11:48], np.ascontiguousarray(b[:, 30:80]), part)
    np.testing.assert_array_equal(part, whole[11:48, 30:80])


def test_threads_of_the_caller_do_not_share_panels(provider):
    provider("tiles")
    cases = [_matrices(300, 400, 128, "CC", np.float32, seed) for seed in range(4)]
    outs = [np.empty((300, 128), np.float32) for _ in cases]

    def work(number):
        for _ in range(20):
            matmul.product(*cases[number], outs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (a, b), out in zip(cases, outs, strict=True):
        _check(out, a, b)


@pytest.mark.parametrize(("k", "shape"), [(4, (3, 5)), (5, (3, 6)), (5, (5, 3))])
def test_shapes_that_do_not_fit_are_refused(k, shape):
    with pytest.raises(ValueError, match=r"\(3, 5\).*do not give the shape"):
        matmul.product(np.ones((3, 5)), np.ones((k, 5)), np.ones(shape))


@pytest.mark.parametrize(
    ("layer", "timed"), [((90, 300, 64), True), ((700, 300, 17), False), ((1 << 14, 1 << 12, 64), True)]
)
def test_probing_times_the_providers_of_each_kind(layer, timed):
    found = matmul.probe(layer, repeats=1)
    assert len(found) == len(matmul.KINDS)
    for seconds in found[:2]:  # those that have as many columns as samples
        assert set(seconds) == (set(matmul.PROVIDERS) if timed else {"numpy"})
        assert all(0 < one < 1 for one in seconds.values())


@pytest.fixture
def unchosen(provider, monkeypatch):
    """Lets a test choose anew."""
    monkeypatch.delenv(matmul.VARIABLE, raising=False)
    monkeypatch.setattr(matmul._Choice, "names", ())


@pytest.mark.usefixtures("unchosen")
def test_only_a_clearly_faster_provider_is_preferred_for_each_kind_alone(monkeypatch):
    seconds = [{"tiles": 1.0, "numpy": 0.97}, {"tiles": 1.0, "numpy": 0.9}, {"numpy": 1.0}]
    given = []
    monkeypatch.setattr(matmul, "probe", lambda layer: given.append(layer) or seconds)
    assert matmul.providers((300, 200, 100)) == ("tiles", "numpy", "numpy")
    assert matmul.providers() == ("tiles", "numpy", "numpy")  # once and for all
    assert given == [(300, 200, 100)]


@pytest.mark.parametrize("by_tiles", range(3))
def test_each_kind_goes_to_its_own_provider(by_tiles, provider, monkeypatch):
    provider("numpy")
    matmul.use(["tiles" if kind == by_tiles else "numpy" for kind in range(3)])
    went = []
    monkeypatch.setattr(matmul, "_tiles", lambda: lambda a, b, out, add: went.append(a.shape))
    weights, inputs, gradient = (np.zeros(shape, np.float32) for shape in ((640, 320), (320, 128), (640, 128)))
    for a, b in ((weights, inputs), (weights.T, gradient), (gradient, inputs.T)):
        matmul.product(a, b, np.empty((a.shape[0], b.shape[1]), np.float32))
    assert went == [((640, 320), (320, 640), (640, 128))[by_tiles]]


@pytest.mark.usefixtures("unchosen")
def test_unknown_providers_are_refused(monkeypatch):
    monkeypatch.setenv(matmul.VARIABLE, "mkl")
    with pytest.raises(UserError, match=r"DBMPI_MATMUL=mkl.*auto, tiles, numpy$"):
        matmul.providers()


@pytest.mark.parametrize("name", ["numpy", "tiles"])
def test_the_environment_names_the_provider(name):
    program = "from dbmpi.kernels import matmul; print(*matmul.providers())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, matmul.VARIABLE: name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [name] * 3
