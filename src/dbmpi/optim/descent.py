"""What batch methods share: evaluations, walking along a line, when to stop, and the loop around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from dbmpi.errors import RunFailed
from dbmpi.optim.linesearch import ROUNDING, LineSearch, LineSearchFailed, Trial, disagreement
from dbmpi.optim.space import Space

Evaluate = Callable[[str, str], float]
"""``evaluate(point, gradient)``: pass over the batch at the vector named `point`, leave the gradient of the mean loss
in the vector named `gradient`, and return the mean loss."""

POINT, ORIGIN = "parameters", "previous parameters"
GRADIENT, OTHER_GRADIENT = "gradient", "other gradient"
"""Names of the vectors that every method uses.  The point is always in `POINT`; the two gradients take turns."""

UNBOUNDED = 1e100
"""A loss below minus this counts as one without a bound."""

Reason = Literal["gradient", "loss", "precision", "iterations", "evaluations", "callback"]


@dataclass(frozen=True)
class Limits:
    """When to stop; the names and defaults of the first two are those of SciPy's L-BFGS-B."""

    gtol: float = 1e-5
    """Largest magnitude of the gradient at which the point counts as a minimum."""
    ftol: float = 2.2e-9
    """Decrease of the loss in an iteration, relative to the loss or to 1, at which the loss counts as minimal."""
    iterations: int = 15_000
    """Largest number of iterations."""
    evaluations: int = 15_000
    """Number of evaluations after which no iteration begins."""

    def flat(self, largest: float, square: float) -> bool:
        """Return whether a gradient counts as zero: its largest magnitude is small, or too small to be squared."""
        return largest <= self.gtol or square == 0

    def little(self, decrease: float, loss: float) -> bool:
        """Return whether the decrease to a loss counts as none; an increase, with a fixed step, does not."""
        scale = max(abs(loss), abs(loss + decrease), 1.0)
        return -ROUNDING * scale <= decrease <= self.ftol * scale


class Progress(NamedTuple):
    """What a callback hears after every iteration."""

    iteration: int
    evaluations: int
    loss: float
    largest: float
    """Largest magnitude of the gradient."""
    step: float
    """Step along the direction."""
    square: float = math.nan
    """Square of the gradient."""
    gradient: str = GRADIENT
    """Name of the vector that holds it."""
    decrease: float = math.nan
    """How much the loss has decreased in the iteration; not a number where batches differ."""


Callback = Callable[[Progress], bool | None]
"""Hears of every iteration; ends the run if it returns True."""


class Report(NamedTuple):
    """How a run ended; the point is in the vector `POINT`."""

    reason: Reason
    """``gradient``, ``loss``: converged; ``precision``: the loss can no longer be decreased at its own precision."""
    loss: float
    largest: float
    """Largest magnitude of the gradient."""
    iterations: int
    evaluations: int

    @property
    def converged(self) -> bool:
        """Whether a tolerance was reached."""
        return self.reason in ("gradient", "loss")


class Start(NamedTuple):
    """Where a search goes on that ended after an iteration; the gradient is in place."""

    gradient: str
    """Name of its vector, `GRADIENT` or `OTHER_GRADIENT`."""
    loss: float
    square: float
    largest: float
    """Square and largest magnitude of the gradient."""
    decrease: float
    """As in :class:`Progress`."""
    iteration: int
    """Iterations taken so far."""


class Batches(Protocol):
    """Samples that change between iterations; without them, all evaluations see the same samples."""

    def proceed(self) -> bool:
        """Go on to the batch of the next iteration; return whether it is another one."""
        ...

    def exhausted(self) -> bool:
        """Hear that the loss of this batch is minimal; return whether there is another one to go on with."""
        ...


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
    first: float
    """Step to try first."""


class Directions(Protocol):
    """The part in which line search methods differ."""

    @property
    def fresh(self) -> bool:
        """Whether the next direction is that of steepest descent, because nothing has been learned."""
        ...

    def forget(self) -> None:
        """Unlearn everything."""
        ...

    def measure(self, gradient: str, square: float) -> None:
        """Hear of a gradient that no step has led to, and of its square: the first one, or that of another batch."""
        ...

    def choose(self, gradient: str) -> Line:
        """Return the next line."""
        ...

    def products(self, gradient: str, after: str, before: str) -> list[tuple[str, str]]:
        """Name the products to learn from if the step along the last line is taken; form the vectors for them.

        They are computed together with those that the line search needs: one reduction serves both.

        Parameters
        ----------
        gradient
            The gradient at the trial point.
        after, before
            Gradients of the same samples there and where the line begins.
        """
        ...

    def learn(self, step: Step, gradient: str) -> None:
        """Hear of a step to where the gradient is `gradient`; its `products` are those last named."""
        ...


class Evaluations:
    """Counts evaluations, and refuses a start from where the loss is not finite."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate, self.count = evaluate, 0

    def __call__(self, point: str, gradient: str) -> float:
        """Evaluate."""
        self.count += 1
        return float(self._evaluate(point, gradient))

    def start(self, space: Space, point: str, gradient: str) -> tuple[float, float, float]:
        """Evaluate where there is no way back; return loss, square and largest magnitude of the gradient.

        Raises
        ------
        RunFailed
            Where one of them is not finite.
        """
        loss = self(point, gradient)
        square, largest = space.dots([(gradient, gradient)], [gradient]).tolist()
        if not (math.isfinite(loss) and math.isfinite(square)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient has elements up to {largest}"
            raise RunFailed(
                f"the {what} at the point where the search for a minimum starts: start from other parameters"
            )
        return loss, square, largest


def prepare(space: Space, *names: str) -> None:
    """Make the vectors that are not there yet."""
    for name in names:
        if name not in space.names:
            space.create(name)


def descend(  # noqa: PLR0912
    space: Space,
    evaluate: Evaluate,
    directions: Directions,
    search: LineSearch,
    limits: Limits | None = None,
    callback: Callback | None = None,
    batches: Batches | None = None,
    start: Start | None = None,
) -> Report:
    """Minimise from the point in the vector `POINT`: choose a direction, search along it, learn from the step.

    With a `start`, and directions that were restored, everything goes on as if it had never ended.

    Raises
    ------
    RunFailed
        Where the loss is not finite at the start or anywhere along a direction, or the gradient contradicts the loss.
    """
    limits = limits or Limits()
    prepare(space, ORIGIN, GRADIENT, OTHER_GRADIENT)
    counted = Evaluations(evaluate)
    gradient, other, iteration = GRADIENT, OTHER_GRADIENT, 0
    decrease = math.nan
    """Of the step just taken; not a number where there was none."""
    if start is None:
        loss, square, largest = counted.start(space, POINT, gradient)
        directions.measure(gradient, square)
    else:
        gradient, loss, square, largest, decrease, iteration = start
        other = OTHER_GRADIENT if gradient == GRADIENT else GRADIENT

    def report(reason: Reason) -> Report:
        return Report(reason, loss, largest, iteration, counted.count)

    while True:
        little = limits.little(decrease, loss)
        stepped, decrease = not math.isnan(decrease), math.nan
        other_batch = batches is not None and stepped and batches.proceed()
        if not other_batch and (little or limits.flat(largest, square)):
            if batches is None or not batches.exhausted():
                return report("gradient" if limits.flat(largest, square) else "loss")
            other_batch = True
        if other_batch:
            loss, square, largest = counted.start(space, POINT, gradient)
            directions.measure(gradient, square)
            if limits.flat(largest, square):
                continue
        if iteration >= limits.iterations:
            return report("iterations")
        if counted.count >= limits.evaluations:
            return report("evaluations")
        line = directions.choose(gradient)
        if not line.slope < 0 and not directions.fresh:
            directions.forget()
            line = directions.choose(gradient)

        def pairs(before: str = gradient, after: str = other) -> list[tuple[str, str]]:
            return directions.products(after, after, before)

        try:
            step = walk(space, counted, search, line, other, loss, pairs)
        except LineSearchFailed as failure:
            explain(failure, directions.fresh)
            if not directions.fresh:
                directions.forget()
            elif batches is None or not batches.exhausted():
                return report("precision")
            else:
                loss, square, largest = counted.start(space, POINT, gradient)
                directions.measure(gradient, square)
            continue
        iteration += 1
        gradient, other = other, gradient
        decrease, loss, square, largest = loss - step.loss, step.loss, step.gradient_square, step.largest
        directions.learn(step, gradient)
        told = Progress(iteration, counted.count, loss, largest, step.length, square, gradient, decrease)
        if callback is not None and callback(told):
            return report("callback")


def first_step(square: float, last: tuple[float, float] | None = None) -> float:
    """Return the first step to try along a direction that has no scale of its own.

    At first one of length 1, as L-BFGS-B takes it; later the one that promises the same decrease as the last
    step did: Nocedal and Wright, equation 3.60.

    Parameters
    ----------
    square
        Square of the gradient; along a direction other than steepest descent, minus the slope.
    last
        Length of the last step, and slope where it began.
    """
    if last is None:
        return 1 / math.sqrt(square)
    length, slope = last
    return length * -slope / square


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


def explain(failure: LineSearchFailed, fresh: bool) -> None:
    """Raise a RunFailed where a failed search has a cause that another direction would not cure.

    Parameters
    ----------
    failure
        What the search raised.
    fresh
        Whether the direction was that of steepest descent.
    """
    doubt = disagreement(failure.trials)
    if doubt is not None:
        raise RunFailed(
            f"the line search failed: {failure}.  The likely cause is a wrong gradient: {doubt}.  Compare the "
            "objective's gradient with finite differences, and see whether it gives the same loss twice at one point."
        ) from failure
    lowest = min((trial.loss for trial in failure.trials if trial.loss < -UNBOUNDED), default=0.0)
    if lowest:
        raise RunFailed(
            f"the loss has no minimum, as it seems: it has fallen to {lowest:g}.  Look for a term with the wrong "
            "sign, or add an L2 term that keeps the parameters small."
        ) from failure
    if fresh and not any(trial.finite for trial in failure.trials[1:]):
        raise RunFailed(
            f"the line search failed: {failure}, although the loss is {failure.trials[0].loss:g} where it starts.  The "
            "parameters are as they were there; look for values out of range in the data or the objective."
        ) from failure
