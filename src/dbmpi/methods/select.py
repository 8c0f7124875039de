"""The batch method that a configuration describes, run on the batches of Sandblaster."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from dbmpi.methods import linesearch
from dbmpi.methods.descent import Batches, Callback, Evaluate, Limits, Report, Start
from dbmpi.methods.gradients import conjugate_gradients, exact_search, gradient_descent, owlqn, with_l2
from dbmpi.methods.lbfgs import History, lbfgs
from dbmpi.methods.multibatch import SharingBatches, multi_batch_lbfgs
from dbmpi.methods.space import Space

if TYPE_CHECKING:
    from dbmpi.config.sections import SandblasterSection
    from dbmpi.methods.own import Method


class Problem(Batches, SharingBatches, Protocol):
    """What is minimised: vectors, passes over batches, and batches that change."""

    @property
    def space(self) -> Space:
        """The vectors on the shards."""
        ...

    def evaluate(self, point: str, gradient: str) -> float:
        """Pass over the batch; see :data:`dbmpi.methods.descent.Evaluate`."""
        ...


def minimise(
    problem: Problem,
    settings: SandblasterSection,
    *,
    whole: bool,
    own: Method | None,
    callback: Callback,
    history: History | None,
    start: Start | None,
) -> Report:
    """Minimise from the vector "parameters" by the method that the settings name.

    Parameters
    ----------
    whole
        Whether every batch is all samples, so that batches never change.
    own
        The user's own method, if it is his.
    history
        That of L-BFGS, for this method.
    start
        Where L-BFGS goes on.
    """
    space = problem.space
    evaluate: Evaluate = problem.evaluate
    if settings.l2:
        evaluate = with_l2(space, evaluate, settings.l2)
    limits = Limits(settings.gtol, settings.ftol)
    batches = None if whole else problem
    search = linesearch.named(settings.line_search, settings.step_length)
    if history is None:
        method = own
        if settings.algorithm == "gradient_descent":
            method = partial(gradient_descent, search=search, batches=batches)
        elif settings.algorithm == "conjugate_gradients":
            exact = exact_search if settings.line_search == "strong_wolfe" else search
            method = partial(conjugate_gradients, search=exact, batches=batches)
        assert method is not None
        return method(space, evaluate, limits=limits, callback=callback)
    if settings.l1:
        return owlqn(space, evaluate, strength=settings.l1, limits=limits, callback=callback, history=history)
    if settings.batch_overlap:
        length = settings.step_length
        return multi_batch_lbfgs(space, problem, history, step_length=length, limits=limits, callback=callback)
    return lbfgs(
        space,
        evaluate,
        search=search,
        limits=limits,
        callback=callback,
        batches=batches,
        history=history,
        start=start,
    )
