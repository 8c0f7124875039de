"""A loss in JAX as an objective, to train it by Downpour or Sandblaster with dbmpi's data and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np

from dbmpi.errors import UserError
from dbmpi.jax.device import prepare
from dbmpi.kernels.memory import CACHE_LINE
from dbmpi.objective import NamedArrays, Samples

_LINE = CACHE_LINE // 4
"""Float32 in a cache line."""


class LossObjective:
    """A loss of parameters in a tree and its gradient, for ``dbmpi.train(run, objective=...)``.

    The functions are compiled once for each shape of a batch: for that of ``optimizer.batch_size``, and for the
    last batch of an epoch if it is smaller.  They must be pure, as :func:`jax.jit` asks for.

    Parameters that begin at a cache line are used where they are, others are copied.  To make that rare, arrays whose
    size is a multiple of 16 come first in the order of the parameters.  Gradients are copied once, to where they are
    pushed from.

    Parameters
    ----------
    loss : callable
        ``loss(parameters, batch)`` returns the mean loss of the batch, or that and the number of samples that are
        classified correctly.  `batch` is a :class:`dbmpi.objective.Samples`; take random numbers from
        ``jax.random.key(batch.step)``.
    parameters : tree or callable
        First values: arrays in any tree that JAX knows, of float32; or a function of a key of :mod:`jax.random` that
        returns it, which is called with ``jax.random.key(run.seed)``.  Names are made of the path in the tree, e.g.
        ``layers.0.weights``.
    evaluate : callable, optional
        The same as `loss`, which it is by default, for held-out samples, e.g. without dropout.
    predict : callable, optional
        ``predict(parameters, inputs)`` returns an array with a row for each sample.  Where the targets are classes, and
        the loss comes alone, held-out samples whose largest output is that of their class are counted as correct.

    Raises
    ------
    UserError
        If a parameter is not of float32, there is none, or two have the same name.

    Examples
    --------
    >>> import dbmpi.jax
    >>> import jax.numpy as jnp
    >>> def loss(parameters, batch):
    ...     outputs = batch.inputs @ parameters["weights"] + parameters["bias"]
    ...     return jnp.square(outputs - batch.targets).mean()
    >>> objective = dbmpi.jax.objective(loss, {"weights": jnp.zeros((4, 1)), "bias": jnp.zeros(1)})
    >>> sorted(objective.initial(seed=0))
    ['bias', 'weights']
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        parameters: Any,
        *,
        evaluate: Callable[..., Any] | None = None,
        predict: Callable[..., Any] | None = None,
    ) -> None:
        self._device = prepare()
        self._parameters = parameters
        # Some trees can be called, too, but only a function is a leaf of its own.
        self._makes = callable(parameters) and jax.tree_util.treedef_is_leaf(jax.tree.structure(parameters))
        tree = jax.eval_shape(parameters, jax.random.key(0)) if self._makes else parameters
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(tree)
        self._names, self._shapes = _names(leaves), [np.shape(leaf) for _, leaf in leaves]
        self._predicts = predict is not None

        def learned(leaves: list[Any], batch: Samples) -> tuple[Any, Any]:
            found = loss(self._tree.unflatten(leaves), batch)
            return found if isinstance(found, tuple) else (found, None)

        def judged(leaves: list[Any], batch: Samples) -> Any:
            found = (evaluate or loss)(self._tree.unflatten(leaves), batch)
            classes = batch.targets.dtype == np.int32 and batch.targets.ndim == 1
            if predict is None or isinstance(found, tuple) or not classes:
                return found
            outputs = predict(self._tree.unflatten(leaves), batch.inputs)
            if outputs.ndim != 2:
                return found
            return found, (outputs.argmax(axis=1) == batch.targets).sum()

        def predicted(leaves: list[Any], inputs: Any) -> Any:
            assert predict is not None
            return predict(self._tree.unflatten(leaves), inputs)

        self._gradient = jax.jit(jax.value_and_grad(learned, has_aux=True))
        self._judged, self._predicted = jax.jit(judged), jax.jit(predicted)

    def initial(self, seed: int) -> NamedArrays:
        """Return the first values by name, those of this `seed` if they are a function of a key."""
        tree = self._parameters(jax.random.key(seed)) if self._makes else self._parameters
        named = dict(zip(self._names, jax.tree.leaves(tree), strict=True))
        # The sort is stable: where the size is a multiple of a line, the next one begins at a line, too.
        order = sorted(named, key=lambda name: np.size(named[name]) % _LINE != 0)
        return {name: np.asarray(named[name], np.float32) for name in order}

    def tree(self, parameters: NamedArrays) -> Any:
        """Return `parameters` by name, e.g. ``dbmpi.parameters(result)``, as the tree that the loss takes."""
        shaped = zip(self._names, self._shapes, strict=True)
        return self._tree.unflatten([np.reshape(parameters[name], shape) for name, shape in shaped])

    def loss_and_gradient(self, parameters: NamedArrays, batch: Samples) -> tuple[Any, NamedArrays]:
        """Return what the user's loss says of a `batch` at the `parameters`, and the gradient of its mean loss."""
        with self._computing(parameters) as dtype:
            (loss, correct), gradients = self._gradient(self._leaves(parameters), _batch(batch, dtype))
        found = dict(zip(self._names, map(np.asarray, gradients), strict=True))
        return float(loss) if correct is None else (float(loss), int(correct)), found

    def evaluate(self, parameters: NamedArrays, batch: Samples) -> float | tuple[float, int]:
        """Return the mean loss of a `batch` at the `parameters`; for classes also how many are correct."""
        with self._computing(parameters) as dtype:
            found = self._judged(self._leaves(parameters), _batch(batch, dtype))
        return (float(found[0]), int(found[1])) if isinstance(found, tuple) else float(found)

    def predict(self, parameters: NamedArrays, inputs: Any) -> np.ndarray:
        """Return what the user's `predict` says at the `parameters` for some `inputs`, (samples, ...)."""
        if not self._predicts:
            raise UserError("dbmpi.jax.objective: it was made without predict=, a function (parameters, inputs)")
        with self._computing(parameters):
            return np.asarray(self._predicted(self._leaves(parameters), inputs))

    @contextmanager
    def _computing(self, parameters: NamedArrays) -> Iterator[np.dtype[Any]]:
        """Compute on the processor in the dtype of the parameters, which is float64 where a gradient is checked."""
        dtype = parameters[self._names[0]].dtype
        with jax.default_device(self._device), jax.enable_x64(True) if dtype == np.float64 else nullcontext():
            yield dtype

    def _leaves(self, parameters: NamedArrays) -> list[np.ndarray]:
        # A compiled function reads NumPy's arrays that begin at a line where they are.  By DLPack each would take 20
        # times as long, and arrays that are read only are refused.
        return [parameters[name] for name in self._names]


def _batch(batch: Samples, dtype: np.dtype[Any]) -> Any:
    """Return a batch as compiled functions take it, its floats of a `dtype`, and its step a number of NumPy's."""

    def given(array: Any) -> Any:
        return array.astype(dtype, copy=False) if array.dtype.kind == "f" else array

    step: Any = np.uint32(batch.step % 2**32)
    inputs, targets, weights = jax.tree.map(given, (batch.inputs, batch.targets, batch.weights))
    return Samples(inputs, targets, weights, step)


def _names(leaves: list[tuple[Any, Any]]) -> list[str]:
    """Return a name for each parameter, once all of them can be learned."""
    if not leaves:
        raise UserError("dbmpi.jax.objective: there are no parameters; expected a tree of arrays of float32")
    names: list[str] = []
    for path, leaf in leaves:
        where = jax.tree_util.keystr(path, simple=True, separator=".") or "parameters"
        try:
            dtype = jax.dtypes.canonicalize_dtype(jax.numpy.result_type(leaf))
        except TypeError:
            dtype = type(leaf).__name__
        if dtype != np.float32:
            raise UserError(
                f"dbmpi.jax.objective: the parameter {where!r} is {dtype}: expected float32; what is not learned "
                "belongs to the loss, not to its parameters"
            )
        name = re.sub(r"[^\w.\-]+", "_", where, flags=re.ASCII)
        name = name if re.match(r"\w", name, re.ASCII) else f"_{name}"
        if name in names:
            raise UserError(f"dbmpi.jax.objective: two parameters have the name {name!r}; give one another key")
        names.append(name)
    return names
