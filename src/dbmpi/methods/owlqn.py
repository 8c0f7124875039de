"""OWL-QN: L-BFGS for a loss with an L1 term, whose minimum has many zeros.

Andrew and Gao, "Scalable training of L1-regularized log-linear models", ICML 2007.  Within an orthant the L1 term is
linear.  So the direction comes from the history of the smooth loss and from the *pseudo-gradient*, the one-sided
derivative of the whole that descends most; and no trial point may leave its orthant: elements that would change their
sign become zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dbmpi.methods.descent import (
    GRADIENT,
    ORIGIN,
    OTHER_GRADIENT,
    POINT,
    Callback,
    Depth,
    Evaluate,
    Evaluations,
    Limits,
    Line,
    Progress,
    Reason,
    Report,
    Step,
    prepare,
)
from dbmpi.methods.lbfgs import CAUTION, History
from dbmpi.methods.linesearch import SHRINK, LineSearchFailed, Trial
from dbmpi.methods.space import Space
from dbmpi.methods.walk import explain, prober, scaled

PSEUDO, DISPLACEMENT = "pseudo-gradient", "displacement"
"""Names of the vectors that only this method uses."""


def owlqn(
    space: Space,
    evaluate: Evaluate,
    *,
    strength: float,
    memory: int = 10,
    caution: float = CAUTION,
    limits: Limits | None = None,
    callback: Callback | None = None,
    history: History | None = None,
) -> Report:
    """Minimise ``loss(x) + strength |x|_1`` from the point in the vector "parameters": algorithm 1 of the publication.

    Parameters
    ----------
    space, evaluate, memory, caution, limits, callback, history
        As for :func:`dbmpi.methods.lbfgs.lbfgs`.  `evaluate` knows the smooth loss alone; reports are of the whole,
        with the pseudo-gradient as the gradient.
    strength
        Factor of the L1 norm, positive.

    Raises
    ------
    RunFailed
        As `lbfgs`.
    """
    if not strength > 0:
        raise ValueError(f"the strength of the L1 term is {strength}: it must be positive")
    limits = limits or Limits()
    history = History(space, memory, caution) if history is None else history
    gradient, other = GRADIENT, OTHER_GRADIENT
    prepare(space, ORIGIN, gradient, other, PSEUDO, DISPLACEMENT)
    counted = Evaluations(evaluate)
    smooth, _, _ = counted.start(space, POINT, gradient)
    here = _Place(smooth, strength * float(space.norms([POINT], "one")[0]))
    square, largest = _pseudo_gradient(space, gradient, strength)
    history.measure(PSEUDO, square)
    iteration, gain = 0, math.nan
    begun = Depth(abs(here.loss), largest)

    def with_l1(point: str, gradient: str) -> float:
        return counted(point, gradient) + strength * float(space.norms([point], "one")[0])

    def report(reason: Reason) -> Report:
        if reason in ("loss", "precision") and begun.bottomless(here.loss, largest):
            reason = "unbounded"
        return Report(reason, here.loss, largest, iteration, counted.count)

    while not limits.flat(largest, square):
        if iteration >= limits.iterations:
            return report("iterations")
        if counted.count >= limits.evaluations:
            return report("evaluations")
        line = scaled(space, history.choose(PSEUDO), here.loss, gain)
        space.align(line.direction, PSEUDO)
        try:
            length, there, displacement_square = _walk(space, counted, line, other, here, strength)
        except LineSearchFailed as failure:
            if history.fresh:
                if not begun.bottomless(here.loss, largest):
                    explain(failure, prober(space, with_l1, line.direction, other))
                return report("precision")
            history.forget()
            continue
        iteration += 1
        gradient, other = other, gradient
        decrease, here = here.loss - there.loss, there
        gain = decrease if decrease > 0 else gain
        begun = begun if begun.loss else begun._replace(loss=abs(decrease))
        square, largest = _pseudo_gradient(space, gradient, strength)
        # The pair is the displacement and the change of the smooth gradient; the next direction needs the products
        # with the pseudo-gradient.
        space.copy(DISPLACEMENT, line.direction)
        products = space.dots(history.products(PSEUDO, gradient, other)) if history.memory else ()
        step = Step(1.0, here.loss, math.nan, displacement_square, square, largest, tuple(map(float, products)))
        history.learn(step, PSEUDO)
        if callback is not None and callback(Progress(iteration, counted.count, here.loss, largest, length)):
            return report("callback")
        if limits.little(decrease, here.loss):
            return report("gradient" if limits.flat(largest, square) else "loss")
    return report("gradient")


class _Place(NamedTuple):
    smooth: float
    penalty: float

    @property
    def loss(self) -> float:
        return self.smooth + self.penalty


def _pseudo_gradient(space: Space, gradient: str, strength: float) -> tuple[float, float]:
    """Form the pseudo-gradient at the point; return its square and its largest magnitude."""
    space.pseudo_gradient(POINT, gradient, strength, PSEUDO)
    square, largest = space.dots([(PSEUDO, PSEUDO)], [PSEUDO]).tolist()
    return square, largest


def _walk(
    space: Space,
    evaluate: Evaluate,
    line: Line,
    gradient: str,
    here: _Place,
    strength: float,
    decrease: float = 1e-4,
    trials: int = 40,
) -> tuple[float, _Place, float]:
    """Halve the step until the loss decreases enough: section 3.2 of the publication.

    "Enough" is the fraction `decrease` of what the pseudo-gradient promises for the projected step.  The gradient of
    the smooth loss goes to `gradient`.  Returns the step, the new place, and the square of the displacement.
    """
    slope = float(space.dots([(line.direction, PSEUDO)])[0])
    known = [Trial(0.0, here.loss, slope)]
    if not slope < 0:
        raise LineSearchFailed("the direction does not descend", known)
    assert line.first is not None
    length = line.first
    space.copy(POINT, ORIGIN)
    while len(known) <= trials:
        space.combine(POINT, [(1.0, ORIGIN), (length, line.direction)])
        space.project(POINT, ORIGIN, PSEUDO)
        space.combine(DISPLACEMENT, [(1.0, POINT), (-1.0, ORIGIN)])
        there = _Place(evaluate(POINT, gradient), strength * float(space.norms([POINT], "one")[0]))
        pairs = [(PSEUDO, DISPLACEMENT), (gradient, DISPLACEMENT), (DISPLACEMENT, DISPLACEMENT)]
        promised, change, square = space.dots(pairs).tolist()
        # The slope there along the displacement; the L1 term is linear on the way.
        known.append(Trial(length, there.loss, (change + there.penalty - here.penalty) / length))
        if known[-1].finite and there.loss <= here.loss + decrease * promised:
            return length, there, square
        length *= 0.5 if known[-1].finite else SHRINK
    space.copy(ORIGIN, POINT)
    raise LineSearchFailed(f"no step down to {known[-1].step:g} decreases the loss enough", known)
