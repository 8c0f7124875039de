"""Gradient descent, conjugate gradients, OWL-QN and L2 terms beside SciPy and scikit-learn."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from scipy.special import expit
from unit.sharded import Shards, cut_points, local_problem
from unit.test_lbfgs import quadratic, rosenbrock

from dbmpi.errors import RunFailed
from dbmpi.methods.descent import Limits
from dbmpi.methods.gradients import conjugate_gradients, gradient_descent, owlqn, with_l2

TIGHT = Limits(gtol=1e-7, ftol=0)


@pytest.mark.parametrize(("method", "condition"), [(gradient_descent, 10), (conjugate_gradients, 1e3)])
def test_quadratics(method, condition):
    function, solution = quadratic(50, condition)
    space, evaluate, x = local_problem(function, np.zeros(50))
    report = method(space, evaluate, limits=TIGHT)
    assert function(x)[0] == pytest.approx(function(solution)[0], rel=1e-10)
    if method is conjugate_gradients:
        theirs = optimize.minimize(function, np.zeros(50), jac=True, method="CG", options={"gtol": 1e-7})
        assert report.evaluations <= 1.1 * theirs.nfev


def test_conjugate_gradients_on_rosenbrock():
    space, evaluate, x = local_problem(rosenbrock, np.tile([-1.2, 1.0], 5))
    assert conjugate_gradients(space, evaluate, limits=TIGHT).largest < 1e-5
    np.testing.assert_allclose(x, 1, atol=1e-5)


@pytest.mark.parametrize("method", [gradient_descent, conjugate_gradients])
def test_bits_do_not_depend_on_shards(method):
    results = []
    for parts in (1, 2, 3, 5):
        with Shards(np.linspace(-1, 1, 77), cut_points(77, parts)) as shards:
            method(shards.space, shards.evaluate(rosenbrock), limits=Limits(0, 0, iterations=12))
            results.append(shards.gather("parameters").tobytes())
    assert len(set(results)) == 1


def test_an_l2_term_and_its_gradient():
    function, _ = quadratic(20, 10)
    space, evaluate, x = local_problem(function, np.linspace(-1, 1, 20))
    space.create("g")
    assert with_l2(space, evaluate, 0.3)("parameters", "g") == pytest.approx(function(x)[0] + 0.15 * x @ x, rel=1e-14)
    np.testing.assert_allclose(space.array("g"), function(x)[1] + 0.3 * x, rtol=1e-14)


def logistic(samples=300, features=25, seed=4):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(samples, features))
    labels = np.where(inputs[:, :4] @ [2.0, -1.5, 1, 0.5] + random.normal(size=samples) > 0, 1.0, -1.0)

    def loss(w):
        z = labels * (inputs @ w)
        return float(np.logaddexp(0, -z).mean()), inputs.T @ (-labels * expit(-z)) / samples

    return inputs, labels, loss


@pytest.mark.parametrize("strength", [0.003, 0.03])
def test_l1_logistic_regression_beside_scikit_learn(strength):
    linear = pytest.importorskip("sklearn.linear_model")
    inputs, labels, loss = logistic()
    space, evaluate, x = local_problem(loss, np.zeros(25))
    report = owlqn(space, evaluate, strength=strength, limits=Limits(gtol=1e-7, ftol=0))
    judge = linear.LogisticRegression(
        l1_ratio=1, solver="saga", C=1 / (strength * len(labels)), fit_intercept=False, tol=1e-9, max_iter=20_000
    )
    theirs = judge.fit(inputs, labels).coef_[0]
    assert report.loss == pytest.approx(loss(theirs)[0] + strength * np.abs(theirs).sum(), rel=1e-7)
    np.testing.assert_allclose(x, theirs, atol=1e-4)
    np.testing.assert_array_equal(x == 0, np.abs(theirs) < 1e-7)
    assert 0 < np.count_nonzero(x) < 25


def test_a_strong_l1_term_leaves_nothing():
    _, _, loss = logistic()
    space, evaluate, x = local_problem(loss, np.full(25, 0.5))
    assert owlqn(space, evaluate, strength=5.0).converged
    np.testing.assert_array_equal(x, 0)
    with pytest.raises(ValueError, match="must be positive"):
        owlqn(space, evaluate, strength=0.0)


def test_l1_bits_do_not_depend_on_shards():
    _, _, loss = logistic()
    results = []
    for parts in (1, 2, 3, 5):
        with Shards(np.zeros(25), cut_points(25, parts)) as shards:
            owlqn(shards.space, shards.evaluate(loss), strength=0.01, limits=Limits(0, 0, iterations=15))
            results.append(shards.gather("parameters").tobytes())
    assert len(set(results)) == 1


def test_a_wrong_gradient_is_named_by_owlqn():
    space, evaluate, _ = local_problem(lambda x: (float(x @ x), -2 * x), np.ones(4))
    with pytest.raises(RunFailed, match="likely cause is a wrong gradient"):
        owlqn(space, evaluate, strength=0.01)


def test_the_method_of_the_example_runs_on_any_number_of_shards():
    path = Path(__file__).parents[2] / "examples" / "own_batch_method.py"
    spec = importlib.util.spec_from_file_location("own_batch_method", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    function, solution = quadratic(50, 10)
    results = []
    for parts in (1, 3):
        with Shards(np.zeros(50), cut_points(50, parts)) as shards:
            limits = Limits(gtol=1e-8)
            report = example.barzilai_borwein(shards.space, shards.evaluate(function), limits=limits)
            assert report.reason == "gradient"
            results.append((*report, len(shards.commands)))
            np.testing.assert_allclose(shards.gather("parameters"), solution, atol=1e-6)
    assert results[0] == results[1]
