"""A network that one process computes as a whole."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from dbmpi.network.description import Network
from dbmpi.replica.placement import automatic
from dbmpi.replica.replica import Replica

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from dbmpi.objective import Batch, Gradient, Outcome


class WholeNetwork(Network):
    """A network that one process computes: a replica of one partition.

    Implements :class:`dbmpi.objective.Objective`.  Constructed as :class:`dbmpi.network.description.Network` is.  One
    object must not be used by two threads at once.
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
    ) -> Outcome:
        """Return the outcome of the batch and write the gradient of its **mean** loss into `gradient`.

        Parameters
        ----------
        parameters : (layout.size,) array of `dtype`
        gradient : (layout.size,) array of `dtype`, or a function that returns the buffer for one layer's part
        batch : Batch
            Inputs ``(*input_shape, samples)``; targets int32 ``(samples,)`` or ``(outputs, samples)``.
        on_gradient : callable, optional
            Called with each layer's index, from the last to the first, as soon as its part of `gradient` is complete
            and its parameters are needed no more.
        step : int
            A number for masks that are drawn anew each step.
        add : bool
            Add to what is in `gradient`, instead of overwriting it.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.
        UserError
            If a class is not one of the outputs.
        """
        return self._replica.loss_and_gradient(parameters, batch, gradient, on_gradient, step=step, add=add)

    def evaluate(self, parameters: np.ndarray, batch: Batch) -> Outcome:
        """Return the outcome of `batch` with `parameters`; raises as `loss_and_gradient` does."""
        return self._replica.evaluate(parameters, batch)

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
