"""The batch method that is chosen by name, with its line search and its terms beside the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dbmpi.methods import linesearch
from dbmpi.methods.descent import Batches, Callback, Evaluate, Limits, Report, Start
from dbmpi.methods.gradients import conjugate_gradients, exact_search, gradient_descent, with_l2
from dbmpi.methods.lbfgs import History, lbfgs
from dbmpi.methods.owlqn import owlqn
from dbmpi.methods.space import Space

if TYPE_CHECKING:
    from dbmpi.methods.own import Method


@dataclass(frozen=True)
class Choice:
    """What a user chooses of a method."""

    method: str | Method
    """``lbfgs``, ``conjugate_gradients``, ``gradient_descent``, or a checked function of the user's own."""
    line_search: str = "strong_wolfe"
    """One of :func:`dbmpi.methods.linesearch.named`."""
    step_length: float = 1.0
    """With a fixed line search."""
    l1: float = 0.0
    """Factor of the sum of magnitudes, added to the loss: L-BFGS only."""
    l2: float = 0.0
    """Half of this times the sum of squares is added to the loss."""


def minimise(
    space: Space,
    evaluate: Evaluate,
    choice: Choice,
    *,
    limits: Limits,
    callback: Callback,
    batches: Batches | None = None,
    history: History | None = None,
    start: Start | None = None,
) -> Report:
    """Minimise from the vector "parameters" by the method that was chosen.

    Parameters
    ----------
    space, evaluate
        Where the vectors are, and the loss without the terms of `choice`.
    choice
        Of the method.
    limits, callback
        When to stop; called after every iteration.
    batches
        How the samples change; None where they never do.
    history
        For L-BFGS, which needs one.
    start
        Where L-BFGS resumes.

    Returns
    -------
    Report
        How it ended.
    """
    if choice.l2:
        evaluate = with_l2(space, evaluate, choice.l2)
    if callable(choice.method):
        return choice.method(space, evaluate, limits=limits, callback=callback)
    search = linesearch.named(choice.line_search, choice.step_length)
    if choice.method == "lbfgs":
        assert history is not None
        if choice.l1:
            return owlqn(space, evaluate, strength=choice.l1, limits=limits, callback=callback, history=history)
        method: Callable[..., Report] = partial(lbfgs, history=history, start=start)
    elif choice.method == "gradient_descent":
        method = gradient_descent
    else:
        method = conjugate_gradients
        search = exact_search if choice.line_search == "strong_wolfe" else search
    return method(space, evaluate, search=search, limits=limits, callback=callback, batches=batches)
