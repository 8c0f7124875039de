"""Gradient descent with steps of one size, as a batch method of one's own: it never ends, and no sum surprises it.

A line search would: the smaller the loss, the more its decisions depend on the last bits, which another processor or
another order of the same sums has differently.
"""

from __future__ import annotations

from dbmpi.methods.descent import ORIGIN, POINT, Callback, Evaluate, Limits, Progress, Report, prepare
from dbmpi.methods.space import Space

STEP = 0.1


def descend(space: Space, evaluate: Evaluate, *, limits: Limits, callback: Callback) -> Report:
    """Minimise until the callback has seen enough, whatever the limits."""
    prepare(space, ORIGIN, "gradient")
    evaluate(POINT, "gradient")
    iteration = 0
    while True:
        iteration += 1
        space.advance(POINT, ORIGIN, -STEP, "gradient")
        loss = evaluate(POINT, "gradient")
        largest = float(space.norms(["gradient"])[0])
        if callback(Progress(iteration, iteration + 1, loss, largest, STEP)):
            return Report("callback", loss, largest, iteration, iteration + 1)
