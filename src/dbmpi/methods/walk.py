"""One line of a batch method: how far to begin with, walking along it, and why no step was found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from dbmpi.errors import RunFailed
from dbmpi.methods.linesearch import LineSearch, LineSearchFailed, Trial, disagreement
from dbmpi.methods.space import Space

Evaluate = Callable[[str, str], float]
"""``evaluate(point, gradient)``: pass over the batch at the vector named `point`, leave the gradient of the mean loss
in the vector named `gradient`, and return the mean loss."""

POINT, ORIGIN = "parameters", "previous parameters"
"""Names of the vectors with the point, and with where a line begins."""


class Step(NamedTuple):
    """A step that was tried, and the products that were computed on the way."""

    length: float
    """Multiple of the direction."""
    loss: float
    slope: float
    """Product of the direction and the new gradient."""
    direction_square: float
    gradient_square: float
    largest: float
    """Largest magnitude of the new gradient."""
    products: tuple[float, ...] = ()
    """The products that the method asked for."""


class Line(NamedTuple):
    """A direction to search along."""

    direction: str
    slope: float
    """Product of the direction and the gradient."""
    first: float | None
    """Step to try first; None for a direction without a scale of its own."""


def scaled(space: Space, line: Line, loss: float, gain: float = math.nan) -> Line:
    """Return the line with a first step, where its direction has no scale of its own.

    Where a parabola through the last two losses, with this slope, has its minimum (Nocedal and Wright, after equation
    3.60).  Without a last step, where the loss would be zero if it fell as the slope says, but no more than a tenth of
    the way from the point to zero: L-BFGS-B begins with a step of length 1, which depends on the units of x, and so
    does all that follows.

    Parameters
    ----------
    space
        Where the vectors are.
    line, loss
        The line, and the loss where it begins.
    gain
        How much the last step has decreased the loss; not a number without one.
    """
    if line.first is not None:
        return line
    steepness = math.sqrt(-line.slope)
    if gain > 0:
        return line._replace(first=2 * (gain / steepness / steepness))
    size = math.sqrt(float(space.dots([(POINT, POINT)])[0]))
    steps = [0.1 * size / steepness, abs(loss) / steepness / steepness]
    return line._replace(first=min((step for step in steps if 0 < step < math.inf), default=1 / steepness))


def walk(
    space: Space,
    evaluate: Evaluate,
    search: LineSearch,
    line: Line,
    after: str,
    loss: float,
    pairs: Callable[[], list[tuple[str, str]]],
) -> Step:
    """Search along a line from `POINT`; the gradient at the new point goes to `after`.

    Where no step is found, the point is as before, and LineSearchFailed is raised.

    Parameters
    ----------
    space, evaluate
        Where the vectors are, and what to minimise.
    search, line
        Along which line, and how.
    after
        Name of the vector for the gradient.
    loss
        Where the line begins.
    pairs
        Names the products that a trial is to be measured by, beside those of the search.
    """

    def there(length: float) -> Step:
        value = evaluate(POINT, after)
        if not math.isfinite(value):
            return Step(length, value, math.nan, math.nan, math.nan, math.nan)
        own = [(after, line.direction), (line.direction, line.direction), (after, after)]
        slope, direction_square, square, *products, largest = space.dots(own + pairs(), [after]).tolist()
        if not math.isfinite(square):  # a gradient that the next direction cannot be made of
            slope = math.nan
        return Step(length, value, slope, direction_square, square, largest, tuple(products))

    assert line.first is not None, "see `scaled`"
    trials = search(loss, line.slope, line.first)
    length = next(trials)
    space.advance(POINT, ORIGIN, length, line.direction)
    try:
        while True:
            step = there(length)
            length = trials.send((step.loss, step.slope))
            space.combine(POINT, [(1.0, ORIGIN), (length, line.direction)])
    except StopIteration as end:
        accepted: Trial = end.value
    except LineSearchFailed:
        space.copy(ORIGIN, POINT)
        raise
    if accepted.step != step.length:  # an earlier trial was the best one
        space.combine(POINT, [(1.0, ORIGIN), (accepted.step, line.direction)])
        step = there(accepted.step)
    return step


def explain(failure: LineSearchFailed, probe: Callable[[float], float] | None = None) -> None:
    """Raise RunFailed where a search along steepest descent has failed because of a fault, and not of rounding.

    Parameters
    ----------
    failure
        What the search raised.
    probe
        See :func:`dbmpi.methods.linesearch.disagreement`.
    """
    doubt = disagreement(failure.trials, probe)
    if doubt is not None:
        raise RunFailed(
            f"the line search failed: {failure}.  The likely cause is a wrong gradient: {doubt}.  Compare the "
            "objective's gradient with finite differences, and see whether it gives the same loss twice at one point."
        ) from failure
    if not any(trial.finite for trial in failure.trials[1:]):
        raise RunFailed(
            f"the line search failed: {failure}, although the loss is {failure.trials[0].loss:g} where it starts.  The "
            "parameters are as they were there; look for values out of range in the data or the objective."
        ) from failure


def prober(space: Space, evaluate: Evaluate, direction: str, gradient: str) -> Callable[[float], float]:
    """Return a function that evaluates at other steps along a line from `POINT`, and comes back.

    Parameters
    ----------
    space, evaluate
        Where the vectors are, and the loss.
    direction
        Name of the vector along the line.
    gradient
        Name of a vector that may be overwritten.
    """

    def probe(length: float) -> float:
        space.advance(POINT, ORIGIN, length, direction)
        loss = evaluate(POINT, gradient)
        space.copy(ORIGIN, POINT)
        return loss

    return probe
