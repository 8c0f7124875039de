"""L-BFGS beside SciPy, the two-loop recursion and the dense formula, on any number of shards."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from scipy.special import expit
from unit.sharded import Shards, cut_points, local_problem
from unit.two_loop import two_loop

from dbmpi.data.stream import Order
from dbmpi.errors import Damaged, RunFailed
from dbmpi.methods.descent import Limits, Line, Progress
from dbmpi.methods.gradients import conjugate_gradients, gradient_descent, owlqn, with_l2
from dbmpi.methods.lbfgs import History, lbfgs
from dbmpi.methods.linesearch import fixed
from dbmpi.methods.multibatch import multi_batch_lbfgs
from dbmpi.sandblaster.batches import Sampling
from dbmpi.sandblaster.state import Position, capture, read_state


def rosenbrock(x):
    return float(optimize.rosen(x)), optimize.rosen_der(x)


def scipys(function, start, gtol):
    options = {"gtol": gtol, "ftol": 0, "maxiter": 10_000, "maxfun": 20_000}
    return optimize.minimize(function, start, jac=True, method="L-BFGS-B", options=options)


def quadratic(size, condition, seed=0):
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.normal(size=(size, size)))[0]
    matrix, right = (turn * np.geomspace(1, condition, size)) @ turn.T, random.normal(size=size)
    return (lambda x: (float(0.5 * x @ matrix @ x - right @ x), matrix @ x - right)), np.linalg.solve(matrix, right)


def history_with(size, pairs, memory, dtype=np.float64, seed=0):
    """Return a space with a history that has seen some steps over a quadratic, and the vectors as arrays."""
    function, _ = quadratic(size, 50, seed)
    space, evaluate, _ = local_problem(function, np.ones(size), dtype)
    history = History(space, memory)
    lbfgs(space, evaluate, history=history, limits=Limits(gtol=0, ftol=0, iterations=pairs))
    return space, history


@pytest.mark.parametrize(("pairs", "memory"), [(1, 5), (3, 5), (5, 5), (9, 4)])
def test_the_direction_is_that_of_the_two_loop_recursion_and_of_the_dense_formula(pairs, memory):
    space, history = history_with(30, pairs, memory)
    space.create("g")
    space.create("slow")
    g = np.random.default_rng(1).normal(size=30)
    space.writable("g")[:] = g
    history.measure("g", float(space.dots([("g", "g")])[0]))
    line = history.choose("g")
    two_loop(space, history, "g", "slow")
    s, y = (np.array([space.array(pair[k]) for pair in history.pairs]) for k in (0, 1))
    assert len(s) == min(pairs, memory)
    inverse = np.eye(30) * (s[-1] @ y[-1]) / (y[-1] @ y[-1])
    for a, b in zip(s, y, strict=True):  # Nocedal and Wright, equation 7.16
        v = np.eye(30) - np.outer(b, a) / (a @ b)
        inverse = v.T @ inverse @ v + np.outer(a, a) / (a @ b)
    direction = space.array(line.direction)
    np.testing.assert_allclose(direction, -inverse @ g, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(direction, space.array("slow"), rtol=1e-8, atol=1e-10)
    assert line.slope == pytest.approx(float(direction @ g), rel=1e-8)


@pytest.mark.parametrize("size", [2, 10, 100, 10_000])
def test_rosenbrock_beside_scipy(size):
    start = 2 * np.ones(size) + np.arange(size) % 3
    space, evaluate, x = local_problem(rosenbrock, start)
    report = lbfgs(space, evaluate, limits=Limits(gtol=1e-8, ftol=0))
    theirs = scipys(rosenbrock, start, gtol=1e-8)
    assert report.converged
    assert report.evaluations <= 1.1 * theirs.nfev
    np.testing.assert_allclose(x, theirs.x, rtol=1e-8)
    np.testing.assert_allclose(x, 1, rtol=1e-8)


def test_iterates_are_those_of_scipy():
    """In the units in which our first step has a length of 1, as theirs has in any."""
    ours, theirs, tried = [], [], []
    start = np.array([-1.2, 1.0])
    limits = Limits(gtol=1e-7, ftol=0)

    def function(x):
        tried.append(x.copy())
        return rosenbrock(x)

    space, evaluate, x = local_problem(function, start)
    lbfgs(space, evaluate, callback=lambda progress: ours.append(x.copy()), limits=limits)
    unit = np.linalg.norm(tried[1] - tried[0])
    optimize.minimize(
        lambda z: (rosenbrock(unit * z)[0], unit * rosenbrock(unit * z)[1]),
        start / unit,
        jac=True,
        method="L-BFGS-B",
        callback=lambda z: theirs.append(unit * z),
        options={"gtol": 1e-7 * unit, "ftol": 0},
    )
    assert len(ours) == len(theirs)
    np.testing.assert_allclose(ours[:20], theirs[:20], rtol=1e-6)


@pytest.mark.parametrize("condition", [10, 1e3])
def test_quadratic_beside_scipy_and_the_solution(condition):
    function, solution = quadratic(60, condition)
    space, evaluate, x = local_problem(function, np.zeros(60))
    report = lbfgs(space, evaluate, limits=Limits(gtol=1e-6, ftol=0))
    theirs = scipys(function, np.zeros(60), gtol=1e-6)
    assert report.converged
    assert report.evaluations <= 1.1 * theirs.nfev
    assert report.loss == pytest.approx(theirs.fun, rel=1e-8)
    assert function(x)[0] == pytest.approx(function(solution)[0], rel=1e-10)


DATA = Path(os.environ.get("DBMPI_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "libsvm"


@pytest.mark.skipif(not (DATA / "a9a").exists(), reason="needs the data set a9a (DBMPI_TEST_DATA)")
@pytest.mark.slow
def test_logistic_regression_on_a9a_beside_scipy():
    datasets = pytest.importorskip("sklearn.datasets")
    inputs, labels = datasets.load_svmlight_file(str(DATA / "a9a"), n_features=123)
    held_out, its_labels = datasets.load_svmlight_file(str(DATA / "a9a.t"), n_features=123)
    strength = 1 / len(labels)

    def loss(w):
        z = labels * (inputs @ w)
        return float(np.logaddexp(0, -z).mean()), inputs.T @ (-labels * expit(-z)) / len(labels)

    def whole(w):
        value, gradient = loss(w)
        return value + strength / 2 * w @ w, gradient + strength * w

    space, evaluate, x = local_problem(loss, np.zeros(123))
    report = lbfgs(space, with_l2(space, evaluate, strength), limits=Limits(gtol=1e-8, ftol=0))
    theirs = scipys(whole, np.zeros(123), gtol=1e-8)
    assert report.loss == pytest.approx(theirs.fun, rel=1e-8)
    assert report.evaluations <= 1.1 * theirs.nfev
    accuracy, judge = (np.mean(np.sign(held_out @ w) == its_labels) for w in (x, theirs.x))
    assert accuracy == judge == pytest.approx(0.8495, abs=5e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_bits_are_the_same_for_any_number_of_shards(dtype):
    start = np.linspace(-1.5, 1.5, 301).astype(dtype)
    results = []
    for parts in (1, 2, 3, 5):
        with Shards(start, cut_points(301, parts)) as shards:
            told = []
            report = lbfgs(
                shards.space, shards.evaluate(rosenbrock), limits=Limits(0, 0, iterations=25), callback=told.append
            )
            assert max(map(len, shards.commands)) < 4096
            # One reduction for every evaluation; at the start, two more to learn how large the vectors are, and one for
            # the first step.
            assert shards.reductions <= report.evaluations + 4
            results.append((report, told, shards.gather("parameters").tobytes()))
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ended", [1, 4, 13])
def test_what_a_checkpoint_keeps_goes_on_as_if_nothing_had_happened(dtype, ended):
    start = np.zeros(40, dtype)
    space, evaluate, x = local_problem(rosenbrock, start, dtype)
    whole = lbfgs(space, evaluate, limits=Limits(0, 0, iterations=30))

    first, evaluate, half = local_problem(rosenbrock, start, dtype)
    history, texts = History(first), []

    def keep(progress):
        texts.append(capture(history, Position(), progress, first.bounds()).model_dump_json())
        return progress.iteration == ended

    before = lbfgs(first, evaluate, history=history, callback=keep, limits=Limits(0, 0))
    state = read_state(texts[-1], first.names, Path("file.h5"))
    second, evaluate, rest = local_problem(rosenbrock, half, dtype)
    for name in state.vectors:
        second.create(name)
        second.writable(name)[:] = first.array(name)
    second.restore_bounds(state.bounds)
    restored = History(second)
    restored.restore(state.arrays)
    after = lbfgs(second, evaluate, history=restored, start=state.start, limits=Limits(0, 0, iterations=30))
    np.testing.assert_array_equal(rest, x)
    assert (after.iterations, before.evaluations + after.evaluations) == (30, whole.evaluations)


def test_a_damaged_state_is_refused():
    space, history = history_with(10, 4, 5)
    state = history.state()
    for name, value in [
        ("slots", np.array([9])), ("slots", np.array([1, 1])), ("sy", np.eye(3)), ("yy", np.full((6, 6), np.nan)),
        ("sg", np.zeros(2)), ("more", np.zeros(2)),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=r"damaged|not the state"):
            History(space, 5).restore(state | {name: value})
    text = capture(
        history, Position(3, 4, 1, 0.5), Progress(1, 2, 0.5, 0.1, 1.0, 0.2), space.bounds()
    ).model_dump_json()
    assert read_state(text, space.names, Path("file.h5")).batches == Position(3, 4, 1, 0.5)
    assert read_state("", space.names, Path("file.h5")) is None
    for change, reason in {
        "{}": "memory",
        text[:-1]: "JSON",
        text.replace('"memory":5', '"memory":"5"'): "memory",
        text.replace('"memory":5', '"memory":6'): "history of 6 pairs",
        text.replace("[3,4,1]", "[3]"): "position",
        text.replace("[3,4,1]", "[3,-4,1]"): "position",
        text.replace('"pairs":["s', '"pairs":["y'): "pairs|missing",
        text.replace('"gradient":"', '"gradient":"no '): "missing",
        text.replace('"numbers":[0.5', '"numbers":[NaN'): "numbers",
        text.replace('"bounds":{', '"bounds":{"x":[1,1.0],'): "bounds of 'x'",
        text.replace('"previous parameters":[null', '"previous parameters":[5000'): "bounds of 'previous parameters'",
    }.items():
        assert change != text
        with pytest.raises(Damaged, match=rf"^file\.h5: /run/method is not .*({reason})"):
            read_state(change, space.names, Path("file.h5"))


def test_no_memory_is_gradient_descent():
    function, solution = quadratic(10, 5)
    space, evaluate, x = local_problem(function, np.zeros(10))
    report = lbfgs(space, evaluate, memory=0, limits=Limits(gtol=1e-7, ftol=0))
    assert not any(name.startswith("y") for name in space.names)
    assert function(x)[0] == pytest.approx(function(solution)[0], rel=1e-10)
    assert report.evaluations < 200
    with pytest.raises(ValueError, match="0 or more"):
        History(space, -1)


def test_a_zero_gradient_is_a_minimum_at_once():
    space, evaluate, x = local_problem(rosenbrock, np.ones(8))
    report = lbfgs(space, evaluate)
    assert (report.reason, report.iterations, report.evaluations) == ("gradient", 0, 1)
    np.testing.assert_array_equal(x, np.ones(8))


def test_a_gradient_too_small_for_its_square_is_a_minimum_too():
    for method in (lbfgs, conjugate_gradients, partial(owlqn, strength=1e-180)):
        space, evaluate, x = local_problem(lambda x: (1.0, np.full(3, 1e-170)), np.ones(3))
        assert method(space, evaluate, limits=Limits(gtol=0, ftol=0)).reason == "gradient"
        np.testing.assert_array_equal(x, np.ones(3))


def test_a_direction_that_does_not_descend_is_forgotten_with_the_history():
    class Uphill(History):
        """Its fourth direction is turned round."""

        chosen, forgotten = 0, 0

        def choose(self, gradient):
            line = super().choose(gradient)
            self.chosen += 1
            if self.chosen != 4:
                return line
            space.scale(line.direction, -1.0)
            return Line(line.direction, -line.slope, line.first)

        def forget(self):
            self.forgotten += len(self.pairs)
            super().forget()

    function, solution = quadratic(30, 100)
    space, evaluate, x = local_problem(function, np.zeros(30))
    history, told = Uphill(space, 5), []
    lbfgs(space, evaluate, history=history, limits=Limits(gtol=1e-6, ftol=0), callback=told.append)
    assert history.forgotten == 3
    assert all(progress.decrease > 0 for progress in told)
    assert function(x)[0] == pytest.approx(function(solution)[0], rel=1e-10)


def test_losses_that_are_not_finite():
    space, evaluate, _ = local_problem(lambda x: (np.nan, x), np.ones(3))
    with pytest.raises(RunFailed, match="loss is nan at the point where the search"):
        lbfgs(space, evaluate)
    space, evaluate, x = local_problem(lambda x: (1.0 if np.all(x == 1) else np.inf, np.ones(3)), np.ones(3))
    with pytest.raises(RunFailed, match="not finite down to"):
        lbfgs(space, evaluate)
    np.testing.assert_array_equal(x, np.ones(3))
    # a wall beside the minimum is walked around
    space, evaluate, x = local_problem(
        lambda x: (float(-np.log(x).sum() + x.sum()), 1 - 1 / x) if x.min() > 0 else (np.inf, x), np.full(5, 30.0)
    )
    assert lbfgs(space, evaluate).converged
    np.testing.assert_allclose(x, 1, rtol=1e-3)


BOTTOMLESS = {
    "exponential": lambda x: (float(-np.exp(x).sum()), -np.exp(x)),
    "exponential from zero": lambda x: (float(-np.expm1(x - 1).sum()), -np.exp(x - 1)),
    "cubic": lambda x: (float(-(x**3).sum()), -3 * x**2),
    "linear": lambda x: (float(3 * x.sum()), np.full(3, 3.0)),
    "saddle": lambda x: (float(x[0] ** 2 - x[1] ** 2), np.array([2 * x[0], -2 * x[1], 0])),
}


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("function", BOTTOMLESS)
@pytest.mark.parametrize("method", [lbfgs, gradient_descent, conjugate_gradients])
def test_a_loss_without_a_minimum_is_named(method, function, unit):
    scaled = lambda x: tuple(unit * part for part in BOTTOMLESS[function](x))  # noqa: E731
    space, evaluate, x = local_problem(scaled, np.ones(3))
    with np.errstate(over="ignore", invalid="ignore"):
        report = method(space, evaluate, limits=Limits(gtol=1e-5 * unit, iterations=200))
    assert (report.reason, report.converged) == ("unbounded", False)
    assert np.isfinite(x).all()


@pytest.mark.parametrize("method", [lbfgs, gradient_descent, conjugate_gradients])
@pytest.mark.parametrize("distance", [1e6, 1e12])
def test_a_minimum_that_is_far_away_is_one(method, distance):
    space, evaluate, x = local_problem(
        lambda x: (float((x / distance - 1) @ (x / distance - 1)), 2 * (x / distance - 1) / distance), np.ones(3)
    )
    assert method(space, evaluate, limits=Limits(gtol=1e-9 / distance, ftol=0)).converged
    np.testing.assert_allclose(x, distance, rtol=1e-8)


@pytest.mark.parametrize("method", [lbfgs, gradient_descent, conjugate_gradients])
@pytest.mark.parametrize("wall", [1e10, 1e15, 1e20, 1e25, 1e100, 1e300, np.inf, np.nan])
def test_what_an_objective_says_outside_of_its_domain_is_walked_around(method, wall):
    function = lambda x: (float(-np.log(x).sum() + x.sum()), 1 - 1 / x) if x.min() > 0 else (wall, 0 * x)  # noqa: E731
    for first in (1e-3, 30.0):
        space, evaluate, x = local_problem(function, [first, 2, 0.5])
        assert method(space, evaluate, limits=Limits(gtol=1e-5, ftol=0)).converged
        np.testing.assert_allclose(x, 1, rtol=1e-4)


def test_a_gradient_that_is_no_number_is_told_from_an_infinite_one():
    for value, told in ((np.nan, "nan"), (np.inf, "inf")):
        space, evaluate, _ = local_problem(lambda x, value=value: (1.0, np.array([1, value, 2])), np.ones(3))
        with pytest.raises(RunFailed, match=f"gradient has elements that are {told}"):
            lbfgs(space, evaluate)


@pytest.mark.slow
def test_rounding_errors_are_not_taken_for_a_wrong_gradient():
    """A right gradient, and a loss of which few digits are right: it ends for want of precision."""
    function, _ = quadratic(12, 20)
    for digits in (3, 5, 7):
        for seed in range(4):
            random = np.random.default_rng(seed)
            noisy = lambda x: (function(x)[0] * (1 + 10.0**-digits * random.uniform(-1, 1)), function(x)[1])  # noqa: B023, E731
            space, evaluate, _ = local_problem(noisy, np.zeros(12))
            assert lbfgs(space, evaluate, limits=Limits(0, 0)).reason == "precision"


def test_a_kink_is_not_taken_for_a_wrong_gradient():
    function = lambda x: (float(np.abs(x).sum()), np.where(x >= 0, 1.0, -1.0))  # noqa: E731
    for method in (lbfgs, gradient_descent, conjugate_gradients):
        space, evaluate, _ = local_problem(function, [0.0, 0.0, 0.0])
        assert method(space, evaluate, limits=Limits(0, 0)).reason == "precision"


def test_a_gradient_in_other_units_finds_the_minimum_all_the_same():
    # Too steep by less than what a sufficient decrease is a fraction of (1e-3): no line search fails.
    space, evaluate, _ = local_problem(lambda x: (float(x @ x), 50.0 * 2 * x), np.ones(4))
    assert lbfgs(space, evaluate).loss == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("wrong", [-1.0, 5000.0])
def test_a_wrong_gradient_is_named(wrong):
    space, evaluate, _ = local_problem(lambda x: (float(x @ x), wrong * 2 * x), np.ones(4))
    with pytest.raises(RunFailed, match="likely cause is a wrong gradient"):
        lbfgs(space, evaluate, limits=Limits(gtol=0, ftol=0))


def test_negative_curvature_is_not_learned():
    function = lambda x: (float(np.cos(x).sum()), -np.sin(x))  # noqa: E731
    space, evaluate, _ = local_problem(function, np.full(3, 0.1))
    history = History(space)
    lbfgs(
        space,
        evaluate,
        history=history,
        search=lambda loss, slope, _: fixed(loss, slope, 0.1),
        limits=Limits(0, 0, iterations=3),
    )
    assert history.skipped == 3
    assert history.fresh


@pytest.mark.parametrize(("dtype", "history"), [(np.float32, None), (np.float64, "float32")])
def test_short_numbers_reach_the_minimum_too(dtype, history):
    function, solution = quadratic(40, 30)
    space, evaluate, x = local_problem(function, np.zeros(40), dtype)
    lbfgs(space, evaluate, history_dtype=history, limits=Limits(gtol=1e-4, ftol=0, iterations=300))
    assert space.array("s0").dtype == np.float32
    np.testing.assert_allclose(x, solution, atol=1e-4)


class PartialBatches:
    """Some of the terms of a sum of quadratics at a time."""

    def __init__(self, space, terms, order, portions, **settings):
        self.space, self.terms = space, terms
        self.sampling = Sampling(order, portions, **settings)
        self.sizes = []

    def mean(self, which, point):
        x = self.space.array(point)
        values = [self.terms[k % len(self.terms)](x) for k in which]
        return [np.mean(value, axis=0) for value in zip(*values, strict=True)]

    def evaluate(self, point, gradient):
        loss, self.space.writable(gradient)[:] = self.mean(self.sampling.portions, point)
        self.sizes.append(len(self.sampling.portions))
        self.sampling.evaluated(float(loss))
        return float(loss)

    def evaluate_parts(self, point, gradient, shared, following):
        portions = self.sampling.portions
        self.space.writable(shared)[:] = self.mean(portions[:3], point)[1]
        self.space.writable(following)[:] = self.mean(portions[-3:], point)[1]
        return self.evaluate(point, gradient)

    def proceed(self):
        return self.sampling.proceed()

    def exhausted(self):
        return self.sampling.exhausted()


def partial_problem(portions, **settings):
    terms = [quadratic(12, 20, seed)[0] for seed in range(20)]
    space, _, x = local_problem(terms[0], np.zeros(12))
    batches = PartialBatches(space, terms, Order(20, 1, 1000, 0), portions, **settings)
    whole = lambda v: np.mean([term(v)[0] for term in terms])  # noqa: E731
    return space, batches, lambda: whole(x), optimize.minimize(whole, np.zeros(12)).fun


def test_batches_that_share_samples():
    space, batches, loss, best = partial_problem(9, overlap=3)
    history = History(space, 5, 1e-10)
    report = multi_batch_lbfgs(space, batches, history, step_length=0.1, limits=Limits(iterations=80))
    assert report.evaluations == report.iterations + 1 == len(batches.sizes) == 81
    assert batches.sampling.portions.start == 80 * 6
    assert not history.fresh
    assert loss() < 0.9 * best < 0


def test_the_curvature_of_a_pair_is_that_of_the_shared_samples():
    space, batches, _, _ = partial_problem(9, overlap=3)
    history = History(space, 5)
    multi_batch_lbfgs(space, batches, history, step_length=0.1, limits=Limits(iterations=3))
    for number, (s, y) in enumerate(history.pairs):
        shared = range(6 * number + 6, 6 * number + 9)
        here = np.zeros(12)
        change = [batches.terms[k % 20](space.array(s))[1] - batches.terms[k % 20](here)[1] for k in shared]
        np.testing.assert_allclose(space.array(y), np.mean(change, axis=0), rtol=1e-9, atol=1e-12)


def test_batches_that_grow_reach_the_minimum_of_all_samples():
    space, batches, loss, best = partial_problem(3, iterations=4, growth=2.0)
    report = lbfgs(space, batches.evaluate, batches=batches, limits=Limits(gtol=1e-7, ftol=0))
    assert report.reason == "gradient"
    assert batches.sampling.whole
    assert batches.sizes == sorted(batches.sizes)
    assert {3, 6, 12, 20} == set(batches.sizes)
    assert loss() == pytest.approx(best, rel=1e-9)


def test_a_batch_stays_for_its_iterations_and_grows_only_where_progress_stalls():
    sampling = Sampling(Order(100, 10, 3, 0), 4, 2, 1.5)
    assert sampling.portions == range(4)
    sampling.evaluated(1.0)
    assert [sampling.proceed(), sampling.proceed()] == [False, True]
    assert sampling.portions == range(4, 8)
    sampling.evaluated(0.9)
    sampling.evaluated(5.0)  # a trial on the same batch tells nothing
    assert [sampling.proceed(), sampling.proceed()] == [False, True]
    assert sampling.portions == range(8, 12)
    sampling.evaluated(0.95)
    assert [sampling.proceed(), sampling.proceed()] == [False, True]
    assert sampling.portions == range(12, 18)
    other = Sampling(Order(100, 10, 3, 0), 4, 2, 1.5)
    other.restore(sampling.position)
    assert other.portions == sampling.portions
    assert sampling.exhausted()
    assert len(sampling.portions) == 9
    assert sampling.exhausted()
    assert (sampling.portions, sampling.exhausted(), sampling.proceed()) == (range(10), False, False)


def test_all_samples_with_masks_that_are_drawn_change_after_some_iterations():
    sampling = Sampling(Order(100, 10, 30, 0), 0, 3, drawn=True)
    assert not sampling.whole
    seen = []
    for _ in range(7):
        seen.append((sampling.portions, sampling.proceed()))
    first, second, third = range(10), range(10, 20), range(20, 30)
    assert seen == [
        (first, False), (first, False), (first, True), (second, False), (second, False), (second, True), (third, False)
    ]  # fmt: skip
    assert not sampling.exhausted()
    grown = Sampling(Order(100, 10, 30, 0), 6, 1, 2.0, drawn=True)
    assert grown.exhausted()
    assert grown.portions == range(6, 16)
    assert not grown.exhausted()
    assert grown.proceed()
    assert grown.portions == range(16, 26)


def test_steps_into_the_infinite_are_shrunk_and_then_refused():
    space, batches, _, _ = partial_problem(9, overlap=3)
    evaluate, counts = batches.evaluate, []

    def failing(point, gradient):
        counts.append(point)
        return evaluate(point, gradient) if len(counts) not in (2, 3) else np.inf

    batches.evaluate = failing
    assert multi_batch_lbfgs(space, batches, History(space, 5), limits=Limits(iterations=1)).evaluations == 4
    batches.evaluate = lambda point, gradient: np.nan
    counts[:] = [0] * 9
    with pytest.raises(RunFailed, match="start from other parameters"):
        multi_batch_lbfgs(space, batches, History(space, 5))
    batches.evaluate = lambda point, gradient: (
        counts.append(0) or (evaluate(point, gradient) if len(counts) < 11 else np.nan)
    )
    before = space.array("parameters").copy()
    with pytest.raises(RunFailed, match=r"Lower sandblaster.step_length"):
        multi_batch_lbfgs(space, batches, History(space, 5))
    np.testing.assert_array_equal(space.array("parameters"), before)
