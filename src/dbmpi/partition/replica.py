"""One worker's part of a replica: local work, named movement, local work.

Every worker computes the boxes of each layer's outputs that its placement gives it.  Between two layers an exchange
fills the inputs that the boxes need; on the way back its mirror adds up the gradients.  A worker alone, without a
communicator, is the same program without exchanges.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import UserError
from dbmpi.kernels.memory import aligned_empty
from dbmpi.network.layer import Arrays, Context, Layer
from dbmpi.network.losses import Loss
from dbmpi.objective import Batch, Outcome
from dbmpi.partition.boxes import Box
from dbmpi.partition.exchange import Exchange
from dbmpi.partition.lossexchange import LossExchange
from dbmpi.partition.parameters import LocalParameters

if TYPE_CHECKING:
    from mpi4py import MPI

_WORKSPACES = 2  # a batch and the shorter one at the end of an epoch


class Replica:
    """Loss and gradient of a network on one of the workers that compute it together.

    All workers of a replica call the same methods with the same batch (collective over `comm`).

    Parameters
    ----------
    layers
        The layers from the input upwards.
    loss
        On top of the last layer, whose outputs have one axis.
    boxes
        For each layer, the box of its outputs that each worker computes.
    parameters
        Which part of the whole parameters this worker holds.
    dtype
        Of parameters and activations.
    seed
        Of masks that are drawn anew each step.
    comm
        The workers of the replica; None for one alone.

    Attributes
    ----------
    seconds
        Time spent so far: ``compute`` and ``exchange`` (waiting for other partitions included), for each layer.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        loss: Loss,
        boxes: Sequence[Sequence[Box]],
        parameters: LocalParameters,
        dtype: np.dtype[np.floating],
        seed: int,
        comm: MPI.Intracomm | None = None,
    ) -> None:
        rank = 0 if comm is None else comm.rank
        self._layers = tuple(layers)
        self._loss = loss
        self.parameters = parameters
        self._dtype = dtype
        self._seed = seed
        self._mine = [owned[rank] for owned in boxes]
        needed = [[_needed(layer, box) for box in owned] for layer, owned in zip(self._layers, boxes, strict=True)]
        self._input = needed[0][rank]
        self._exchanges = [
            Exchange(comm, boxes[place - 1], needed[place], self._layers[place - 1].output_shape)
            for place in range(1, len(self._layers))
        ]
        self._outputs_exchange = LossExchange(comm, boxes[-1]) if comm is not None and comm.size > 1 else None
        self._comm = comm
        self._workspaces: OrderedDict[int, _Workspace] = OrderedDict()
        self.seconds = {kind: [0.0] * len(self._layers) for kind in ("forward", "backward", "exchange")}

    @property
    def size(self) -> int:
        """Elements of this worker's parameters."""
        return self.parameters.size

    def serve_while_waiting(self, serve: Callable[[], bool] | None) -> None:
        """Let this rank go on with other duties while it waits for the other partitions."""
        for exchange in self._exchanges:
            exchange.serve = serve
        if self._outputs_exchange is not None:
            self._outputs_exchange.serve = serve
        self.parameters.serve = serve

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        batch: Batch,
        gradient: np.ndarray,
        on_gradient: Callable[[int], None] | None = None,
        *,
        step: int = 0,
    ) -> Outcome:
        """Return the outcome of the whole batch and write this worker's part of the gradient of its mean loss.

        Parameters
        ----------
        parameters, gradient
            This worker's part, flat.
        batch
            Inputs ``(*input shape, samples)`` of all of the batch, in `dtype`.
        on_gradient
            Called with each layer's number, from the last to the first, as soon as its part of `gradient` is complete.
        step
            A number for masks that are drawn anew each step.
        """
        views = self.parameters.views(parameters, "parameters")
        gradients = self.parameters.views(gradient, "gradient")
        batch = self._checked(batch)
        context = Context(True, self._seed, step)
        work = self._workspace(batch.samples)
        self._forward(views, batch.inputs, work, context)
        top = work.gradient(len(self._layers))
        if top is not work.outputs[-1]:
            np.copyto(top, work.outputs[-1])
        loss, correct = self._loss_of(top, batch)
        for place in reversed(range(len(self._layers))):
            below = work.input_gradient(place) if place > 0 else None
            began = time.perf_counter()
            if not self._mine[place].empty:
                self._layers[place].backward(
                    self._mine[place],
                    views[place],
                    work.inputs[place],
                    work.outputs[place],
                    work.gradient(place + 1),
                    gradients[place],
                    below,
                    context,
                )
            elif below is not None:
                below.fill(0)
            self.parameters.add_up(place, gradient, self._comm)
            if on_gradient is not None:
                on_gradient(place)
            ended = time.perf_counter()
            self.seconds["backward"][place] += ended - began
            if below is not None:
                if not self._exchanges[place - 1].in_place:
                    self._exchanges[place - 1].add(below, work.gradient(place))
                self.seconds["exchange"][place] += time.perf_counter() - ended
        return Outcome(batch.samples, loss, correct)

    def evaluate(self, parameters: np.ndarray, batch: Batch) -> Outcome:
        """Return the outcome of the batch; dropout is off."""
        batch = self._checked(batch)
        work = self._workspace(batch.samples)
        self._forward(self.parameters.views(parameters, "parameters"), batch.inputs, work, Context(training=False))
        loss, correct = self._loss_of(work.outputs[-1], batch)
        return Outcome(batch.samples, loss, correct)

    def outputs(self, parameters: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """Return the last layer's outputs (outputs, samples) of all workers, before the loss; a new array."""
        inputs = self._checked_inputs(inputs)
        work = self._workspace(inputs.shape[-1])
        self._forward(self.parameters.views(parameters, "parameters"), inputs, work, Context(training=False))
        last = work.outputs[-1]
        if self._outputs_exchange is None:
            return last.reshape(-1, last.shape[-1]).copy()
        return self._outputs_exchange.gather(last)

    def _forward(self, views: list[Arrays], inputs: np.ndarray, work: _Workspace, context: Context) -> None:
        work.take(inputs, self._input)
        for place, layer in enumerate(self._layers):
            began = time.perf_counter()
            if place > 0 and not self._exchanges[place - 1].in_place:
                self._exchanges[place - 1].fill(work.outputs[place - 1], work.inputs[place])
            filled = time.perf_counter()
            if not self._mine[place].empty:
                layer.forward(self._mine[place], views[place], work.inputs[place], work.outputs[place], context)
            self.seconds["exchange"][place] += filled - began
            self.seconds["forward"][place] += time.perf_counter() - filled

    def _loss_of(self, values: np.ndarray, batch: Batch) -> tuple[float, int]:
        """Return loss and correct samples of the whole batch; `values` becomes this worker's part of the gradient."""
        flat = values.reshape(-1, values.shape[-1])
        if self._outputs_exchange is None:
            return self._loss.apply(flat, batch.targets)
        return self._outputs_exchange.apply(self._loss, flat, batch.targets)

    def _checked(self, batch: Batch) -> Batch:
        """Return the batch with targets as the kernels expect them; these use classes as indices without looking."""
        batch = batch._replace(inputs=self._checked_inputs(batch.inputs))
        targets, samples, outputs = batch.targets, batch.samples, self._layers[-1].output_shape[0]
        if self._loss.targets == "values":
            if targets.shape != (outputs, samples):
                raise ValueError(f"targets: given {_description(targets)}, expected ({outputs}, {samples})")
            return batch._replace(targets=np.ascontiguousarray(targets, self._dtype))
        if targets.shape != (samples,) or not np.issubdtype(targets.dtype, np.integer):
            raise ValueError(f"targets: given {_description(targets)}, expected int32 ({samples},) of classes")
        lowest, highest = int(targets.min()), int(targets.max())
        if lowest < 0 or highest >= outputs:
            raise UserError(
                f"targets: given classes from {lowest} to {highest}, but the network has {outputs} outputs; "
                f"expected classes from 0 to {outputs - 1}"
            )
        return batch._replace(targets=np.ascontiguousarray(targets, np.int32))

    def _checked_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """Return the inputs in the shape that the first layer expects; an image may come without its one map."""
        expected = self._layers[0].input_shape
        shape = inputs.shape[:-1] if inputs.ndim else ()
        if shape not in (expected, expected[1:] if expected[:1] == (1,) else expected) or inputs.shape[-1] < 1:
            wanted = ", ".join(map(str, (*expected, "samples")))
            raise ValueError(f"inputs: given {_description(inputs)}, expected ({wanted}) with at least one sample")
        return inputs.reshape(*expected, inputs.shape[-1])

    def _workspace(self, samples: int) -> _Workspace:
        if samples not in self._workspaces:
            if len(self._workspaces) == _WORKSPACES:
                self._workspaces.popitem(last=False)
            needed = [self._input] + [exchange.needed for exchange in self._exchanges]
            in_place = [False] + [exchange.in_place for exchange in self._exchanges]
            linear = getattr(self._layers[-1], "activation", None) == "linear"
            self._workspaces[samples] = _Workspace(self._mine, needed, in_place, samples, self._dtype, linear)
        self._workspaces.move_to_end(samples)
        return self._workspaces[samples]


class _Workspace:
    """A worker's arrays for one batch size, kept from step to step.

    Gradients take turns in three buffers: that for the outputs of a layer, that for its inputs, and where an exchange
    lies between, that for the outputs of the layer below.
    """

    def __init__(
        self,
        mine: Sequence[Box],
        needed: Sequence[Box],
        in_place: Sequence[bool],
        samples: int,
        dtype: np.dtype[np.floating],
        linear: bool,
    ) -> None:
        self.outputs = [aligned_empty((*box.shape, samples), dtype) for box in mine]
        self._copied_inputs: np.ndarray | None = None
        self.inputs = [
            self.outputs[place - 1] if in_place[place] else aligned_empty((*box.shape, samples), dtype)
            for place, box in enumerate(needed)
            if place > 0
        ]
        self.inputs.insert(0, np.empty(0, dtype))
        self._mine, self._needed, self._in_place = mine, needed, in_place
        self._samples = samples
        largest = max((box.size for box in (*mine, *needed[1:])), default=0) * samples
        self._buffers: list[np.ndarray | None] = [None, None, None]
        self._largest, self._dtype = largest, dtype
        self._linear = linear

    def take(self, inputs: np.ndarray, box: Box) -> None:
        """Use the needed part of a batch as the first layer's inputs; the batch itself where that is all of it."""
        part = inputs[box.slices()]
        if part.flags.c_contiguous and part.dtype == self._dtype:
            self.inputs[0] = part
            return
        if self._copied_inputs is None:
            self._copied_inputs = aligned_empty(part.shape, self._dtype)
        np.copyto(self._copied_inputs, part)
        self.inputs[0] = self._copied_inputs

    def gradient(self, place: int) -> np.ndarray:
        """Return room for the gradient for the outputs of layer number ``place - 1``."""
        box = self._mine[place - 1]
        if place == len(self._mine) and self._linear:
            return self.outputs[-1]  # a linear last layer does not need its outputs any more
        # With nothing between, the gradient for the inputs of the layer above is the same array.
        which = self._turn(place) if place == len(self._mine) or self._in_place[place] else 2
        return self._room(which, box)

    def input_gradient(self, place: int) -> np.ndarray:
        """Return room for the gradient for the inputs of layer number `place`."""
        return self._room(self._turn(place), self._needed[place])

    def _turn(self, place: int) -> int:
        return place % 2

    def _room(self, which: int, box: Box) -> np.ndarray:
        buffer = self._buffers[which]
        if buffer is None:
            buffer = self._buffers[which] = aligned_empty(self._largest, self._dtype)
        return buffer[: box.size * self._samples].reshape(*box.shape, self._samples)


def _description(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def _needed(layer: Layer, output: Box) -> Box:
    """Return the inputs that a box of outputs needs; none for an empty box."""
    if output.empty:
        return Box((0,) * len(layer.input_shape), (0,) * len(layer.input_shape))
    return layer.input_box(output)
