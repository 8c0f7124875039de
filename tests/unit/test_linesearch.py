"""Line searches on functions of one variable, beside SciPy's own."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dbmpi.methods.linesearch import LineSearchFailed, Trial, backtracking, disagreement, fixed, strong_wolfe


def drive(search, function, slope):
    """Run a search; return the accepted trial and all steps."""
    steps = [next(search)]
    try:
        while True:
            steps.append(search.send((function(steps[-1]), slope(steps[-1]))))
    except StopIteration as end:
        return end.value, steps


def run(method, function, slope, first, **settings):
    return drive(method(function(0.0), slope(0.0), first, **settings), function, slope)


# Test functions of More and Thuente (1994), section 5: equations 5.1, 5.2 and 5.4.


def rational(a, beta=2.0):
    return -a / (a**2 + beta)


def rational_slope(a, beta=2.0):
    return (a**2 - beta) / (a**2 + beta) ** 2


def power(a, beta=0.004):
    return (a + beta) ** 5 - 2 * (a + beta) ** 4


def power_slope(a, beta=0.004):
    return 5 * (a + beta) ** 4 - 8 * (a + beta) ** 3


def yanai(beta1, beta2):
    gamma1, gamma2 = (math.sqrt(1 + beta**2) - beta for beta in (beta1, beta2))

    def function(a):
        return gamma1 * math.hypot(1 - a, beta2) + gamma2 * math.hypot(a, beta1)

    def slope(a):
        return gamma1 * (a - 1) / math.hypot(1 - a, beta2) + gamma2 * a / math.hypot(a, beta1)

    return function, slope


FUNCTIONS = {
    "rational": (rational, rational_slope, 1e-3, 1e-1),
    "power": (power, power_slope, 1e-1, 1e-1),
    "yanai 1": (*yanai(1e-3, 1e-3), 1e-3, 1e-3),
    "yanai 2": (*yanai(1e-2, 1e-3), 1e-3, 1e-3),
    "yanai 3": (*yanai(1e-3, 1e-2), 1e-3, 1e-3),
}


@pytest.mark.parametrize("first", [1e-3, 1e-1, 1e1, 1e3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_strong_wolfe_tries_the_steps_that_scipy_tries(name, first):
    if (name, first) == ("power", 1e3):
        pytest.skip("its loss is 1e18 times what the slope promises, which we take for outside of the domain")
    minpack = pytest.importorskip("scipy.optimize._dcsrch").DCSRCH
    function, slope, decrease, curvature = FUNCTIONS[name]
    theirs = []

    def recorded(a):
        theirs.append(float(a))
        return function(a)

    step, *_, task = minpack(recorded, slope, decrease, curvature, 1e-12, 0.0, 1e10)(
        first, phi0=function(0.0), derphi0=slope(0.0), maxiter=100
    )
    assert task.startswith(b"CONV")
    accepted, ours = run(
        strong_wolfe, function, slope, first, decrease=decrease, curvature=curvature, width=1e-12, trials=100
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert accepted.step == pytest.approx(step, rel=1e-6)


@given(
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    first=st.floats(1e-3, 1e3),
    constants=st.sampled_from([(1e-3, 0.9), (1e-4, 0.1), (0.1, 0.2)]),
)
def test_an_accepted_step_satisfies_the_strong_wolfe_conditions(weights, first, constants):
    decrease, curvature = constants
    a1, a2, a3, a4 = weights

    def function(a):
        return 0.05 * a**2 + a1 * math.sin(a) + a2 * math.cos(2 * a) + a3 * math.exp(-a) - 3 * a + a4

    def slope(a):
        return 0.1 * a + a1 * math.cos(a) - 2 * a2 * math.sin(2 * a) - a3 * math.exp(-a) - 3

    assume(slope(0.0) < -1e-3)
    try:
        trial, _ = run(
            strong_wolfe, function, slope, first, decrease=decrease, curvature=curvature, width=1e-9, trials=60
        )
    except LineSearchFailed as failure:
        pytest.fail(str(failure))
    assert trial == Trial(trial.step, function(trial.step), slope(trial.step))
    assert trial.loss <= function(0.0) + decrease * trial.step * slope(0.0)
    assert abs(trial.slope) <= curvature * abs(slope(0.0))


@given(shift=st.floats(0.01, 100), first=st.floats(1e-6, 1e6))
def test_backtracking_decreases_enough_and_never_lengthens(shift, first):
    trial, steps = run(backtracking, lambda a: (a - shift) ** 2, lambda a: 2 * (a - shift), first)
    assert trial.loss <= shift**2 - 1e-4 * trial.step * 2 * shift
    assert all(0.1 * a <= b * (1 + 1e-12) and b <= 0.5 * a for a, b in itertools.pairwise(steps))


def test_a_fixed_step_is_taken_whatever_it_gives():
    assert run(fixed, lambda a: a, lambda a: 1.0, 3.0)[0].step == 3.0
    assert run(fixed, lambda a: a, lambda a: 1.0, 3.0, factor=0.25)[0].step == 0.75
    with pytest.raises(LineSearchFailed, match="not finite from the fixed step 3 down to 3e-11"):
        run(fixed, lambda a: math.inf if a else 0.0, lambda a: -1.0, 3.0)


@pytest.mark.parametrize("method", [strong_wolfe, backtracking, fixed])
@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf, -1.0])
def test_a_search_comes_back_from_where_loss_or_gradient_are_not_finite(method, bad):
    def function(a):
        return (a - 1) ** 2 if a < 5 else bad

    trial, steps = run(method, function, lambda a: 2 * (a - 1) if a < 5 else math.nan, 1e6)
    assert steps[0] == 1e6
    assert trial.step < 5
    assert trial.loss < 1


@pytest.mark.parametrize("method", [strong_wolfe, backtracking])
def test_a_step_within_the_rounding_error_of_a_loss_counts_where_it_is_less_steep(method):
    """As in the last step before a minimum; where it is as steep as before, there is a kink or a wrong gradient."""
    trial, steps = run(method, lambda a: 1.0, lambda a: 1e-9 * (a - 1), 1.0)
    assert (trial.step, steps) == (1.0, [1.0])
    with pytest.raises(LineSearchFailed):
        run(method, lambda a: 1.0, lambda a: -1.0, 1.0)


@pytest.mark.parametrize("method", [strong_wolfe, backtracking])
def test_a_loss_that_is_finite_nowhere_ends_the_search(method):
    with pytest.raises(LineSearchFailed, match=r"not finite|no decrease") as caught:
        run(method, lambda a: math.nan if a else 1.0, lambda a: math.nan if a else -1.0, 1.0)
    assert len(caught.value.trials) < 70
    assert not any(trial.finite for trial in caught.value.trials[1:])


@pytest.mark.parametrize("method", [strong_wolfe, backtracking])
def test_a_loss_that_only_grows_ends_the_search(method):
    with pytest.raises(LineSearchFailed, match="decrease") as caught:
        run(method, lambda a: 1 + a, lambda a: -1.0, 1.0)
    assert caught.value.trials[0] == Trial(0.0, 1.0, -1.0)
    assert "the gradient says" in disagreement(caught.value.trials)


@given(
    steps=st.lists(st.floats(1e-6, 10), min_size=1, max_size=12),
    curve=st.floats(-3, 3),
    slope=st.floats(-100, -1e-3),
    level=st.floats(-10, 10),
)
def test_right_gradients_are_not_doubted(steps, curve, slope, level):
    trials = [
        Trial(a, level + slope * a + curve * a**2 / 2 + a**3 / 60, slope + curve * a + a**2 / 20) for a in [0, *steps]
    ]
    assert disagreement(trials) is None


@pytest.mark.parametrize("of_x", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("of_f", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("wrong", [-1.0, 0.5, 2.0, 0.0])
def test_wrong_gradients_are_doubted_in_any_units(wrong, of_f, of_x):
    loss = lambda a: of_f * (1 - 3 * wrong * a / of_x)  # noqa: E731
    slope = lambda a: of_f / of_x * (-3 + 1e-3 * a / of_x)  # noqa: E731
    trials = [Trial(of_x * a, loss(of_x * a), slope(of_x * a)) for a in (0.0, 0.01, 0.1, 1.0)]
    assert "the loss changes by" in disagreement(trials)
    assert "the loss changes by" in disagreement(trials, loss)
    if wrong:
        assert disagreement(trials, lambda a: loss(-a)) is None  # a kink


@pytest.mark.parametrize(
    ("level", "changes", "slope"),
    [
        (1e6, [1e-3, 1e-3, 1e-3], -1e-4),  # a start that was rounded down
        (1e-9, [1e-15, 1e-15, 1e-15], -1e-8),
        (1.0, [2**-23, 0, 2**-23], -3e-3),
        (1.0, [0, 0, 0], -1e-8),  # too flat to be seen
        (1.0, [0.02, 0.3, 4.0], -1e-2),  # the line bends
    ],
)
def test_rounding_errors_say_nothing(level, changes, slope):
    trials = [Trial(0.0, level, slope)]
    trials += [Trial(a, level + change, slope) for a, change in zip((0.01, 0.1, 1.0), changes, strict=True)]
    assert disagreement(trials) is None
