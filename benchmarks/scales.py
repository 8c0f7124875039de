"""Batch methods in nine units of the parameters and of the loss each, on the problems of Moré, Garbow and Hillstrom.

A minimisation should not depend on whether lengths are given in metres or in light-years.  Each problem is minimised
from its standard start as ``u f(x / s)`` for nine s and nine u from 1e-12 to 1e12, with a `gtol` in the same units.
The judge is SciPy's L-BFGS-B at scale 1 with the same tolerances: what counts is the median over the problems of our
iterations beside its own, at the worst of all scales.  For every method, iterations are compared with those at scale 1.
"""

from __future__ import annotations

import statistics
import warnings
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from standard_problems import Problem

SCALES = tuple(10.0**power for power in range(-12, 13, 3))
GTOL, MOST = 1e-5, 1000
BESIDE_SCIPY, BESIDE_ONE = 1.1, 1.05
METHODS = ("lbfgs", "conjugate_gradients", "gradient_descent", "owlqn")


def main() -> None:
    options = common.options(__doc__)
    common.prepare_runtime()
    from standard_problems import PROBLEMS

    report = common.Report("scales", options.json)
    scales = SCALES[::4] if options.quick else SCALES
    judged = [scipys(problem) for problem in PROBLEMS]
    rows = []
    for method in METHODS:
        problems = PROBLEMS if method == "lbfgs" else PROBLEMS[:: 4 if options.quick else 2]
        one = [iterations(method, problem, 1.0, 1.0) for problem in problems]
        beside_one, beside_scipy = [], []
        for of_x in scales:
            for of_f in scales:
                found = [iterations(method, problem, of_x, of_f) for problem in problems]
                beside_one.append([ours / before for ours, before in zip(found, one, strict=True)])
                if method == "lbfgs":
                    beside_scipy.append(statistics.median(a / b for a, b in zip(found, judged, strict=True)))
        worst = max(statistics.median(ratios) for ratios in beside_one)
        other = sum(ratio != 1 for ratios in beside_one for ratio in ratios) / sum(map(len, beside_one))
        judge = max(beside_scipy, default=float("nan"))
        rows.append((method, len(problems), statistics.median(one), judge, worst, other))
        if beside_scipy:
            report.at_most("iterations of L-BFGS beside SciPy's at scale 1, worst scale", judge, BESIDE_SCIPY)
        report.at_most(f"iterations beside those at scale 1, worst scale, {method}", worst, BESIDE_ONE)
    header = ("method", "problems", "iterations at 1", "beside SciPy's", "beside scale 1", "share that differ")
    report.table(f"Medians over the problems, at the worst of {len(scales) ** 2} scales", header, rows)
    report.finish()


def iterations(method: str, problem: Problem, of_x: float, of_f: float) -> int:
    """Return the iterations that a method takes."""
    import numpy as np

    from dbmpi.methods import gradients
    from dbmpi.methods.descent import Limits
    from dbmpi.methods.lbfgs import lbfgs
    from dbmpi.methods.local_space import LocalSpace

    function = problem.in_units(of_x, of_f)
    x = of_x * problem.start
    space = LocalSpace(x.size, np.float64, vectors={"parameters": x})

    def evaluate(point: str, gradient: str) -> float:
        loss, space.writable(gradient)[:] = function(space.array(point))
        return loss

    limits = Limits(GTOL * of_f / of_x, 0, MOST if method == "lbfgs" else MOST // 10)
    settings: dict[str, Any] = {"strength": 1e-2 * of_f / of_x} if method == "owlqn" else {}
    chosen = lbfgs if method == "lbfgs" else getattr(gradients, method)
    return max(int(chosen(space, evaluate, limits=limits, **settings).iterations), 1)


def scipys(problem: Problem) -> int:
    """Return the iterations of SciPy's L-BFGS-B."""
    from scipy import optimize

    options = {"gtol": GTOL, "ftol": 0, "maxiter": MOST, "maxfun": 20 * MOST}
    with warnings.catch_warnings(action="ignore"):
        found = optimize.minimize(problem, problem.start, jac=True, method="L-BFGS-B", options=options)
    return int(found.nit)


if __name__ == "__main__":
    main()
