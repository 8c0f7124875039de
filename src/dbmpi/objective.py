"""What an optimizer sees: parameters and a batch in, a loss and a gradient out.

Training takes an :class:`Objective`, of which a network is one implementation (:class:`dbmpi.replica.replica.Replica`),
and :class:`OwnObjective`, a user's code that knows named arrays, is made into another one
(:mod:`dbmpi.replica.own_objective`).  The workers of both optimizers ask for nothing else.  Outside training,
:func:`dbmpi.minimize` takes a :data:`Function`, which has its data in it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

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
    """float32 ``(samples,)``: factors of the samples' losses; None: all count alike.  Their mean over the whole data
    must be 1, so that the mean loss of many batches is the weighted mean."""

    @property
    def samples(self) -> int:
        """Number of samples in the batch."""
        return int(self.inputs.shape[-1])


class Samples(NamedTuple):
    """A batch as an objective of a user's own gets it: **samples first**, and C-contiguous."""

    inputs: Any
    """``(samples, ...)``, float32, or integers of the type that the data have; of several inputs, a dictionary of such
    arrays by name."""
    targets: np.ndarray
    """int32 ``(samples,)`` for classes, or ``(samples, ...)`` for values: float32, or integers of their own type."""
    weights: np.ndarray | None = None
    """float32 ``(samples,)``: factors of the samples' losses, if the run has any."""
    step: int = 0
    """Differs from step to step and from replica to replica, for random numbers."""

    @property
    def samples(self) -> int:
        """Number of samples in the batch."""
        return len(self.targets)


class Outcome(NamedTuple):
    """Sums over the samples of one or several batches; `plus` adds two outcomes."""

    samples: int
    """Number of samples."""
    loss: float
    """Sum of the losses of the samples, each times its weight, in float64."""
    correct: int
    """Number of samples whose largest output is that of their class; -1 if the targets are not classes."""
    sums: tuple[tuple[str, float], ...] = ()
    """Name of each metric of an objective, with the sum over the samples, for held-out samples."""

    def plus(self, other: Outcome) -> Outcome:
        """Return the outcome of the samples of this one and of `other` together."""
        correct = -1 if min(self.correct, other.correct) < 0 else self.correct + other.correct
        sums = self.sums or other.sums
        if self.sums and other.sums:
            both = zip(self.sums, other.sums, strict=True)
            sums = tuple((name, total + more) for (name, total), (_, more) in both)
        return Outcome(self.samples + other.samples, self.loss + other.loss, correct, sums)

    @property
    def mean_loss(self) -> float:
        """Loss per sample."""
        return self.loss / max(self.samples, 1)

    @property
    def are_numbers(self) -> bool:
        """Whether all outputs were numbers: with NaN among them, or an infinite largest one, the loss is not finite."""
        return math.isfinite(self.loss)

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each metric over the samples; empty where the objective has none."""
        return {name: total / max(self.samples, 1) for name, total in self.sums}

    @property
    def accuracy(self) -> float | None:
        """Fraction of the samples classified correctly, or None where the targets are no classes."""
        return None if self.correct < 0 else self.correct / max(self.samples, 1)


Gradient: TypeAlias = "np.ndarray | Callable[[int], np.ndarray]"
"""Where to write a gradient: a flat vector, or a function that returns the buffer for one layer, called with the
layer's index just before that layer's backward pass, and after the one above is complete."""


Function: TypeAlias = "Callable[[np.ndarray], tuple[float, np.ndarray]]"
"""``function(x)`` returns a loss at x, e.g. one rank's term of it, and its gradient, an array of the shape of x."""


NamedArrays: TypeAlias = "dict[str, Any]"
"""Arrays by name; a dictionary of them may take the place of an array, within one another."""


class OwnObjective(Protocol):
    """What a user's own objective has: named parameters, and the loss of a batch with its gradient.

    The first values of the parameters are an attribute ``parameters``, or what a method ``initial(seed)`` returns:
    float arrays by name, dictionaries of which may be within one another.  They are learned as float32.

    These are optional:

    - ``write_gradient(parameters, batch, gradients)`` may take the place of `loss_and_gradient`.  It hands over each
      array as soon as that is complete, so that it can leave while the others are computed, and returns the loss alone:
      see :class:`Gradients`.
    - ``evaluate(parameters, batch)`` returns the mean loss of held-out samples, or that and how many of them are
      classified correctly; without it, their loss is the one that is learned from.
    - ``metrics(parameters, batch)`` returns further means over held-out samples, a dictionary of numbers by name.
    - ``predict(parameters, inputs)`` returns an array with a row for each sample, for ``dbmpi predict``.
    - ``state`` is a dictionary of NumPy arrays of numbers, which may be nested: what learning changes, but not by
      gradient.  Checkpoints hold that of replica 0, and all replicas use it when they resume and evaluate.
    - ``close()`` is called at the end of a run, of ``dbmpi.evaluate`` and of ``dbmpi.predict``, after which views of
      the parameters may be of memory that is gone.

    Examples
    --------
    >>> import numpy
    >>> class LeastSquares:
    ...     parameters = {"weights": numpy.zeros(3), "bias": numpy.zeros(())}
    ...
    ...     def loss_and_gradient(self, parameters, batch):
    ...         errors = batch.inputs @ parameters["weights"] + parameters["bias"] - batch.targets[:, 0]
    ...         gradient = {"weights": errors @ batch.inputs / len(errors), "bias": errors.mean()}
    ...         return (errors**2).mean() / 2, gradient
    """

    def loss_and_gradient(self, parameters: NamedArrays, batch: Samples) -> tuple[Any, NamedArrays]:
        """Return the mean loss of a batch, and the gradient of that by the names of the parameters.

        Parameters
        ----------
        parameters
            Arrays by name, nested as the first values were; read only.
        batch
            The samples.

        Returns
        -------
        float or (float, int)
            The mean loss; or that and the number of samples that are classified correctly.
        dict
            An array for each parameter, in its shape.
        """
        ...


class Gradients(Protocol):
    """Takes the gradients of a batch one by one, for ``write_gradient`` of an objective of a user's own.

    Arrays may come in any order; from the last parameter to the first, each leaves at once.

    Examples
    --------
    >>> import numpy
    >>> class LeastSquares:
    ...     parameters = {"weights": numpy.zeros(3), "bias": numpy.zeros(())}
    ...
    ...     def write_gradient(self, parameters, batch, gradients):
    ...         errors = batch.inputs @ parameters["weights"] + parameters["bias"] - batch.targets[:, 0]
    ...         errors /= len(errors)
    ...         gradients.ready("bias", errors.sum())
    ...         gradients.ready("weights", numpy.matmul(errors, batch.inputs, out=gradients.out("weights")))
    ...         return (errors**2).sum() * len(errors) / 2
    """

    def out(self, name: str) -> np.ndarray:
        """Return memory to compute the gradient of the parameter `name` in, for :meth:`ready`.

        It is float32 in the parameter's shape, and in most settings that which the gradient is pushed from, so that
        nothing is copied.  Its content is undefined.  Names of parameters that are nested are ``outer/inner``.
        """
        ...

    def ready(self, name: str, values: Any) -> None:
        """Hand over the complete gradient of the parameter `name`, once for each.

        It is copied, or added to those of earlier steps, in one pass: at the latest when ``write_gradient`` returns,
        and until then `values`, a float array in the parameter's shape, must stay as they are.
        """
        ...


Taken_contra = TypeVar("Taken_contra", contravariant=True)
"""Kind of batch that an objective takes: `Batch`, or `Samples` if it is a user's own."""


class Objective(Protocol[Taken_contra]):
    """A differentiable function of a flat parameter vector and a batch.

    Its parameters may belong to layers, which lie one behind the other in the vector; one without layers has a single
    one, number 0.  Where several processes compute it together, each has its own part of the parameters and of the
    gradient, and all call the same methods with the same batch.
    """

    @property
    def size(self) -> int:
        """Elements of the parameter vector that this process computes with."""
        ...

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        batch: Taken_contra,
        gradient: Gradient,
        on_gradient: Callable[[int], None] | None = None,
        *,
        step: int = 0,
        add: bool = False,
        changed: bool = True,
    ) -> Outcome:
        """Return the outcome of a batch and write the gradient of its **mean** loss.

        Where several processes compute it, the outcome is that of the whole batch, and the gradient this process's.

        Parameters
        ----------
        parameters : (size,) array
            Read only.
        batch
            The samples.
        gradient : (size,) array or callable
            Where to write the gradient, in the dtype of `parameters`: see `Gradient`.
        on_gradient
            To be called with each layer's number, from the last to the first, as soon as its part of the gradient is
            complete and its parameters are needed no more: both may change from then on.
        step
            Differs from step to step and from replica to replica, for random numbers such as dropout masks.
        add
            Add to `gradient` instead of overwriting it.
        changed
            Whether the values of `parameters` may have changed since the last call with this array.  If not, what was
            derived from them may be used again.
        """
        ...

    def evaluate(self, parameters: np.ndarray, batch: Taken_contra, *, changed: bool = True) -> Outcome:
        """Return the outcome of `batch` with `parameters`, `changed` or not; dropout and the like are off."""
        ...
