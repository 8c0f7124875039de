"""A feed-forward network as an objective: (parameters, batch) -> (loss, gradient), in one process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.kernels.memory import aligned_empty
from dbmpi.network.layers import Arrays, Dense
from dbmpi.network.losses import Loss, Targets
from dbmpi.objective import Batch, Outcome
from dbmpi.paramserver.layout import Layout

_WORKSPACES = 2  # a batch and the shorter one at the end of an epoch


class Network:
    """The network that a configuration describes, for inputs of one shape.

    Implements :class:`dbmpi.objective.Objective`.  One object must not be used by two threads at once.

    Parameters
    ----------
    section : config.NetworkSection
        Layers and loss.
    input_shape : tuple[int, ...]
        Shape of one sample.
    seed : int
        Seed of the initial weights, 0 <= seed < 2**63.
    dtype : dtype
        float32, or float64 for tests.
    targets : "classes" or "values"
        What the loss is computed against.

    Raises
    ------
    UserError
        If the loss is not defined for such targets.
    """

    def __init__(
        self,
        section: config.NetworkSection,
        input_shape: tuple[int, ...],
        seed: int,
        dtype: Any = np.float32,
        targets: Targets = "classes",
    ) -> None:
        self.input_shape = tuple(input_shape)
        self.seed = seed
        self.dtype = np.dtype(dtype)
        self.loss = Loss(section.loss, targets)
        layers = []
        shape = self.input_shape
        for name, described in zip(section.layer_names, section.layers, strict=True):
            layers.append(Dense.described(described, name, shape))
            shape = layers[-1].output_shape
        self.layers = tuple(layers)
        self._workspaces: OrderedDict[int, _Workspace] = OrderedDict()

    @cached_property
    def layout(self) -> Layout:
        """The named tensors that the parameter vector is made of, layer after layer."""
        return Layout(tuple(tensor for layer in self.layers for tensor in layer.tensors.values()))

    @property
    def outputs(self) -> int:
        """Number of outputs of the last layer."""
        return self.layers[-1].units

    def flops(self, samples: int) -> int:
        """Return the floating-point operations of the matrix products of one gradient; all else is left out."""
        return sum(layer.flops(samples, input_gradient=place > 0) for place, layer in enumerate(self.layers))

    def initial(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the initial parameters at positions ``start ... start + len(out)``, however they are cut."""
        owners = [(layer, short) for layer in self.layers for short in layer.tensors]
        numbers = {tensor.name: number for number, tensor in enumerate(self.layout.tensors)}
        for tensor, first, last in self.layout.pieces(start, start + out.size):
            number = numbers[tensor.name]
            layer, short = owners[number]
            position = self.layout.offsets[tensor.name] + first - start
            layer.initial(short, out[position : position + last - first], self.seed, number, first)

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        batch: Batch,
        gradient: np.ndarray,
        on_gradient: Callable[[int], None] | None = None,
    ) -> Outcome:
        """Return the outcome of the batch and write the gradient of its **mean** loss into `gradient`.

        Parameters
        ----------
        parameters, gradient : (layout.size,) arrays of `dtype`
        batch : Batch
            Inputs ``(*input_shape, samples)``; targets int32 ``(samples,)`` or ``(outputs, samples)``.
        on_gradient : callable, optional
            Called with each layer's number, from the last to the first, as soon as its part of `gradient` is complete
            and its parameters are needed no more.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.
        UserError
            If a class is not one of the outputs.
        """
        views, gradients = self._views(parameters, "parameters"), self._views(gradient, "gradient")
        workspace, inputs, targets = self._begin(batch)
        activations = self._forward(views, workspace, inputs)
        # The last outputs become the gradient of the loss; a linear activation does not need them any more.
        last = activations[-1]
        if self.layers[-1].activation != "linear":
            np.copyto(workspace.last_outputs, last)
            activations[-1] = workspace.last_outputs
        loss, correct = self.loss.apply(last, targets)
        gradient_of_outputs = last
        for place in reversed(range(len(self.layers))):
            below = workspace.gradient(place, self.layers[place].inputs) if place > 0 else None
            self.layers[place].backward(
                views[place],
                activations[place],
                activations[place + 1],
                gradient_of_outputs,
                gradients[place],
                below,
            )
            if on_gradient is not None:
                on_gradient(place)
            if below is not None:
                gradient_of_outputs = below
        return Outcome(batch.samples, loss, correct)

    def evaluate(self, parameters: np.ndarray, batch: Batch) -> Outcome:
        """Return the outcome of the batch; raises as `loss_and_gradient` does."""
        workspace, inputs, targets = self._begin(batch)
        last = self._forward(self._views(parameters, "parameters"), workspace, inputs)[-1]
        loss, correct = self.loss.apply(last, targets)
        return Outcome(batch.samples, loss, correct)

    def predict(self, parameters: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """Return the predictions (outputs, samples) for inputs ``(*input_shape, samples)``.

        They are probabilities for the losses ``softmax`` and ``logistic``; for ``squared``, the last layer's outputs.
        """
        workspace = self._workspace(inputs)
        flat = workspace.take(inputs)
        predictions = self._forward(self._views(parameters, "parameters"), workspace, flat)[-1].copy()
        self.loss.predict(predictions)
        return predictions

    def _forward(self, views: list[Arrays], workspace: _Workspace, inputs: np.ndarray) -> list[np.ndarray]:
        """Return the inputs and every layer's outputs."""
        activations = [inputs]
        for layer, parameters, outputs in zip(self.layers, views, workspace.outputs, strict=True):
            layer.forward(parameters, activations[-1], outputs)
            activations.append(outputs)
        return activations

    def _views(self, vector: np.ndarray, what: str) -> list[Arrays]:
        """Return each layer's tensors in a flat vector."""
        if vector.shape != (self.layout.size,) or vector.dtype != self.dtype or not vector.flags.c_contiguous:
            raise ValueError(
                f"{what}: given {_description(vector)}, expected contiguous {self.dtype} ({self.layout.size},)"
            )
        whole = self.layout.views(vector)
        return [{short: whole[tensor.name] for short, tensor in layer.tensors.items()} for layer in self.layers]

    def _begin(self, batch: Batch) -> tuple[_Workspace, np.ndarray, np.ndarray]:
        """Check a batch; return the workspace of its size, its inputs (inputs, samples) and its targets."""
        workspace = self._workspace(batch.inputs)
        return workspace, workspace.take(batch.inputs), self._checked_targets(batch)

    def _workspace(self, inputs: np.ndarray) -> _Workspace:
        if inputs.ndim == 0 or inputs.shape[:-1] != self.input_shape or inputs.shape[-1] < 1:
            shape = ", ".join(map(str, (*self.input_shape, "samples")))
            raise ValueError(f"inputs: given {_description(inputs)}, expected ({shape}) with at least one sample")
        samples = inputs.shape[-1]
        if samples not in self._workspaces:
            if len(self._workspaces) == _WORKSPACES:
                self._workspaces.popitem(last=False)
            self._workspaces[samples] = _Workspace(self.layers, samples, self.dtype)
        self._workspaces.move_to_end(samples)
        return self._workspaces[samples]

    def _checked_targets(self, batch: Batch) -> np.ndarray:
        """Return the targets as the kernels expect them; these use classes as indices without looking."""
        targets, samples = batch.targets, batch.samples
        if self.loss.targets == "values":
            if targets.shape != (self.outputs, samples):
                raise ValueError(f"targets: given {_description(targets)}, expected ({self.outputs}, {samples})")
            return np.ascontiguousarray(targets, self.dtype)
        if targets.shape != (samples,) or not np.issubdtype(targets.dtype, np.integer):
            raise ValueError(f"targets: given {_description(targets)}, expected int32 ({samples},) of classes")
        lowest, highest = int(targets.min()), int(targets.max())
        if lowest < 0 or highest >= self.outputs:
            raise UserError(
                f"targets: given classes from {lowest} to {highest}, but the network has {self.outputs} outputs; "
                f"expected classes from 0 to {self.outputs - 1}"
            )
        return np.ascontiguousarray(targets, np.int32)


class _Workspace:
    """The arrays for one batch size, kept from step to step."""

    def __init__(self, layers: tuple[Dense, ...], samples: int, dtype: np.dtype) -> None:
        self.samples, self.dtype = samples, dtype
        self.outputs = [aligned_empty((layer.units, samples), dtype) for layer in layers]
        self._input_size = layers[0].inputs
        self._widest = max((layer.inputs for layer in layers[1:]), default=0)

    @cached_property
    def last_outputs(self) -> np.ndarray:
        """Room for the last outputs while their gradient takes their place."""
        return np.empty_like(self.outputs[-1])

    @cached_property
    def _inputs(self) -> np.ndarray:
        return aligned_empty((self._input_size, self.samples), self.dtype)

    @cached_property
    def _gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays that hold the gradients for the outputs of one layer after the other, in turn."""
        return (
            aligned_empty(self._widest * self.samples, self.dtype),
            aligned_empty(self._widest * self.samples, self.dtype),
        )

    def gradient(self, place: int, units: int) -> np.ndarray:
        """Return room for the gradient (units, samples) for the inputs of layer number `place`."""
        return self._gradients[place % 2][: units * self.samples].reshape(units, self.samples)

    def take(self, inputs: np.ndarray) -> np.ndarray:
        """Return inputs as (inputs, samples) in our dtype, themselves where they are so already."""
        if inputs.dtype != self.dtype or not inputs.flags.c_contiguous:
            np.copyto(self._inputs.reshape(inputs.shape), inputs)
            return self._inputs
        return inputs.reshape(self._input_size, self.samples)


def _description(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
