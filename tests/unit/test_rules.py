"""The update rules beside their naive twins, bit for bit, and beside PyTorch's optimizers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.rule_twins import RuleTwin

from dbmpi.config import OptimizerSection
from dbmpi.config.optimizer import RULES
from dbmpi.index.layout import Stretch
from dbmpi.kernels import compile as compiling
from dbmpi.kernels import moments, updates
from dbmpi.paramserver.clip import Clip
from dbmpi.paramserver.rules import rule
from dbmpi.paramserver.schedule import Moment, Schedule

DTYPES = [np.float32, np.float64]
KINDS = [*RULES, "nesterov"]


def section(kind: str, **given: object) -> OptimizerSection:
    """Return the settings of a rule, or of the momentum that is called ``nesterov``."""
    if kind == "nesterov":
        return OptimizerSection(rule="momentum", nesterov=True, **given)
    return OptimizerSection(rule=kind, **given)


def fraction() -> st.SearchStrategy[float]:
    return st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.9999])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(
    size=st.integers(0, 100),
    offset=st.integers(0, 5),
    seed=st.integers(0, 2**32),
    decay=st.sampled_from([0.0, 1e-4, 0.3]),
    momentum=fraction(),
    beta1=fraction(),
    beta2=fraction(),
    epsilon=st.sampled_from([1e-10, 1e-8, 1e-3]),
    magnitude=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_rules_equal_their_naive_twins_bit_for_bit(
    kind, dtype, size, offset, seed, decay, momentum, beta1, beta2, epsilon, magnitude
):
    chosen = section(
        kind,
        learning_rate=0.0123,
        weight_decay=decay,
        momentum=momentum,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        initial_accumulator=0.1,
    )
    random = np.random.default_rng(seed)
    w, ours = random.normal(size=offset + size).astype(dtype)[offset:], rule(chosen)
    ours_w, twin_w = w.copy(), w.copy()
    state, twin = ours.init(w), RuleTwin(chosen, w)
    assert tuple(state) == tuple(ours.state_names) == tuple(twin.state)
    for update in range(1, 5):
        g = (magnitude * random.normal(size=offset + size)).astype(dtype)[offset:]
        if update == 3:
            g[::2] = 0
        ours.apply(ours_w, g, state, Moment(update))
        twin_w = twin.step(twin_w, g)
        np.testing.assert_array_equal(ours_w, twin_w)
        for name, array in state.items():
            np.testing.assert_array_equal(array, twin.state[name], name)
        assert ours_w.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_rules_do_not_depend_on_chunks_and_threads(kind, decay):
    """Whole vectors are updated by all threads, small pieces by one."""
    size = 300_003
    random = np.random.default_rng(1)
    ours = rule(section(kind, weight_decay=decay))
    w = random.normal(size=size).astype(np.float32)
    whole, parts = w.copy(), w.copy()
    of_whole, of_parts = ours.init(w), ours.init(w)
    cuts = np.sort(random.integers(0, size, 9))
    for update in range(1, 4):
        g = random.normal(size=size).astype(np.float32)
        ours.apply(whole, g, of_whole, Moment(update))
        for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
            piece = slice(start, stop)
            cut = {name: array[piece] for name, array in of_parts.items()}
            ours.apply(parts[piece], g[piece], cut, Moment(update))
    np.testing.assert_array_equal(whole, parts)
    for name, array in of_whole.items():
        np.testing.assert_array_equal(array, of_parts[name])
    before = compiling._Limit.threads
    try:
        compiling.limit_threads(1)
        alone, state = w.copy(), ours.init(w)
        g = random.normal(size=size).astype(np.float32)
        ours.apply(alone, g, state)
        compiling.limit_threads(before)
        together, state = w.copy(), ours.init(w)
        ours.apply(together, g, state)
    finally:
        compiling.limit_threads(before)
    np.testing.assert_array_equal(alone, together)


def test_kernels_are_the_python_that_they_are_compiled_from():
    random = np.random.default_rng(3)
    w, g, m, s = random.normal(size=(4, 70)).astype(np.float32)
    calls = [
        (moments.momentum, (w, g, m, 0.01, 0.9, True, 0.1)),
        (moments.rmsprop, (w, g, s * s, 0.01, 0.99, 1e-8, 0.1)),
        (moments.adam, (w, g, m, s * s, 0.01, (0.9, 0.999), (1.5, 3.0), 1e-8, 0.1, 0.99)),
        (updates.sgd_with_decay, (w, g, 0.01, 0.1)),
        (updates.adagrad_with_decay, (w, g, s * s, 0.01, 1e-10, 0.1)),
    ]
    for kernel, arguments in calls:
        copies = [[a.copy() if isinstance(a, np.ndarray) else a for a in arguments] for _ in range(2)]
        kernel(*copies[0])
        kernel.py_func(*copies[1])
        assert not np.array_equal(copies[0][0], w)
        for compiled, plain in zip(*copies, strict=True):
            np.testing.assert_array_equal(compiled, plain)


@pytest.mark.parametrize("kind", ["momentum", "rmsprop", "adam"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_do_not_stay_among_subnormal_numbers(kind, dtype):
    """Where they slow a shard down for as long as a gradient is zero; what is no number stays so."""
    tiny = np.finfo(dtype).tiny
    ours = rule(section(kind, momentum=0.5, beta1=0.5, beta2=0.5, learning_rate=0.1))
    w = np.ones(6, dtype)
    state = ours.init(w)
    for array in state.values():
        array[:] = [4 * tiny, 2 * tiny, tiny, tiny / 8, 0, np.nan]
    ours.apply(w, np.zeros(6, dtype), state, Moment(1))
    for array in state.values():
        np.testing.assert_array_equal(array, np.array([2 * tiny, tiny, 0, 0, 0, np.nan], dtype))
    np.testing.assert_array_equal(w[1:5], 1)


@pytest.mark.parametrize("size", [1, 5000])
def test_adagrad_with_decay_takes_gradients_of_any_size(size):
    """Beside its formula in double precision."""
    random = np.random.default_rng(size)
    w, s = random.normal(size=size).astype(np.float32), np.zeros(size, np.float32)
    exact, sums = w.astype(np.float64), np.zeros(size)
    for step in range(8):
        sizes = np.exp(random.uniform(np.log(1e-37), np.log(3e38), size))
        g = np.where(random.random(size) < 0.3 + (size == 1), sizes * (-1) ** step, random.normal(size=size))
        g = g.astype(np.float32)
        updates.adagrad_with_decay(w, g, s, 0.1, 1e-10, 0.25)
        wide = g.astype(np.float64) + 0.25 * exact
        sums += wide * wide
        exact -= 0.1 * wide / (np.sqrt(sums) + np.float32(1e-10))
    np.testing.assert_allclose(w, exact, rtol=2e-5, atol=2e-6)
    assert np.isfinite(s).all()


TORCH = {
    "sgd": ("SGD", {"weight_decay": 0.03}),
    "momentum": ("SGD", {"momentum": 0.8, "weight_decay": 0.03}),
    "nesterov": ("SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.03}),
    "adagrad": ("Adagrad", {"weight_decay": 0.03, "initial_accumulator_value": 0.2}),
    "rmsprop": ("RMSprop", {"weight_decay": 0.03}),
    "adam": ("Adam", {"weight_decay": 0.03}),
    "adamw": ("AdamW", {"weight_decay": 0.3}),
}
OURS = {"initial_accumulator_value": "initial_accumulator"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plain", [True, False], ids=["defaults", "settings"])
def test_rules_equal_those_of_pytorch_step_by_step(kind, dtype, plain):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: rules are compared with their twins alone")
    name, others = TORCH[kind]
    if plain:
        others = {key: value for key, value in others.items() if key in ("momentum", "nesterov")}
        others |= {"weight_decay": 0.0} if kind == "adamw" else {}  # PyTorch's default is 0.01
    chosen = section(kind, learning_rate=0.01, **{OURS.get(k, k): v for k, v in others.items() if k != "nesterov"})
    random = np.random.default_rng(11)
    w = random.normal(size=1001).astype(dtype)
    theirs = torch.tensor(w.copy(), requires_grad=True)
    optimizer = getattr(torch.optim, name)([theirs], lr=0.01, **others)
    ours, state = rule(chosen), rule(chosen).init(w)
    for update in range(1, 31):
        g = (random.normal(size=1001) * 10.0 ** random.uniform(-4, 2, 1001)).astype(dtype)
        theirs.grad = torch.tensor(g.copy())
        optimizer.step()
        ours.apply(w, g, state, Moment(update))
        largest = 10 * update * np.finfo(dtype).eps
        np.testing.assert_allclose(w, theirs.detach().numpy(), rtol=largest, atol=largest)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), {0: 1.0, 10**9: 1.0}),
        (Schedule(warmup=100), {0: 0.1, 50: 0.6, 90: 1.0, 100: 1.0, 1000: 1.0}),
        (Schedule("step", period=50, factor=0.5), {0: 1.0, 49: 1.0, 50: 0.5, 99: 0.5, 100: 0.25}),
        (Schedule("step", 100, 50, 0.5), {0: 0.1, 149: 1.0, 150: 0.5, 200: 0.25}),
        (Schedule("cosine", period=100, factor=0.0), {0: 1.0, 50: 0.5, 100: 0.0, 1000: 0.0}),
        (Schedule("cosine", 100, 100, 0.2), {0: 0.1, 100: 1.0, 150: 0.6, 200: 0.2, 300: 0.2}),
        (Schedule("inverse_root", 100, 100), {0: 0.1, 100: 1.0, 400: 0.5, 900: 1 / 3}),
    ],
)
def test_schedules(schedule, expected):
    """At so many samples before a push of ten."""
    found = {samples: schedule(Moment(samples=samples, pushed=10)) for samples in expected}
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 2049, 300_003])
def test_the_norm_of_a_gradient(dtype, size):
    vector = np.random.default_rng(size).normal(size=size).astype(dtype)
    square = updates.sum_of_squares(vector)
    assert square == pytest.approx(np.sum(vector.astype(np.float64) ** 2), rel=1e-12)
    before = compiling._Limit.threads
    try:
        compiling.limit_threads(1)
        assert updates.sum_of_squares(vector) == square
    finally:
        compiling.limit_threads(before)
    scaled = vector.copy()
    updates.scale(scaled, 0.3)
    np.testing.assert_array_equal(scaled, vector * dtype(0.3))


def test_only_what_is_pushed_counts_for_the_norm():
    stretches = [Stretch(10, 0, 2, pushed=True), Stretch(50, 2, 1, pushed=True), Stretch(3, 3, 2, pushed=False)]
    gradient = np.array([2, 1, 2, 100, 100], np.float32)
    asked = []

    def add_up(square: float) -> float:
        asked.append(square)
        return square + 16.0  # of another partition: the norm is 5

    Clip(5.0, stretches, add_up)(gradient)
    np.testing.assert_array_equal(gradient, np.array([2, 1, 2, 100, 100], np.float32))
    Clip(2.5, stretches, add_up)(gradient)
    np.testing.assert_array_equal(gradient, np.array([1, 0.5, 1, 50, 50], np.float32))
    assert asked == [9.0, 9.0]


def test_clipping_of_gradients_whose_squares_overflow():
    clip = Clip(5.0, [Stretch(0, 0, 3, pushed=True)], float)
    gradient = np.array([3e200, -4e200, 0.0])
    clip(gradient)
    np.testing.assert_allclose(gradient, [3, -4, 0], rtol=1e-15)
    endless = np.array([1.0, np.inf, 0.0])  # not hidden
    clip(endless)
    assert endless.tolist() == [1, np.inf, 0]


@pytest.mark.parametrize(
    ("schedule", "name", "others"),
    [
        (Schedule("step", period=30, factor=0.3), "StepLR", {"step_size": 3, "gamma": 0.3}),
        (Schedule("cosine", period=200, factor=0.1), "CosineAnnealingLR", {"T_max": 20, "eta_min": 0.1}),
        (Schedule(warmup=40), "LinearLR", {"start_factor": 0.25, "total_iters": 3}),
    ],
)
def test_schedules_equal_those_of_pytorch(schedule, name, others):
    """Ten samples a step."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: schedules are compared with numbers alone")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **others)
    for step in range(20):
        assert schedule(Moment(samples=10 * step, pushed=10)) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_clipping_equals_that_of_pytorch(largest):
    """But for the 1e-6 that PyTorch adds to the norm."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: clipping is compared with NumPy alone")
    gradient = np.random.default_rng(2).normal(size=1000).astype(np.float32)
    theirs = torch.zeros(1000, requires_grad=True)
    theirs.grad = torch.tensor(gradient.copy())
    torch.nn.utils.clip_grad_norm_([theirs], largest)
    Clip(largest, [Stretch(0, 0, 1000, pushed=True)], lambda square: square)(gradient)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [2, 3, 7])
def test_delayed_nesterov_equals_its_naive_twin_and_in_sum_nesterov(dtype, every):
    """Bit for bit, by the formulas of Liu et al.; and as often as the velocity is renewed, Nesterov by the means."""
    random, kind = np.random.default_rng(4), dtype
    w = random.normal(size=50).astype(dtype)
    chosen = rule(section("nesterov", learning_rate=0.1, momentum=0.8, momentum_every=every))
    plain = rule(section("nesterov", learning_rate=0.1, momentum=0.8))
    ours, twin, one = w.copy(), w.copy(), w.copy()
    state, smooth = chosen.init(ours), plain.init(one)
    assert set(plain.state_names) == {"velocity"}
    assert set(state) == set(chosen.state_names)
    velocity, delayed = np.zeros_like(w), np.zeros_like(w)
    for update in range(1, 4 * every + 1):
        g = random.normal(size=50).astype(dtype)
        chosen.apply(ours, g, state, Moment(update))
        delayed = delayed + g
        along = kind(1 / every) * g
        if update % every == 0:
            mean = kind(1 / every) * delayed
            velocity = kind(0.8) * velocity + mean
            along, delayed = along + kind(0.8) * velocity, np.zeros_like(w)
            plain.apply(one, mean, smooth, Moment(update // every))
        twin = twin - kind(0.1) * along
        np.testing.assert_array_equal(ours, twin)
        np.testing.assert_array_equal(state["velocity"], velocity)
        if update % every == 0:
            np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-5)
