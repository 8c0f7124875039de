"""What an optimizer sees: parameters and a batch in, a loss and a gradient out.

A network is one implementation (:mod:`dbmpi.network`); a user's own function is another.  The optimizers
know nothing else, so that they work for both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


class Batch(NamedTuple):
    """Samples to learn from, **batch innermost**: the sample is the last axis of `inputs`."""

    inputs: np.ndarray
    """float32 of shape ``(*features, samples)``, C-contiguous."""
    targets: np.ndarray
    """int32 ``(samples,)`` for classes, or float32 ``(outputs, samples)`` for values."""
    weights: np.ndarray | None = None
    """float32 ``(samples,)``: by which the loss of each sample is multiplied; None: all count alike.  The mean over all
    samples of the data is to be 1, so that the mean loss of many batches is the weighted mean."""

    @property
    def samples(self) -> int:
        """Number of samples in the batch."""
        return int(self.inputs.shape[-1])


class Outcome(NamedTuple):
    """Sums over the samples of one or several batches; `plus` adds two outcomes."""

    samples: int
    """Number of samples."""
    loss: float
    """Sum of the losses of the samples, each times its weight, in float64."""
    correct: int
    """Number of samples whose largest output is that of their class; -1 if the targets are not classes."""

    def plus(self, other: Outcome) -> Outcome:
        """Return the outcome of both sets of samples together."""
        correct = -1 if min(self.correct, other.correct) < 0 else self.correct + other.correct
        return Outcome(self.samples + other.samples, self.loss + other.loss, correct)

    @property
    def mean_loss(self) -> float:
        """Loss per sample."""
        return self.loss / max(self.samples, 1)

    @property
    def are_numbers(self) -> bool:
        """Whether all outputs were numbers: with NaN among them, or an infinite largest one, the loss is not finite."""
        return math.isfinite(self.loss)

    @property
    def accuracy(self) -> float | None:
        """Fraction of the samples classified correctly, or None where the targets are no classes."""
        return None if self.correct < 0 else self.correct / max(self.samples, 1)


Gradient: TypeAlias = "np.ndarray | Callable[[int], np.ndarray]"
"""Where a gradient goes: a flat vector, or what gives room for the part of a layer, asked with the layer's number
just before this is computed; not before the layer above is complete."""


class Objective(Protocol):
    """A differentiable function of a flat parameter vector and a batch."""

    @property
    def size(self) -> int:
        """Elements of the parameter vector that this process computes with."""
        ...

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        batch: Batch,
        gradient: Gradient,
        on_gradient: Callable[[int], None] | None = None,
        *,
        step: int = 0,
        add: bool = False,
    ) -> Outcome:
        """Return the outcome of the batch and write the gradient of its **mean** loss into `gradient`.

        With `add` it is added to what is there.

        `on_gradient` is called with each layer's number as soon as its part of `gradient` is complete.
        `step` differs from step to step and from replica to replica, for what is drawn anew each time.
        """
        ...

    def evaluate(self, parameters: np.ndarray, batch: Batch) -> Outcome:
        """Return the outcome of the batch; dropout and the like are off."""
        ...
