"""Whether the loss of a run makes sense: not worse than guessing, and not beyond all reason."""

from __future__ import annotations

import math
from collections import deque

from dbmpi.objective import Outcome

_NO_BETTER = 0.99
"""A loss above this share of that of guessing counts as no better."""
_ABSURD = 100.0
"""Multiple of the loss of guessing above which no network that learns remains."""
_BEYOND_REASON = 1e6
"""The same however short the run was."""
_PARTS = 10


class Recent:
    """The mean loss of the training samples of about the last epoch.

    Parameters
    ----------
    samples
        Of an epoch.
    """

    def __init__(self, samples: int) -> None:
        self._part_samples = max(1, samples // _PARTS)
        self._parts: deque[Outcome] = deque(maxlen=_PARTS)

    def add(self, outcome: Outcome) -> None:
        """Count samples that were learned from.

        Parameters
        ----------
        outcome
            Their loss.
        """
        if self._parts and self._parts[-1].samples < self._part_samples:
            outcome = self._parts.pop().plus(outcome)
        if outcome.samples:
            self._parts.append(outcome)

    @property
    def mean_loss(self) -> float:
        """NaN where nothing was learned."""
        samples = sum(part.samples for part in self._parts)
        return sum(part.loss for part in self._parts) / samples if samples else math.nan

    @property
    def accuracy(self) -> float | None:
        """Fraction classified correctly; None where nothing was learned, or the targets are no classes."""
        if not self._parts or any(part.correct < 0 for part in self._parts):
            return None
        return sum(part.correct for part in self._parts) / sum(part.samples for part in self._parts)


def warning(guessing: float, loss: float, test: Outcome | None, *, enough: bool, remedy: str) -> str:
    """Return a warning about the losses at the end of a run; empty where they make sense.

    Parameters
    ----------
    guessing
        Mean loss of the best answer that is always the same; NaN where it is not known.
    loss
        Mean loss of training samples at the end of the run; NaN where it is not known.
    test
        Outcome on held-out samples.
    enough
        Whether the run was long enough to learn something; otherwise it may just have begun.
    remedy
        What may help with the optimizer, e.g. ``"another optimizer.learning_rate"``.
    """
    if not guessing > 1e-12:
        return ""
    same = f"that of always giving the same answer ({guessing:.4g})"
    look = f"try {remedy}, and inputs and targets of a size of about 1"
    if loss > _BEYOND_REASON * guessing or (enough and loss > _ABSURD * guessing):
        return (
            f"the loss at the end, {loss:.4g}, is far above {same}: nothing useful was learned; look for extreme "
            f"values in the data, e.g. marks of missing ones, and {look}"
        )
    if test is not None and test.samples and test.mean_loss > _ABSURD * max(guessing, loss):
        return (
            f"the test loss, {test.mean_loss:.4g}, is far above {same} and above the training loss ({loss:.4g}): are "
            f"the test data scaled and ordered as the training data are?"
        )
    if enough and loss > _NO_BETTER * guessing:
        return (
            f"the loss at the end, {loss:.4g}, is no better than {same}: {look}; and look whether inputs and targets "
            f"belong together, sample by sample"
        )
    return ""
