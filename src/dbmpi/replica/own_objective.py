"""An objective of a user's own as the model of a run: named arrays for its code, a flat vector for the optimizers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dbmpi.errors import RunFailed, UserError
from dbmpi.index.layout import Layout, Stretch, Tensor
from dbmpi.kernels.memory import aligned_empty
from dbmpi.network.own import calling
from dbmpi.objective import Gradient, NamedArrays, Objective, Outcome, OwnObjective, Samples
from dbmpi.replica.arrangement import Arrangement

DTYPE = np.dtype(np.float32)
_KEY = re.compile(r"[A-Za-z0-9_][\w.\-]*")
_EXAMPLE = "expected a dictionary of float arrays, e.g. {'weights': numpy.zeros((3, 2))}, also within one another"


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
    """

    layers = ()
    loss = None
    outputs = 0
    metrics: tuple[str, ...] | None = None
    """Names of what the objective's ``metrics`` returns; None before they are known."""

    def __init__(self, objective: OwnObjective, seed: int, called: str) -> None:
        self.objective, self.called = objective, called
        self._seed = seed
        if not callable(getattr(objective, "loss_and_gradient", None)):
            raise UserError(
                f"{called}: is a {type(objective).__name__} without a method 'loss_and_gradient(parameters, batch)'; "
                "dbmpi.objective.OwnObjective says what an objective has"
            )
        arrays = self._first()
        self.shapes = {name: values.shape for name, values in arrays.items()}
        self.layout = Layout(tuple(Tensor(name, shape or (1,)) for name, shape in self.shapes.items()))

    def initial(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the first values at positions ``start ... start + len(out)``, however they are cut."""
        arrays = self._first()
        for tensor, first, last in self.layout.pieces(start, start + out.size):
            position = self.layout.offsets[tensor.name] + first - start
            out[position : position + last - first] = arrays[tensor.name].reshape(-1)[first:last]

    def named(self, vector: np.ndarray) -> NamedArrays:
        """Return the arrays that a flat `vector` (size,) holds, as the user nests them: views that are read only."""
        shown = vector.view()
        shown.flags.writeable = False
        named: NamedArrays = {}
        for name, view in self.layout.views(shown).items():
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
        found = dict(_flat(given, f"{self.called}: its parameters"))
        if not found:
            raise UserError(f"{self.called}: has no parameters; {_EXAMPLE}, as 'parameters' or from 'initial(seed)'")
        for name, values in found.items():
            if not np.isfinite(_single(values)).all():
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
    ) -> Outcome:
        """Return the outcome of a batch and write the gradient of its mean loss (see `Objective`).

        Parameters
        ----------
        parameters, batch, gradient, on_gradient, step, add
            As for any objective; each array is a layer.

        Raises
        ------
        UserError
            If the user's code returns something else than a loss and an array for each parameter, in its shape.
        RunFailed
            If the gradient is not finite where the loss is, except where points are tried.
        """
        model = self._model
        found = model.objective.loss_and_gradient(model.named(parameters), batch._replace(step=step))
        if not isinstance(found, tuple) or len(found) != 2:
            raise UserError(
                f"{model.called}: loss_and_gradient returned {_shown(found)}; expected two things, the mean loss of "
                "the batch and a dictionary of gradients"
            )
        outcome = self._outcome(found[0], batch.samples, "loss_and_gradient")
        arrays = self._gradients(found[1], math.isfinite(outcome.loss) and not self._tries)
        for number in reversed(range(len(self.parameters.parts))):
            part, tensor = self.parameters.parts[number], model.layout.tensors[number]
            out = gradient(number) if callable(gradient) else gradient[part.start : part.stop]
            values = arrays[tensor.name].reshape(tensor.shape)
            target = out.reshape(tensor.shape)
            with np.errstate(over="ignore"):
                np.add(target, values, out=target, casting="same_kind") if add else np.copyto(target, values)
            if on_gradient is not None:
                on_gradient(number)
        return outcome

    def evaluate(self, parameters: np.ndarray, batch: Samples) -> Outcome:
        """Return the outcome of `batch` with `parameters`, by the user's ``evaluate`` if there is one."""
        evaluate = getattr(self._model.objective, "evaluate", None)
        if evaluate is None:
            outcome = self.learned(parameters, batch)
        else:
            outcome = self._outcome(evaluate(self._model.named(parameters), batch), batch.samples, "evaluate")
        metrics = getattr(self._model.objective, "metrics", None)
        if metrics is None:
            return outcome
        return outcome._replace(sums=self._sums(metrics(self._model.named(parameters), batch), batch.samples))

    def learned(self, parameters: np.ndarray, batch: Samples) -> Outcome:
        """Return the outcome of `batch` with `parameters` that is learned from: that of ``loss_and_gradient``."""
        found = self._model.objective.loss_and_gradient(self._model.named(parameters), batch)
        return self._outcome(found[0], batch.samples, "loss_and_gradient")

    def outputs(self, parameters: np.ndarray, inputs: Any) -> np.ndarray:
        """Return what the user's ``predict`` says of some samples; (outputs, samples).

        Parameters
        ----------
        parameters
            Flat vector.
        inputs : (samples, ...) array, or a dictionary of them
            The samples.

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
                f"{model.called}: predict returned {_shown(found)} for {samples} samples; expected an array of numbers "
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
                f"{self._model.called}: {method} returned {_shown(given)} for the loss; expected a number, the mean "
                f"over the batch, or that and how many of its {samples} samples are correct (not the fraction)"
            ) from None

    def _sums(self, given: Any, samples: int) -> tuple[tuple[str, float], ...]:
        """Return the sums over the samples from means by name, which are the same names at every call."""
        model = self._model
        try:
            found = {name: float(mean) for name, mean in given.items()}
        except (AttributeError, TypeError, ValueError):
            found = {}
        if not found or not all(isinstance(name, str) and _KEY.fullmatch(name) for name in found):
            raise UserError(
                f"{model.called}: metrics returned {_shown(given)}; expected a dictionary of numbers by name, the "
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

    def _gradients(self, given: Any, expect_finite: bool) -> dict[str, np.ndarray]:
        """Return the gradients by name, after comparing them with the parameters."""
        called, shapes = self._model.called, self._model.shapes
        found = dict(_flat(given, f"{called}: its gradient"))
        if wrong := sorted(found.keys() ^ shapes.keys()):
            which = "no parameter is called so" if wrong[0] in found else "there is none"
            raise UserError(f"{called}: the gradient of {wrong[0]!r}: {which}; expected one for each of {[*shapes]}")
        for name, values in found.items():
            if values.shape != shapes[name]:
                raise UserError(
                    f"{called}: the gradient of {name!r} has shape {values.shape}; expected that of the parameter, "
                    f"{shapes[name]}"
                )
            # One sum tells it, but for numbers so large that their sum is infinite.
            if expect_finite and not np.isfinite(_single(values.sum())) and not np.isfinite(_single(values)).all():
                raise RunFailed(f"{called}: the loss is finite, but the gradient of {name!r} is not")
        return found


def try_objective(replica: OwnReplica, model: OwnModel, batch: Samples, held_out: Samples | None) -> None:
    """Compute one gradient, so that mistakes show before anything is learned; raises as `OwnReplica` does.

    The names of the metrics are known afterwards.

    Parameters
    ----------
    replica, model
        What is tried.
    batch
        Some samples.
    held_out
        Some held-out samples, if there are any.
    """
    parameters, gradient = aligned_empty(model.layout.size), aligned_empty(model.layout.size)
    model.initial(0, parameters)
    try:
        with calling("the objective", "it is tried on the first batch"):
            outcome = replica.loss_and_gradient(parameters, batch, gradient)
    except RunFailed as error:
        raise UserError(str(error)) from error
    if held_out is not None and hasattr(model.objective, "metrics"):
        with calling("the objective", "it is tried on the first held-out samples"):
            replica.evaluate(parameters, held_out)
    if not outcome.are_numbers:
        raise UserError(f"{model.called}: the loss of the first batch is {outcome.mean_loss}, at the first values")


def _flat(given: Any, what: str, before: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and arrays of dictionaries within one another, as floating-point numbers."""
    if not isinstance(given, Mapping):
        raise UserError(f"{what}: given {_shown(given)}; {_EXAMPLE}")
    if before and not given:
        raise UserError(f"{what}: the dictionary {before[:-1]!r} is empty; {_EXAMPLE}")
    for key, value in given.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise UserError(f"{what}: {key!r} is no name for an array; expected letters, digits, '_', '.' and '-'")
        if isinstance(value, Mapping):
            yield from _flat(value, what, f"{before}{key}/")
            continue
        array = np.asarray(value)
        if array.dtype.kind != "f" or array.size == 0:
            raise UserError(f"{what}: {before}{key} is {_shown(value)}; {_EXAMPLE}")
        yield f"{before}{key}", array


def _single(values: np.ndarray) -> np.ndarray:
    """Return the values as they will be kept."""
    with np.errstate(over="ignore"):
        return values.astype(DTYPE)


def _shown(value: Any) -> str:
    """Describe what a user's code gave."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    return f"{type(value).__name__} {value!r:.60}"
