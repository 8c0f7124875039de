"""An objective of a user's own as the model of a run: named arrays for its code, a flat vector for the optimizers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dbmpi.errors import RunFailed, UserError
from dbmpi.index.layout import Layout, Stretch, Tensor
from dbmpi.kernels.memory import aligned_empty
from dbmpi.network.own import calling, learns
from dbmpi.objective import Gradient, NamedArrays, Objective, Outcome, OwnObjective, Samples
from dbmpi.replica.arrangement import Arrangement
from dbmpi.replica.own_arrays import EXAMPLE, flat, flat_floats, shown, single
from dbmpi.replica.own_gradients import DTYPE, OwnGradients
from dbmpi.replica.own_state import OwnState

_VECTORS = 2
_ROUNDING = 1e-3
"""Two computations of the same differ by less."""


class OwnModel:
    """What a run learns where that is no network: the names, shapes and first values of an objective's parameters.

    Parameters
    ----------
    objective
        The user's.
    seed
        Of the run, for the first values.
    called
        What the objective is called in messages.

    Raises
    ------
    UserError
        If it has no parameters that can be learned, or no ``loss_and_gradient``.

    Attributes
    ----------
    state
        What else its checkpoints hold.
    """

    layers = ()
    loss = None
    outputs = 0
    metrics: tuple[str, ...] | None = None
    """Names of what the objective's ``metrics`` returns; None before they are known."""
    classifies = False
    """Whether it says how many held-out samples are correct; known where the run has any."""
    draws = False
    """Whether its loss of the same samples differs from step to step, as with dropout; known where that matters."""

    def __init__(self, objective: OwnObjective, seed: int, called: str) -> None:
        self.objective, self.called = objective, called
        self._seed = seed
        if not learns(objective):
            raise UserError(
                f"{called}: is a {type(objective).__name__} without a method 'loss_and_gradient(parameters, batch)'; "
                "dbmpi.objective.OwnObjective says what an objective has"
            )
        arrays = self._first()
        self.shapes = {name: values.shape for name, values in arrays.items()}
        self.layout = Layout(tuple(Tensor(name, shape or (1,)) for name, shape in self.shapes.items()))
        self.state = OwnState(objective, called)

    def initial(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the first values at positions ``start ... start + len(out)``, however they are cut."""
        arrays = self._first()
        for tensor, first, last in self.layout.pieces(start, start + out.size):
            position = self.layout.offsets[tensor.name] + first - start
            out[position : position + last - first] = arrays[tensor.name].reshape(-1)[first:last]

    def digests(self) -> list[tuple[str, int]]:
        """Return the name of each array and a number that follows from its first values."""
        arrays = self._first().items()
        return [(name, zlib.crc32(np.ascontiguousarray(single(values)).data)) for name, values in arrays]

    def named(self, vector: np.ndarray) -> NamedArrays:
        """Return the arrays that a flat `vector` (size,) holds, as the user nests them: views that are read only."""
        fixed = vector.view()
        fixed.flags.writeable = False
        named: NamedArrays = {}
        for name, view in self.layout.views(fixed).items():
            *folders, last = name.split("/")
            inside: Any = named
            for folder in folders:
                inside = inside.setdefault(folder, {})
            inside[last] = view.reshape(self.shapes[name])
        return named

    def _first(self) -> dict[str, np.ndarray]:
        """Return the first values by name."""
        with calling("the objective", "its first values are asked for"):
            initial = getattr(self.objective, "initial", None)
            given = getattr(self.objective, "parameters", None) if initial is None else initial(self._seed)
        found = dict(flat_floats(given, f"{self.called}: its parameters"))
        if not found:
            raise UserError(f"{self.called}: has no parameters; {EXAMPLE}, as 'parameters' or from 'initial(seed)'")
        for name, values in found.items():
            if not np.isfinite(single(values)).all():
                raise UserError(f"{self.called}: the first values of {name!r} are not all finite")
        return found


@dataclass(frozen=True)
class WholeParameters:
    """All parameters in one process; the interface of :class:`dbmpi.replica.parameters.LocalParameters`."""

    layout: Layout

    @property
    def size(self) -> int:
        """Elements of the vector."""
        return self.layout.size

    @property
    def runs(self) -> tuple[Stretch, ...]:
        """Where the worker's elements lie in the whole vector."""
        return (Stretch(0, 0, self.size, True),)

    @cached_property
    def parts(self) -> tuple[range, ...]:
        """The range of each array."""
        return tuple(
            range(start, start + tensor.size)
            for tensor, start in zip(self.layout.tensors, self.layout.offsets.values(), strict=True)
        )

    def runs_in(self, arrangement: Arrangement) -> tuple[Stretch, ...]:
        """Return :attr:`runs`, as the shards of this `arrangement` keep the order of the layout."""
        assert not arrangement.parts
        return self.runs


class OwnReplica(Objective[Samples]):
    """An instance of a user's objective, computed by one worker.

    Parameters
    ----------
    model
        The objective with the layout of its parameters.
    tries
        Whether points are tried that may be far from where the loss makes sense: a gradient that is not finite is then
        an answer, as it is of a network, and no mistake.
    """

    def __init__(self, model: OwnModel, *, tries: bool = False) -> None:
        self._model, self._tries = model, tries
        self.parameters = WholeParameters(model.layout)
        self.seconds: dict[str, list[float]] = {}
        self._gradients = OwnGradients(model.layout, model.shapes, model.called, checks=not tries)
        self._write_gradient = getattr(model.objective, "write_gradient", None)
        self._views: dict[int, tuple[np.ndarray, NamedArrays]] = {}
        """The vectors that gradients were computed at, and the arrays in them."""
        self._unused = np.empty(0, DTYPE)

    @property
    def size(self) -> int:
        """Elements of the parameter vector."""
        return self.parameters.size

    def serve_while_waiting(self, serve: Callable[[], bool] | None) -> None:
        """Do nothing, whatever `serve` is: there is nothing to wait for."""

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        batch: Samples,
        gradient: Gradient,
        on_gradient: Callable[[int], None] | None = None,
        *,
        step: int = 0,
        add: bool = False,
        changed: bool = True,
    ) -> Outcome:
        """Return the outcome of a batch and write the gradient of its mean loss (see `Objective`).

        Parameters
        ----------
        parameters, batch, gradient, on_gradient, step, add, changed
            As for any objective; each array is a layer.

        Raises
        ------
        UserError
            If the user's code gives something else than a loss and an array for each parameter, in its shape.
        RunFailed
            If the gradient is not finite where the loss is, except where points are tried.
        """
        return self._learned(self._named(parameters), batch._replace(step=step), gradient, on_gradient, add=add)

    def _learned(
        self,
        named: NamedArrays,
        samples: Samples,
        gradient: Gradient,
        on_gradient: Callable[[int], None] | None = None,
        *,
        add: bool = False,
    ) -> Outcome:
        gradients = self._gradients
        gradients.begin(gradient, on_gradient, add=add)
        if self._write_gradient is not None:
            outcome = self._outcome(self._write_gradient(named, samples, gradients), samples.samples, "write_gradient")
        else:
            found = self._model.objective.loss_and_gradient(named, samples)
            if not isinstance(found, tuple) or len(found) != 2:
                raise UserError(
                    f"{self._model.called}: loss_and_gradient returned {shown(found)}; expected two things, the mean "
                    "loss of the batch and a dictionary of gradients"
                )
            outcome = self._outcome(found[0], samples.samples, "loss_and_gradient")
            arrays = self._arrays(found[1])
            for name in reversed(self._model.shapes):
                gradients.ready(name, arrays[name])
        gradients.finish(expect_finite=math.isfinite(outcome.loss) and not self._tries)
        return outcome

    def evaluate(self, parameters: np.ndarray, batch: Samples, *, changed: bool = True) -> Outcome:
        """Return the outcome of `batch` with `parameters`, by the user's ``evaluate`` if there is one."""
        evaluate = getattr(self._model.objective, "evaluate", None)
        if evaluate is None:
            with self._model.state.unchanged():
                outcome = self.learned(parameters, batch)
        else:
            outcome = self._outcome(evaluate(self._model.named(parameters), batch), batch.samples, "evaluate")
        metrics = getattr(self._model.objective, "metrics", None)
        if metrics is None:
            return outcome
        return outcome._replace(sums=self._sums(metrics(self._model.named(parameters), batch), batch.samples))

    def learned(self, parameters: np.ndarray, batch: Samples) -> Outcome:
        """Return the outcome of `batch` with `parameters` that is learned from, without its gradient."""
        if self._write_gradient is not None:
            if self._unused.size != self.size:
                self._unused = aligned_empty(self.size, DTYPE)
            # The vector may be gone after this call, so that its views must not be kept.
            return self._learned(self._model.named(parameters), batch._replace(step=0), self._unused)
        found = self._model.objective.loss_and_gradient(self._model.named(parameters), batch)
        return self._outcome(found[0], batch.samples, "loss_and_gradient")

    def free(self) -> None:
        """Tell the user's code that the memory of parameters goes, while it is still there."""
        self._views.clear()
        close = getattr(self._model.objective, "close", None)
        if close is not None:
            close()

    def outputs(self, parameters: np.ndarray, inputs: Any, *, changed: bool = True) -> np.ndarray:
        """Return what the user's ``predict`` says of some samples; (outputs, samples).

        Parameters
        ----------
        parameters
            Flat vector.
        inputs : (samples, ...) array, or a dictionary of them
            The samples.
        changed
            As for `loss_and_gradient`.

        Raises
        ------
        UserError
            If the objective has no ``predict``, or that returns something else than an array with a row a sample.
        """
        model, samples = self._model, len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
        predict = getattr(model.objective, "predict", None)
        if predict is None:
            raise UserError(
                f"{model.called}: has no method 'predict(parameters, inputs)' that returns an array with a row for "
                "each sample"
            )
        found = np.asarray(predict(model.named(parameters), inputs))
        if found.dtype.kind not in "fiub" or found.shape[:1] != (samples,):
            raise UserError(
                f"{model.called}: predict returned {shown(found)} for {samples} samples; expected an array of numbers "
                "with a row for each"
            )
        return found.reshape(samples, -1).T

    def _outcome(self, given: Any, samples: int, method: str) -> Outcome:
        """Return the outcome from a mean loss, or a mean loss and the number of correct samples."""
        loss, correct = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        try:
            if correct is not None and not (0 <= correct <= samples and correct == int(correct)):
                raise ValueError(correct)
            return Outcome(samples, float(loss) * samples, -1 if correct is None else int(correct))
        except (TypeError, ValueError):
            raise UserError(
                f"{self._model.called}: {method} returned {shown(given)} for the loss; expected a number, the mean "
                f"over the batch, or that and how many of its {samples} samples are correct (not the fraction)"
            ) from None

    def _sums(self, given: Any, samples: int) -> tuple[tuple[str, float], ...]:
        """Return the sums over the samples from means by name, which are the same names at every call."""
        model = self._model
        try:
            found = {name: float(mean) for name, mean in flat(given, "")}
        except (TypeError, ValueError):
            found = {}
        if not found:
            raise UserError(
                f"{model.called}: metrics returned {shown(given)}; expected a dictionary of numbers by name, the "
                "means over the batch"
            )
        names = tuple(found) if model.metrics is None else model.metrics
        if {*names} != {*found}:
            raise UserError(
                f"{model.called}: metrics returned {[*found]}, and {[*names]} before; expected the same names at every "
                "call"
            )
        model.metrics = names
        return tuple((name, samples * found[name]) for name in names)

    def _arrays(self, given: Any) -> dict[str, np.ndarray]:
        """Return the gradients by name, one for each of the parameters."""
        called, shapes = self._model.called, self._model.shapes
        found = dict(flat_floats(given, f"{called}: its gradient"))
        if wrong := sorted(found.keys() ^ shapes.keys()):
            which = "no parameter is called so" if wrong[0] in found else "there is none"
            raise UserError(f"{called}: the gradient of {wrong[0]!r}: {which}; expected one for each of {[*shapes]}")
        return found

    def _named(self, parameters: np.ndarray) -> NamedArrays:
        """Return the arrays in a vector, which are made once for each of the two that fetches alternate between."""
        known = self._views.get(id(parameters))
        if known is None:
            if len(self._views) == _VECTORS:
                self._views.clear()
            known = self._views[id(parameters)] = parameters, self._model.named(parameters)
        return known[1]


def try_objective(
    model: OwnModel, batch: Samples, held_out: Samples | None = None, again: Samples | None = None
) -> bool:
    """Compute one gradient of a `model`, so that mistakes show before anything is learned.

    It raises as `OwnReplica` does.

    Parameters
    ----------
    model
        Whose metrics are known afterwards.
    batch
        Some samples.
    held_out
        Some that are not learned from, if there are any.
    again
        The samples of `batch` in other arrays, for another step: whether losses are drawn at random is then known, too.

    Returns
    -------
    bool
        Whether learning changes the model's state, which is then as before.
    """
    parameters, gradient = aligned_empty(model.layout.size), aligned_empty(model.layout.size)
    model.initial(0, parameters)
    replica, before = OwnReplica(model), model.state.pack()
    try:
        with calling("the objective", "it is tried on the first batch"), model.state.unchanged():
            outcome = replica.loss_and_gradient(parameters, batch, gradient)
            changed = not np.array_equal(before, model.state.pack())
            if again is not None and not changed:
                other = np.empty_like(gradient)
                loss = replica.loss_and_gradient(parameters, again, other, step=1).loss
                # Where the loss does not follow from what is dropped at the first values, the gradient does.
                apart = float(np.abs(other - gradient).max()) > _ROUNDING * float(np.abs(gradient).max())
                model.draws = apart or not math.isclose(loss, outcome.loss, rel_tol=_ROUNDING)
    except RunFailed as error:
        raise UserError(str(error)) from error
    model.classifies = outcome.correct >= 0
    if held_out is not None and (hasattr(model.objective, "metrics") or hasattr(model.objective, "evaluate")):
        with calling("the objective", "it is tried on the first held-out samples"):
            model.classifies = OwnReplica(model).evaluate(parameters, held_out).correct >= 0
    if not outcome.are_numbers:
        raise UserError(f"{model.called}: the loss of the first batch is {outcome.mean_loss}, at the first values")
    return changed
