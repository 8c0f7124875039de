"""A network that one process computes as a whole."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from dbmpi.network.description import Network
from dbmpi.objective import Batch, Gradient, Objective, Outcome
from dbmpi.replica.placement import automatic
from dbmpi.replica.replica import Replica

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


class WholeNetwork(Network, Objective[Batch]):
    """A network that one process computes: a replica of one partition.

    Constructed as :class:`dbmpi.network.description.Network` is.  One object must not be used by two threads at once.
    """

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        batch: Batch,
        gradient: Gradient,
        on_gradient: Callable[[int], None] | None = None,
        *,
        step: int = 0,
        add: bool = False,
        changed: bool = True,
    ) -> Outcome:
        """Return the outcome of a batch and write the gradient of its mean loss; raises as `Replica` does."""
        return self._replica.loss_and_gradient(
            parameters, batch, gradient, on_gradient, step=step, add=add, changed=changed
        )

    def evaluate(self, parameters: np.ndarray, batch: Batch, *, changed: bool = True) -> Outcome:
        """Return the outcome of `batch` with `parameters`; raises as `loss_and_gradient` does."""
        return self._replica.evaluate(parameters, batch, changed=changed)

    def keep_rounded(self, parameters: np.ndarray, rounded: np.ndarray) -> None:
        """Multiply by `rounded`, the bfloat16 of `parameters`, kept up to date by others, where these are given."""
        self._replica.keep_rounded(parameters, rounded)

    def predict(self, parameters: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """Return the predictions (outputs, samples) by `parameters` for inputs ``(*input_shape, samples)``.

        They are probabilities for the losses ``softmax`` and ``logistic``; otherwise, the last layer's outputs.
        """
        predictions = self._replica.outputs(parameters, inputs)
        if self.loss is not None:
            self.loss.predict(predictions)
        return predictions

    @cached_property
    def _replica(self) -> Replica:
        return Replica(self, automatic(self.layers, 1))
