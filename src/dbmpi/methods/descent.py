"""What batch methods share: evaluations, walking along a line, when to stop, and the loop around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from dbmpi.errors import RunFailed
from dbmpi.methods.linesearch import FURTHEST, ROUNDING, LineSearch, LineSearchFailed
from dbmpi.methods.space import Space
from dbmpi.methods.walk import ORIGIN, POINT, Evaluate, Line, Step, explain, prober, scaled, walk

__all__ = ["GRADIENT", "ORIGIN", "OTHER_GRADIENT", "POINT", "Evaluate", "Limits", "Line", "Report", "Step", "descend"]

GRADIENT, OTHER_GRADIENT = "gradient", "other gradient"
"""Names of the vectors that every method uses, beside `POINT` and `ORIGIN`; the two gradients take turns."""

UNBOUNDED = 1e30
"""A loss below minus so many times its size at the start, where the gradient grows, has no bound."""

STEEP = 0.5
"""A slope that is still this fraction of what it was, after the longest of steps, promises no minimum."""

Reason = Literal["gradient", "loss", "precision", "unbounded", "iterations", "evaluations", "callback"]


@dataclass(frozen=True)
class Limits:
    """When to stop; the names and defaults of the first two are those of SciPy's L-BFGS-B."""

    gtol: float = 1e-5
    """Largest magnitude of the gradient at which the point counts as a minimum, in the units of the loss and of x."""
    ftol: float = 2.2e-9
    """Decrease of the loss in an iteration, relative to the loss, at which the loss counts as minimal."""
    iterations: int = 15_000
    """Largest number of iterations."""
    evaluations: int = 15_000
    """Number of evaluations after which no iteration begins."""

    def flat(self, largest: float, square: float) -> bool:
        """Return whether a gradient counts as zero: its `largest` magnitude is small, or its `square` vanishes."""
        return largest <= self.gtol or square == 0

    def little(self, decrease: float, loss: float) -> bool:
        """Return whether the decrease to a loss counts as none; an increase, with a fixed step, does not."""
        scale = max(abs(loss), abs(loss + decrease))
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
    """``gradient``, ``loss``: converged; ``precision``: the loss can no longer be decreased at its own precision;
    ``unbounded``: it falls without a bound."""
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
        """Return the next line, from where the gradient is `gradient`."""
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


class Depth(NamedTuple):
    """Where a run began: size of the loss, or of its first promised decrease, and largest magnitude of the gradient."""

    loss: float
    largest: float

    def bottomless(self, loss: float, largest: float) -> bool:
        """Return whether a loss has no bound: it has fallen very far, and the gradient's `largest` has not shrunk."""
        return largest >= self.largest and loss < -UNBOUNDED * self.loss < 0


class TooSteep(RunFailed):
    """The squares of a gradient overflow, although its `largest` magnitude is finite."""

    def __init__(self, largest: float) -> None:
        super().__init__(f"the gradient has elements up to {largest:g}: minimise a small multiple of the loss")
        self.largest = largest


class Evaluations:
    """Counts the calls of `evaluate`, and refuses a start from where the loss is not finite."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate, self.count = evaluate, 0

    def __call__(self, point: str, gradient: str) -> float:
        """Evaluate."""
        self.count += 1
        return float(self._evaluate(point, gradient))

    def start(self, space: Space, point: str, gradient: str) -> tuple[float, float, float]:
        """Evaluate where there is no way back; return loss, square and largest magnitude of the gradient.

        Parameters
        ----------
        space
            Where the vectors are.
        point, gradient
            Names of the vector to evaluate at, and of the one for the gradient.

        Raises
        ------
        RunFailed
            Where one of them is not finite; `TooSteep` where that is the square alone.
        """
        loss = self(point, gradient)
        square, largest = space.dots([(gradient, gradient)], [gradient]).tolist()
        if not (math.isfinite(loss) and math.isfinite(square)):
            if math.isfinite(loss) and math.isfinite(largest):
                raise TooSteep(largest)
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient has elements that are {largest}"
            raise RunFailed(
                f"the {what} at the point where the search for a minimum starts: start from other parameters"
            )
        return loss, square, largest


def prepare(space: Space, *names: str) -> None:
    """Make the vectors of these `names` that the `space` lacks."""
    for name in names:
        if name not in space.names:
            space.create(name)


def descend(  # noqa: PLR0912, PLR0915
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

    Parameters
    ----------
    space, evaluate
        Where the vectors are, and what to minimise.
    directions
        Of the method.
    search
        Along a direction.
    limits, callback, batches
        When to stop; called after every iteration; how the samples change.
    start
        Where an earlier search ended; with `directions` that were restored this one continues as that would have.

    Raises
    ------
    RunFailed
        Where the loss is not finite at the start or anywhere along a direction, or the gradient contradicts the loss;
        the point is then the one where the direction begins.
    """
    limits = limits or Limits()
    prepare(space, ORIGIN, GRADIENT, OTHER_GRADIENT)
    counted = Evaluations(evaluate)
    gradient, other, iteration = GRADIENT, OTHER_GRADIENT, 0
    decrease = math.nan
    """Of the step just taken; not a number where there was none."""
    far = 0
    """Steps in succession that went as far as a search goes, and found no end."""
    if start is None:
        loss, square, largest = counted.start(space, POINT, gradient)
        directions.measure(gradient, square)
    else:
        gradient, loss, square, largest, decrease, iteration = start
        other = OTHER_GRADIENT if gradient == GRADIENT else GRADIENT
    begun, gain = Depth(abs(loss), largest), decrease

    def report(reason: Reason) -> Report:
        if reason in ("loss", "precision") and begun.bottomless(loss, largest):
            reason = "unbounded"
        return Report(reason, loss, largest, iteration, counted.count)

    while True:
        little = limits.little(decrease, loss) and not far
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
        line = scaled(space, line, loss, gain)

        def pairs(before: str = gradient, after: str = other) -> list[tuple[str, str]]:
            return directions.products(after, after, before)

        try:
            step = walk(space, counted, search, line, other, loss, pairs)
        except LineSearchFailed as failure:
            if directions.fresh and not begun.bottomless(loss, largest):
                explain(failure, prober(space, counted, line.direction, other))
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
        assert line.first is not None
        far = far + 1 if step.length >= FURTHEST * line.first and step.slope <= STEEP * line.slope else 0
        decrease, loss, square, largest = loss - step.loss, step.loss, step.gradient_square, step.largest
        gain = decrease if decrease > 0 else gain
        begun = begun if begun.loss else begun._replace(loss=-line.slope * line.first)
        directions.learn(step, gradient)
        told = Progress(iteration, counted.count, loss, largest, step.length, square, gradient, decrease)
        if callback is not None and callback(told):
            return report("callback")
        if far == 2:
            return report("unbounded")
