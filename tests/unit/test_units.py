"""No method and no search depends on the units of the loss or of x: standard problems in units from 1e-12 to 1e12."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from unit.sharded import local_problem

from dbmpi.errors import RunFailed
from dbmpi.methods import linesearch
from dbmpi.methods.descent import Limits
from dbmpi.methods.gradients import conjugate_gradients, gradient_descent, owlqn
from dbmpi.methods.lbfgs import lbfgs

_SPEC = importlib.util.spec_from_file_location(
    "standard_problems", Path(__file__).parents[2] / "benchmarks" / "standard_problems.py"
)
standard_problems = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(standard_problems)
PROBLEMS = {problem.name: problem for problem in standard_problems.PROBLEMS}

ONES = [(1.0, 1e-12), (1.0, 1e12), (1e-12, 1.0), (1e12, 1.0)]
UNITS = [*ONES, (1e12, 1e-12), (1e-12, 1e12), (1e-12, 1e-12), (1e6, 1e-9)]
"""Of x, and of the loss."""
SOME = ["rosenbrock 2", "beale 2", "wood 4", "brown_dennis 4", "osborne_1 5", "watson 6", "penalty_1 10"]
METHODS = {
    "lbfgs": lbfgs,
    "conjugate gradients": conjugate_gradients,
    "gradient descent": gradient_descent,
    "backtracking": partial(lbfgs, search=linesearch.backtracking),
    "fixed": partial(lbfgs, search=partial(linesearch.fixed, factor=0.5)),
}


def minimised(method, problem, of_x=1.0, of_f=1.0, gtol=1e-5, ftol=0.0, iterations=60):
    """Return the report and the point, in the problem's own units."""
    space, evaluate, x = local_problem(problem.in_units(of_x, of_f), of_x * problem.start)
    report = method(space, evaluate, limits=Limits(gtol * of_f / of_x, ftol, iterations))
    return report, report.loss / of_f, x / of_x


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_problems_are_those_that_were_published(problem):
    """Gradients are those of differences, and minima those of the publication (or of where SciPy's method ends)."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=problem.start.size) * (np.abs(problem.start) + 0.1)
    _, gradient = problem(problem.start)
    h = 1e-6
    difference = (problem(problem.start + h * direction)[0] - problem(problem.start - h * direction)[0]) / (2 * h)
    assert gradient @ direction == pytest.approx(difference, rel=1e-4, abs=1e-7 * np.abs(gradient * direction).max())
    tight = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15)
    residuals = lambda x: np.nan_to_num(problem.residuals(x).real, nan=1e10, posinf=1e10)  # noqa: E731
    found = optimize.least_squares(residuals, problem.start, max_nfev=5000, **tight)
    assert any(2 * found.cost == pytest.approx(least, rel=1e-4, abs=1e-6) for least in problem.least)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SOME)
def test_iterations_do_not_depend_on_units(method, name):
    """In powers of two, which rounding does not see, to the last bit; else nearly so."""
    one, loss, x = minimised(METHODS[method], PROBLEMS[name])
    for of_x, of_f in ((2.0**40, 2.0**-40), (2.0**-40, 2.0**-30)):
        other, its_loss, its_x = minimised(METHODS[method], PROBLEMS[name], of_x, of_f)
        assert (other.reason, other.iterations, other.evaluations) == (one.reason, one.iterations, one.evaluations)
        assert its_loss == loss
        np.testing.assert_array_equal(its_x, x)
    for of_x, of_f in UNITS[:: 3 if method != "lbfgs" else 1]:
        other, _, _ = minimised(METHODS[method], PROBLEMS[name], of_x, of_f)
        assert other.iterations == pytest.approx(one.iterations, rel=0.15, abs=2)


@pytest.mark.slow
def test_iterations_beside_scipy():
    """The median over the problems, at every scale; with ftol as well, which stands for the same in any units."""
    names = [name for name in PROBLEMS if not name.startswith(("meyer", "jennrich", "brown_dennis"))][::2]
    theirs = [
        optimize.minimize(
            PROBLEMS[name], PROBLEMS[name].start, jac=True, method="L-BFGS-B", options={"gtol": 1e-5, "ftol": 0}
        ).nit
        for name in names
    ]
    for of_x, of_f in [(1.0, 1.0), *UNITS]:
        ours = [minimised(lbfgs, PROBLEMS[name], of_x, of_f, iterations=500)[0].iterations for name in names]
        assert np.median(np.array(ours) / theirs) <= 1.1


def test_tolerances_do_not_depend_on_units():
    problem = PROBLEMS["bard 3"]
    one, loss, _ = minimised(lbfgs, problem, gtol=0, ftol=1e-6)
    assert one.reason == "loss"
    for of_x, of_f in UNITS:
        other, its_loss, _ = minimised(lbfgs, problem, of_x, of_f, gtol=0, ftol=1e-6)
        assert (other.reason, other.iterations) == (one.reason, one.iterations)
        assert its_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(("of_x", "of_f"), UNITS)
def test_l1_terms_and_wrong_gradients_in_any_units(of_x, of_f):
    problem = PROBLEMS["broyden_tridiagonal 10"]
    one, loss, x = minimised(partial(owlqn, strength=0.1), problem)
    other, its_loss, its_x = minimised(partial(owlqn, strength=0.1 * of_f / of_x), problem, of_x, of_f)
    assert other.iterations == pytest.approx(one.iterations, rel=0.15, abs=2)
    assert its_loss == pytest.approx(loss, rel=1e-8)
    np.testing.assert_allclose(its_x, x, atol=1e-4)
    function = problem.in_units(of_x, of_f)
    space, evaluate, _ = local_problem(lambda z: (function(z)[0], -function(z)[1]), of_x * problem.start)
    with pytest.raises(RunFailed, match="likely cause is a wrong gradient"):
        lbfgs(space, evaluate, limits=Limits(0, 0))
