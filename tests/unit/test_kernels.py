"""Elementary functions, activations, losses and updates against NumPy and SciPy in float64."""

import os
import re
import subprocess
import sys

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.codegen import get_host_cpu_features
from scipy import special

from dbmpi.kernels import activations, elementary, losses, reconstruction, updates
from dbmpi.kernels.compile import kernel
from dbmpi.kernels.fields import Blocks
from dbmpi.kernels.llvm.lanes import sum_along_rows
from dbmpi.kernels.llvm.tiles import CHAINS, multiply_add_chains
from dbmpi.kernels.memory import aligned_empty

DTYPES = [np.float32, np.float64]
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 300))


@kernel
def exp_all(x, out):
    for i in range(x.size):
        out[i] = elementary.exp(x[i])


@kernel
def sigmoid_all(x, out):
    for i in range(x.size):
        out[i] = elementary.sigmoid(x[i])


@kernel
def tanh_all(x, out):
    for i in range(x.size):
        out[i] = elementary.tanh(x[i])


@kernel
def log1p_exp_all(x, out):
    for i in range(x.size):
        out[i] = elementary.log1p_exp(x[i])


FUNCTIONS = {
    "exp": (exp_all, elementary.exp, np.exp, (-87.3, 88.7), 1.5),
    "sigmoid": (sigmoid_all, elementary.sigmoid, special.expit, (-87, 90), 3),
    "tanh": (tanh_all, elementary.tanh, np.tanh, (-20, 20), 3),
    "log1p_exp": (log1p_exp_all, elementary.log1p_exp, lambda x: -special.log_expit(-x), (-87, 100), 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementary_functions_are_precise_over_their_range(name, dtype):
    compiled, _, exact, (low, high), ulps = FUNCTIONS[name]
    random = np.random.default_rng(1)
    # evenly, densely around zero, and at all scales down to the smallest normal numbers
    scales = 10.0 ** random.uniform(-37, 1, 100_000) * random.choice([-1, 1], 100_000)
    x = np.concatenate([np.linspace(low, high, 300_001), np.linspace(-1, 1, 100_001), scales]).astype(dtype)
    result = np.empty_like(x)
    compiled(x, result)
    expected = exact(x.astype(np.longdouble if dtype == np.float64 else np.float64))
    errors = np.abs(result - expected) / np.spacing(np.abs(expected).astype(dtype))
    assert errors.max() <= ulps, x[errors.argmax()]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementary_functions_have_the_right_limits(name, dtype):
    compiled, _, exact, _, _ = FUNCTIONS[name]
    x = np.array([np.inf, -np.inf, 1e30, -1e30, 750, -750, 0.0, np.nan], dtype)
    result = np.empty_like(x)
    compiled(x, result)
    with np.errstate(over="ignore"):
        expected = exact(x)
    np.testing.assert_array_equal(result, expected)
    assert np.isnan(result[-1])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementary_functions_give_the_same_in_plain_python(name, dtype):
    compiled, plain, *_ = FUNCTIONS[name]
    x = np.linspace(-30, 30, 301).astype(dtype)
    result = np.empty_like(x)
    compiled(x, result)
    values = [plain(value) for value in x]
    assert all(isinstance(value, dtype | float) for value in values)
    # The compiled code fuses products and sums, Python does not.
    np.testing.assert_allclose(result, values, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_vectorise(name):
    """A call for each element would cost a tenth of a training step."""
    features = get_host_cpu_features()
    if "+fma" not in features or "+avx2" not in features:
        pytest.skip("this processor has other instructions than those looked for")
    function = numba.njit(FUNCTIONS[name][0].py_func)  # one from the cache does not show its instructions
    function(np.ones(1, np.float32), np.ones(1, np.float32))
    (instructions,) = function.inspect_asm().values()
    assert re.search(r"vfn?m(add|sub)\w*ps\s+[^,]*,\s*%[yz]mm", instructions)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_add_chains_computes_what_it_says(dtype):
    run = kernel(_chains)
    rounds = 50
    chains = 0.5 + np.arange(CHAINS) * 2.0**-10
    for _ in range(rounds):
        chains = chains * (1 - 2.0**-10) + 2.0**-17
    assert run(dtype(0.5), rounds) == pytest.approx(0.5 + chains.sum(), rel=1e-5)


def _chains(start, rounds):
    return multiply_add_chains(start, rounds)


@pytest.mark.parametrize("rows", [1, 3, 8, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_along_rows_hold_each_element_once_and_nothing_else(rows, dtype):
    """Of rows with gaps between them, in blocks of two heights; whole numbers, whose sums are exact in any order."""
    blocks = Blocks.of(rows)
    run = _row_sums(blocks.tile)
    random = np.random.default_rng(rows)
    for length in (1, 2, 7, 8, 9, 15, 16, 17, 33, 100):
        for start, gap in ((0, 0), (3, 5)):
            values = random.integers(-999, 1000, (rows, length)).astype(dtype)
            a = np.full((rows, length + gap), np.nan, dtype)
            a[:, :length] = values
            out = np.full(start + rows + 20, 7, dtype)
            before = np.full(start, np.nan, dtype)
            run(blocks.numbers, np.concatenate((before, a.reshape(-1))), start, length + gap, length, out)
            np.testing.assert_array_equal(out[start : start + rows], [sum(row) for row in values.tolist()])
            assert (np.delete(out, slice(start, start + rows)) == 7).all()


def _row_sums(tile):
    def row_sums(blocks, a, start, stride, length, out):
        sum_along_rows(tile, blocks, a, start, stride, length, out, start)

    return kernel(row_sums)


EXACT_ACTIVATIONS = {
    "linear": (lambda x: x, np.ones_like),
    "sigmoid": (special.expit, lambda x: special.expit(x) * special.expit(-x)),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
}


def _plain(function, compiled):
    return function if compiled else function.py_func


@pytest.mark.parametrize("name", EXACT_ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 2**32))
def test_activations_and_their_derivatives(name, dtype, shape, seed):
    random = np.random.default_rng(seed)
    x, gradient = random.normal(size=(2, *shape)).astype(dtype)
    bias = random.normal(size=shape[0]).astype(dtype)
    function, derivative = EXACT_ACTIVATIONS[name]
    inner = x.astype(np.float64) + bias[:, None]
    tolerance = {"rtol": 0, "atol": 50 * np.finfo(dtype).eps}

    outputs = x.copy()
    activations.ACTIVATIONS[name].forward(outputs, bias)
    np.testing.assert_allclose(outputs, function(inner), **tolerance)

    # relu's derivative hangs on the sign that the kernel saw
    expected = gradient * (derivative(inner) if name != "relu" else outputs > 0)
    bias_gradient = np.empty_like(bias)
    activations.ACTIVATIONS[name].backward(outputs, gradient, bias_gradient)
    np.testing.assert_allclose(gradient, expected, **tolerance)
    np.testing.assert_allclose(
        bias_gradient, gradient.sum(axis=1, dtype=np.float64), rtol=2 * np.finfo(dtype).eps, atol=1e-12
    )


@pytest.mark.parametrize("name", EXACT_ACTIVATIONS)
def test_activations_pass_nan_on(name):
    outputs = np.array([[0.0, np.nan, 1.0]], np.float32)
    activations.ACTIVATIONS[name].forward(outputs, np.zeros(1, np.float32))
    np.testing.assert_array_equal(np.isnan(outputs), [[False, True, False]])


def naive_softmax(z, classes):
    logs = special.log_softmax(z, axis=0)
    one_hot = np.eye(len(z))[:, classes]
    return -(logs * one_hot).sum(axis=0), np.exp(logs) - one_hot


def naive_logistic(z, targets):
    return (np.logaddexp(0, z) - targets * z).sum(axis=0), special.expit(z) - targets


def naive_squared(y, targets):
    return 0.5 * ((y - targets) ** 2).sum(axis=0), y - targets


CLASS_LOSSES = {
    "softmax_cross_entropy": naive_softmax,
    "logistic_classes": lambda z, classes: naive_logistic(z, np.eye(len(z))[:, classes]),
    "squared_classes": lambda y, classes: naive_squared(y, np.eye(len(y))[:, classes]),
}


def weighted(naive, values, targets, weights):
    """Each sample's loss and gradient times its weight."""
    losses_of_samples, gradient = naive(values.astype(np.float64), targets)
    wide = weights.astype(np.float64)
    return wide @ losses_of_samples, wide * gradient


VALUE_LOSSES = {"logistic_values": naive_logistic, "squared_values": naive_squared}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_classes_against_naive_twins(name, dtype, compiled):
    @settings(max_examples=40)
    @given(shape=SHAPES if compiled else st.tuples(st.integers(1, 5), st.integers(1, 140)), seed=st.integers(0, 2**32))
    def check(shape, seed):
        random = np.random.default_rng(seed)
        values = (4 * random.normal(size=shape)).astype(dtype)
        classes = random.integers(0, shape[0], shape[1]).astype(np.int32)
        weights = random.choice([0, 0.5, 1, 3], shape[1]).astype(dtype) if seed % 2 else np.ones(shape[1], dtype)
        expected_loss, expected_gradient = weighted(CLASS_LOSSES[name], values, classes, weights)
        expected_correct = (values.argmax(axis=0) == classes).sum()
        loss, correct = _plain(getattr(losses, name), compiled)(values, classes, weights)
        assert loss == pytest.approx(expected_loss, rel=1e-6 if dtype == np.float32 else 1e-13, abs=1e-12)
        assert correct == expected_correct
        tolerance = 20 * np.finfo(dtype).eps / shape[1]
        np.testing.assert_allclose(values, expected_gradient / shape[1], rtol=10 * np.finfo(dtype).eps, atol=tolerance)

    check()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", VALUE_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_values_against_naive_twins(name, dtype, compiled):
    @settings(max_examples=40)
    @given(shape=SHAPES if compiled else st.tuples(st.integers(1, 5), st.integers(1, 40)), seed=st.integers(0, 2**32))
    def check(shape, seed):
        random = np.random.default_rng(seed)
        values = (4 * random.normal(size=shape)).astype(dtype)
        targets = random.uniform(size=shape).astype(dtype)
        weights = random.choice([0, 0.5, 1, 3], shape[1]).astype(dtype) if seed % 2 else np.ones(shape[1], dtype)
        expected_loss, gradient = weighted(VALUE_LOSSES[name], values, targets.astype(np.float64), weights)
        loss = _plain(getattr(losses, name), compiled)(values, targets, weights)
        assert loss == pytest.approx(expected_loss, rel=1e-6 if dtype == np.float32 else 1e-13, abs=1e-7)
        tolerance = 20 * np.finfo(dtype).eps / shape[1]
        np.testing.assert_allclose(values, gradient / shape[1], rtol=10 * np.finfo(dtype).eps, atol=tolerance)

    check()


@pytest.mark.parametrize("magnitude", range(-30, 31, 10))
def test_squared_losses_hold_from_the_smallest_to_the_largest_outputs(magnitude):
    random = np.random.default_rng(8)
    values, targets = ((10.0**magnitude * random.normal(size=(3, 5))).astype(np.float32) for _ in range(2))
    classes, ones = np.array([0, 2, 1, 1, 0], np.int32), np.ones(5, np.float32)
    steps = (values.size, values.size)
    for wanted, found in (
        (targets, lambda y: losses.squared_values(y, targets, ones)),
        (np.eye(3)[:, classes], lambda y: losses.squared_classes(y, classes, ones)[0]),
        (targets, lambda y: reconstruction.squared_error(y[None, None], (targets.reshape(-1), steps), 0.2) / 2),
    ):
        loss, gradient = naive_squared(values.astype(np.float64), wanted.astype(np.float64))
        computed = values.copy()
        assert found(computed) == pytest.approx(loss.sum(), rel=1e-5)
        np.testing.assert_allclose(computed, gradient / 5, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())


def test_of_equal_outputs_the_first_is_the_prediction():
    classes = np.array([0, 1, 2, 0], np.int32)
    for name in CLASS_LOSSES:
        assert getattr(losses, name)(np.zeros((3, 4), np.float32), classes, np.ones(4, np.float32))[1] == 2


def test_softmax_of_huge_logits_is_exact():
    values = np.array([[1e4, -1e4, 3e38], [0, 0, -3e38], [-1e4, 1e4, 0]], np.float32)
    loss, correct = losses.softmax_cross_entropy(values, np.array([0, 0, 0], np.int32), np.ones(3, np.float32))
    assert (loss, correct) == (2e4, 2)
    np.testing.assert_array_equal(values * 3, [[0, -1, 0], [0, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_of_bad_outputs_are_not_finite(name, bad):
    values = np.ones((5, 3), np.float32)
    values[3, 1] = bad
    loss, _ = getattr(losses, name)(values, np.array([0, 1, 2], np.int32), np.ones(3, np.float32))
    assert not np.isfinite(loss)


def naive_prediction(outputs):
    """Return the place of the largest output, or -1 where that is no finite number."""
    if any(np.isnan(output) for output in outputs) or not np.isfinite(max(outputs)):
        return -1
    return list(outputs).index(max(outputs))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_no_class(name, dtype, compiled):
    @settings(max_examples=40)
    @given(seed=st.integers(0, 2**32), units=st.integers(1, 5), samples=st.integers(1, 300 if compiled else 140))
    def check(seed, units, samples):
        random = np.random.default_rng(seed)
        values = random.normal(size=(units, samples)).astype(dtype)
        bad = random.uniform(size=values.shape) < 0.2
        values[bad] = random.choice([np.nan, np.inf, -np.inf], bad.sum())
        predicted = [naive_prediction(outputs) for outputs in values.T]
        classes = np.array([max(place, 0) for place in predicted], np.int32)
        expected = sum(place >= 0 for place in predicted)
        loss, correct = _plain(getattr(losses, name), compiled)(values, classes, np.ones(samples, dtype))
        assert correct == expected
        assert np.isfinite(loss) or bad.any()
        assert expected == samples or not np.isfinite(loss)

    with np.errstate(all="ignore"):
        check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_predictions_against_scipy(dtype):
    values = np.random.default_rng(1).normal(size=(300, 130)).astype(dtype)
    tolerance = 8 * np.finfo(dtype).eps
    outputs = values.copy()
    losses.softmax(outputs)
    np.testing.assert_allclose(outputs, special.softmax(values.astype(np.float64), axis=0), rtol=tolerance)
    outputs = values.copy()
    losses.logistic(outputs)
    np.testing.assert_allclose(outputs, special.expit(values.astype(np.float64)), rtol=tolerance)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(size=st.integers(0, 100), offset=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_updates_equal_numpy_bit_for_bit(compiled, dtype, size, offset, seed):
    random = np.random.default_rng(seed)
    p, g, s = random.normal(size=(3, offset + size)).astype(dtype)[:, offset:]
    s = np.abs(s)
    rate, epsilon = dtype(0.0123), dtype(1e-10)

    result = p.copy()
    _plain(updates.sgd, compiled)(result, g, 0.0123)
    np.testing.assert_array_equal(result, p - rate * g)

    total, result = s.copy(), p.copy()
    _plain(updates.adagrad, compiled)(result, g, total, 0.0123, 1e-10)
    np.testing.assert_array_equal(total, s + g * g)
    np.testing.assert_array_equal(result, p - rate * g / (np.sqrt(s + g * g) + epsilon))

    result = p.copy()
    _plain(updates.add, compiled)(result, g)
    np.testing.assert_array_equal(result, p + g)


@pytest.mark.parametrize("size", [1000, 1_000_003])
def test_updates_of_a_cut_vector_are_the_same(size):
    p, g, s = np.random.default_rng(1).normal(size=(3, size)).astype(np.float32)
    s = np.abs(s)
    whole, parts = (p.copy(), s.copy()), (p.copy(), s.copy())
    updates.adagrad(whole[0], g, whole[1], 0.1, 1e-10)
    for part in np.array_split(np.arange(size), 7):
        piece = slice(part[0], part[-1] + 1)
        updates.adagrad(parts[0][piece], g[piece], parts[1][piece], 0.1, 1e-10)
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("epsilon", [0.0, 1e-30, 1e-10])
def test_adagrad_without_a_gradient_takes_no_step(epsilon):
    p, g, s = np.ones(3, np.float32), np.zeros(3, np.float32), np.zeros(3, np.float32)
    updates.adagrad(p, g, s, 0.1, epsilon)
    np.testing.assert_array_equal(p, 1)
    np.testing.assert_array_equal(s, 0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-25, 1e-10])
@pytest.mark.parametrize("size", [1, 5000, 300_000])
def test_adagrad_takes_gradients_of_any_size(size, epsilon):
    """Beside its formula in double precision, which holds the squares of all float32 numbers."""
    random = np.random.default_rng(size)
    p, s = np.zeros((2, size), np.float32)
    exact, sums = np.zeros((2, size))
    usual = random.normal(size=size).astype(np.float32)
    sizes = np.exp(random.uniform(np.log(1e-37), np.log(3e38), (4, size)))
    for step in range(12):
        # Of a gradient that stays, or is anything; most of a vector is as it usually is.
        strange = (random.random(size) < 0.3) | (size == 1)
        g = np.where(strange, sizes[step % 4] * random.choice([-1, 0, 1], size), usual).astype(np.float32)
        updates.adagrad(p, g, s, 0.1, epsilon)
        wide = g.astype(np.float64)
        sums += wide * wide
        with np.errstate(invalid="ignore"):
            exact -= np.nan_to_num(0.1 * wide / (np.sqrt(sums) + np.float32(epsilon)), nan=0.0)
    np.testing.assert_allclose(p, exact, rtol=2e-5, atol=2e-6)
    assert np.isfinite(s).all()


@pytest.mark.parametrize("gradient", [1e-30, 1e-20, 1.0, 1e19, 2e19, 3e38])
def test_steps_of_adagrad_do_not_depend_on_the_size_of_a_gradient_that_stays(gradient):
    p, s, g = np.zeros(1, np.float32), np.zeros(1, np.float32), np.array([gradient], np.float32)
    for _ in range(3):
        updates.adagrad(p, g, s, 0.1, 0.0)
    assert p[0] == pytest.approx(-0.1 * (1 + 2**-0.5 + 3**-0.5), rel=1e-6)


@given(
    shape=st.lists(st.integers(0, 20), max_size=3).map(tuple),
    dtype=st.sampled_from([np.float32, np.float64, np.uint8, np.int32]),
    line=st.none() | st.integers(0, 200),
)
def test_aligned_arrays(shape, dtype, line):
    array = aligned_empty(shape, dtype, line)
    assert (array.shape, array.dtype) == (shape, dtype)
    assert array.flags.c_contiguous
    assert array.size == 0 or array.ctypes.data % 64 == 0
    assert array.size == 0 or line is None or array.ctypes.data % 4096 == 64 * (line % 64)


PROGRAM = """
import numba, numpy as np
from numba import prange
from dbmpi.kernels import compile

@compile.parallel_kernel
def threads_used(values, bad):
    for i in prange(values.size):
        values[i] = numba.get_num_threads()
    if bad:
        raise ValueError("bad")

for size in (compile.SERIAL, compile.SERIAL + 1):
    values = np.zeros(size)
    threads_used(values, False)
    try:
        threads_used(np.zeros(size), bad=True)
    except ValueError:
        print(set(values.tolist()), numba.get_num_threads())
print(threads_used.py_func is threads_used._compiled.py_func)
"""


@pytest.mark.slow
def test_few_elements_are_left_to_one_thread(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["{1.0} 2", "{2.0} 2", "True"]


def test_functions_that_one_factory_made_have_names_of_their_own():
    def made(number, inner):
        @kernel
        def shifted(x):
            return inner(x[0]) + number

        return shifted

    def inner(factor):
        @kernel
        def scaled(x):
            return factor * x

        return scaled

    variants = [made(number, inner(factor)) for number in (1, 2, 3.5, True) for factor in (2.0, 3.0)]
    # Symbols follow from names; two variants that were compiled in two processes would have the same ones.
    assert len({variant.py_func.__qualname__ for variant in variants}) == len(variants)
    assert made(1, inner(2.0)).py_func.__qualname__ == variants[0].py_func.__qualname__
    assert [variant(np.ones(1)) for variant in variants] == [3, 4, 4, 5, 5.5, 6.5, 3, 4]
