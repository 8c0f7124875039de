"""Batch methods beside L-BFGS, on the same operations: gradient descent, conjugate gradients; and L2 terms."""

from __future__ import annotations

from functools import partial

from dbmpi.methods.descent import Batches, Callback, Evaluate, Limits, Line, Report, Step, descend, prepare
from dbmpi.methods.lbfgs import History
from dbmpi.methods.linesearch import LineSearch, strong_wolfe
from dbmpi.methods.owlqn import owlqn
from dbmpi.methods.space import Space

__all__ = ["conjugate_gradients", "gradient_descent", "owlqn", "with_l2"]

exact_search: LineSearch = partial(strong_wolfe, decrease=1e-4, curvature=0.4)
"""What conjugate gradients need: a curvature below 1/2 (Nocedal and Wright, section 5.2); these are SciPy's constants.

A stricter search (0.1) costs half as many evaluations again on the usual test problems."""


def with_l2(space: Space, evaluate: Evaluate, strength: float) -> Evaluate:
    """Return the evaluation of ``loss(x) + strength / 2 |x|^2``.

    Parameters
    ----------
    space, evaluate
        Where the vectors are, and the evaluation of the loss.
    strength
        Not negative.
    """

    def evaluate_with_l2(point: str, gradient: str) -> float:
        loss = evaluate(point, gradient)
        space.axpy(strength, point, gradient)
        return loss + strength / 2 * float(space.dots([(point, point)])[0])

    return evaluate_with_l2


def gradient_descent(
    space: Space,
    evaluate: Evaluate,
    *,
    search: LineSearch = strong_wolfe,
    limits: Limits | None = None,
    callback: Callback | None = None,
    batches: Batches | None = None,
) -> Report:
    """Minimise along the negative gradient.

    Parameters
    ----------
    space, evaluate, search, limits, callback, batches
        As for :func:`dbmpi.methods.lbfgs.lbfgs`.
    """
    return descend(space, evaluate, History(space, 0), search, limits, callback, batches)


def conjugate_gradients(
    space: Space,
    evaluate: Evaluate,
    *,
    search: LineSearch = exact_search,
    limits: Limits | None = None,
    callback: Callback | None = None,
    batches: Batches | None = None,
) -> Report:
    """Minimise by nonlinear conjugate gradients, PR+: Nocedal and Wright, algorithm 5.4 and equation 5.45.

    The method needs a line search more exact than L-BFGS does.

    Parameters
    ----------
    space, evaluate, search, limits, callback, batches
        As for :func:`dbmpi.methods.lbfgs.lbfgs`.
    """
    return descend(space, evaluate, _PolakRibiere(space), search, limits, callback, batches)


class _PolakRibiere:
    """Directions ``p = -g + beta p`` with ``beta = max(0, g (g - g_last) / g_last^2)``."""

    name = "direction"
    descent = 0.01
    """A direction must descend at least by this fraction of what steepest descent would (as in SciPy's method)."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._square = self._beta = self._slope = self._product = 0.0
        prepare(space, self.name)

    @property
    def fresh(self) -> bool:
        return self._beta == 0

    def forget(self) -> None:
        self._beta = 0.0

    def measure(self, gradient: str, square: float) -> None:
        self._square = square
        if self._beta:
            self._product = float(self._space.dots([(gradient, self.name)])[0])

    def choose(self, gradient: str) -> Line:
        # p g = -g^2 + beta p_last g
        self._slope = -self._square + self._beta * self._product
        if not self._slope <= -self.descent * self._square:
            self._beta, self._slope = 0.0, -self._square
        terms = [(-1.0, gradient), (self._beta, self.name)]
        self._space.combine(self.name, terms if self._beta else terms[:1])
        return Line(self.name, self._slope, None)

    def products(self, gradient: str, after: str, before: str) -> list[tuple[str, str]]:
        return [(gradient, after), (gradient, before)]

    def learn(self, step: Step, gradient: str) -> None:
        new, old = step.products
        self._beta = max(0.0, (new - old) / self._square)
        self._square, self._product = step.gradient_square, step.slope
