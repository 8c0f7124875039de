"""Products of bfloat16 numbers in pairs, by every engine that this processor has, against float64."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbmpi.kernels import bfloat16, pairs, peaks
from dbmpi.kernels.pairs import PairedProduct

HERE = [name for name in bfloat16.ENGINES[1:] if bfloat16.usable(name)]
needs_an_engine = pytest.mark.skipif(not HERE, reason="this processor multiplies no bfloat16 numbers")
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([32, 64, 96, 256, 260, 300, 513]))


def random_bits(rng, shape, order):
    """Return bfloat16 numbers, and the same in float64."""
    values = rng.normal(size=shape).astype(np.float32)
    bits = np.empty(shape, np.uint16)
    bfloat16.rounded(values, bits)
    wide = np.empty(shape, np.float32)
    bfloat16.widened(bits, wide)
    return np.asarray(bits, order=order), wide.astype(np.float64)


@needs_an_engine
@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("orders", ["CC", "CF", "FC", "FF"])
@settings(max_examples=15)
@given(sizes=st.tuples(SIZES, SIZES, SIZES), add=st.booleans(), seed=st.integers(0, 100))
def test_products_are_those_of_float64(engine, orders, sizes, add, seed):
    m, k, n = sizes
    rng = np.random.default_rng(seed)
    (a, wide_a), (b, wide_b) = (random_bits(rng, *one) for one in (((m, k), orders[0]), ((k, n), orders[1])))
    before = rng.normal(size=(m, n)).astype(np.float32)
    out = before.copy() if add else np.full((m, n), np.nan, np.float32)
    PairedProduct(engine == "amx")(a, b, out, add)
    expected = wide_a @ wide_b + (before if add else 0)
    bound = (np.abs(wide_a) @ np.abs(wide_b) + np.abs(before)) * (k + 2) * 2.0**-24
    assert np.all(np.abs(out - expected) <= bound)


@needs_an_engine
@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("orders", ["CC", "CF", "FC", "FF"])
def test_an_element_does_not_depend_on_its_neighbours(engine, orders, monkeypatch):
    """Neither on the other dimensions, nor on the parts that factors are packed in."""
    rng = np.random.default_rng(2)
    a, _ = random_bits(rng, (100, 1100), orders[0])
    b, _ = random_bits(rng, (1100, 75), orders[1])
    multiply = PairedProduct(engine == "amx")
    whole, part = np.empty((100, 75), np.float32), np.empty((37, 22), np.float32)
    multiply(a, b, whole)
    rows, columns = slice(40, 77), slice(33, 55)
    multiply(np.asarray(a[rows], order=orders[0]), np.asarray(b[:, columns], order=orders[1]), part)
    np.testing.assert_array_equal(part, whole[rows, columns])
    pieces = np.empty_like(whole)
    for size in (1 << 17, 1 << 12):
        monkeypatch.setattr(pairs, "PACKED_BYTES", size)
        multiply(a, b, pieces)
        np.testing.assert_array_equal(pieces, whole)


@needs_an_engine
@pytest.mark.parametrize("engine", HERE)
def test_what_is_not_a_number_stays_where_it_belongs(engine):
    a, b = np.zeros((40, 33), np.uint16), np.zeros((33, 35), np.uint16)
    a[:], b[:] = 0x3F80, 0x3F80  # ones
    a[7, 32], b[32, 3] = 0x7FC0, 0x7F80  # NaN and infinity
    out = np.empty((40, 35), np.float32)
    PairedProduct(engine == "amx")(a, b, out)
    expected = np.full((40, 35), 33.0, np.float32)
    expected[:, 3] = np.inf
    expected[7] = np.nan
    np.testing.assert_array_equal(out, expected)


def chosen(name):
    """Return what a process prints of the engine that it chooses where `name` is the fastest that it may."""
    program = "from dbmpi.kernels import bfloat16 as b; print(b.engine(), b.reason(), sep='|')"
    environment = {**os.environ, bfloat16.VARIABLE: name}
    return subprocess.run((sys.executable, "-c", program), env=environment, capture_output=True, text=True, check=False)


def test_the_engine_can_be_chosen():
    plain = chosen("float32")
    assert plain.stdout.startswith("float32|")
    assert "DBMPI_BFLOAT16=float32 leaves amx out" in plain.stdout
    for name in HERE:
        assert chosen(name).stdout.startswith(f"{name}|")
    wrong = chosen("int4")
    assert wrong.returncode != 0
    assert "DBMPI_BFLOAT16=int4: there is no such engine; known are float32, avx512_bf16, amx" in wrong.stderr


def test_a_refused_request_for_tile_data_is_named(monkeypatch):
    monkeypatch.setattr(bfloat16, "FEATURES", frozenset({"+avx512f", "+avx512bf16", "+amx-tile", "+amx-bf16"}))
    monkeypatch.setattr(bfloat16.tile_data, "refusal", lambda: "the kernel refuses tile data: Operation not permitted")
    monkeypatch.delenv(bfloat16.VARIABLE, raising=False)
    monkeypatch.setattr(bfloat16.peaks, "multiply_add_peak", lambda: 240e9)
    monkeypatch.setattr(bfloat16.peaks, "pairs_peak", lambda tiles: 480e9)
    assert bfloat16._chosen.__wrapped__() == (
        "avx512_bf16",
        ["the kernel refuses tile data: Operation not permitted"],
    )
    monkeypatch.setattr(bfloat16.peaks, "pairs_peak", lambda tiles: 120e9)
    name, why = bfloat16._chosen.__wrapped__()
    assert name == "float32"
    assert why[1] == "AVX512-BF16 is no faster than float32 here (120 of 240 GFLOP/s)"
    monkeypatch.setattr(bfloat16, "FEATURES", frozenset({"+avx2"}))
    assert bfloat16._chosen.__wrapped__() == (
        "float32",
        ["the processor has no AMX", "the processor has no AVX512-BF16"],
    )


def test_without_an_engine_products_are_those_of_rounded_numbers(monkeypatch):
    monkeypatch.setattr(bfloat16, "engine", lambda: "float32")
    rng = np.random.default_rng(4)
    (a, wide_a), (b, wide_b) = random_bits(rng, (50, 40), "C"), random_bits(rng, (40, 30), "F")
    out = np.empty((50, 30), np.float32)
    bfloat16.product(a, b, out)
    np.testing.assert_allclose(out, wide_a @ wide_b, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="do not give the shape"):
        bfloat16.product(a, b.T, out)


@needs_an_engine
@pytest.mark.parametrize("engine", HERE)
def test_no_product_is_faster_than_the_peak(engine):
    peak = peaks.pairs_peak(engine == "amx")
    a, b, out = np.zeros((512, 512), np.uint16), np.zeros((512, 512), np.uint16), np.empty((512, 512), np.float32)
    multiply = PairedProduct(engine == "amx")
    multiply(a, b, out)
    best = np.inf
    for _ in range(5):
        began = time.process_time()
        multiply(a, b, out)
        best = min(best, time.process_time() - began)
    assert 2 * 512**3 / best < 1.2 * peak
