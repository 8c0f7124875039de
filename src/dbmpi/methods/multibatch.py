"""Multi-batch L-BFGS: another batch in every iteration, curvature from what two batches share.

Berahas, Nocedal, Takac: "A multi-batch L-BFGS method for machine learning", NIPS 2016.  With samples that change from
step to step, the difference of two gradients is mostly noise.  Consecutive batches share some samples, though, and
``y`` is the difference of the gradients over these alone, before and after the step.  Each of them is part of a
gradient that is needed anyway: an iteration costs one pass over a batch.  There is no line search, as no two losses
are of the same samples.
"""

from __future__ import annotations

import math
from typing import Protocol

from dbmpi.errors import RunFailed
from dbmpi.methods.descent import GRADIENT, ORIGIN, POINT, Callback, Limits, Progress, Reason, Report, Step, prepare
from dbmpi.methods.lbfgs import History
from dbmpi.methods.linesearch import SHRINK, SHRINKS
from dbmpi.methods.space import Space
from dbmpi.methods.walk import scaled

SHARED, NEXT, BEFORE = "shared gradient", "next shared gradient", "shared gradient before"
"""Gradients over what the batch shares with the last one and with the next one; the latter before the step."""


class SharingBatches(Protocol):
    """Batches of which every two in succession share some samples."""

    def evaluate_parts(self, point: str, gradient: str, shared: str, following: str) -> float:
        """Pass over the batch; return the mean loss.

        Leave the gradient of the whole batch, and those of the mean losses over what it shares with the batch before
        and with the next one.

        Parameters
        ----------
        point
            Name of the vector to evaluate at.
        gradient, shared, following
            Names of the vectors for the three gradients.
        """
        ...

    def proceed(self) -> bool:
        """Go on to the next batch."""
        ...


def multi_batch_lbfgs(
    space: Space,
    batches: SharingBatches,
    history: History,
    *,
    step_length: float = 1.0,
    limits: Limits | None = None,
    callback: Callback | None = None,
) -> Report:
    """Minimise the mean loss over all batches, from the point in the vector `POINT`, by steps of a fixed length.

    Parameters
    ----------
    space, batches
        Where the vectors are, and what to minimise.
    history
        Its caution keeps pairs away whose curvature is noise.
    step_length
        Multiple of the quasi-Newton step.  Shrunk where a loss is not finite.
    limits
        `gtol` and `ftol` do not apply: every batch has another gradient and another loss.
    callback
        Called after every iteration.

    Raises
    ------
    RunFailed
        Where losses stay infinite, however short the steps are.
    """
    limits = limits or Limits()
    prepare(space, ORIGIN, GRADIENT, SHARED, NEXT, BEFORE)
    iteration, evaluations = 0, 1
    loss = batches.evaluate_parts(POINT, GRADIENT, SHARED, NEXT)
    square, largest = space.dots([(GRADIENT, GRADIENT)], [GRADIENT]).tolist()
    if not (math.isfinite(loss) and math.isfinite(square)):
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient has elements that are {largest}"
        raise RunFailed(f"the {what} where the search for a minimum starts: start from other parameters")
    history.measure(GRADIENT, square)

    def report(reason: Reason) -> Report:
        return Report(reason, loss, largest, iteration, evaluations)

    while largest > 0:
        if iteration >= limits.iterations:
            return report("iterations")
        if evaluations >= limits.evaluations:
            return report("evaluations")
        line = history.choose(GRADIENT)
        if not line.slope < 0 and not history.fresh:
            history.forget()
            line = history.choose(GRADIENT)
        line = scaled(space, line, loss)
        assert line.first is not None
        length = step_length * line.first
        space.copy(NEXT, BEFORE)
        space.advance(POINT, ORIGIN, length, line.direction)
        batches.proceed()
        for _ in range(SHRINKS):
            loss, evaluations = batches.evaluate_parts(POINT, GRADIENT, SHARED, NEXT), evaluations + 1
            if math.isfinite(loss):
                break
            length *= SHRINK
            space.combine(POINT, [(1.0, ORIGIN), (length, line.direction)])
        else:
            space.copy(ORIGIN, POINT)
            raise RunFailed(
                f"the loss is not finite down to a step of {length:g}; the parameters are as they were before.  Lower "
                "sandblaster.step_length, or look for values out of range in the data"
            )
        own = [(GRADIENT, line.direction), (line.direction, line.direction), (GRADIENT, GRADIENT)]
        products = history.products(GRADIENT, SHARED, BEFORE)
        slope, direction_square, square, *others, largest = space.dots(own + products, [GRADIENT]).tolist()
        history.learn(Step(length, loss, slope, direction_square, square, largest, tuple(others)), GRADIENT)
        iteration += 1
        if callback is not None and callback(Progress(iteration, evaluations, loss, largest, length, square)):
            return report("callback")
    return report("gradient")
