"""One worker's part of a replica: the layers one after the other, and the loss on top.

Every worker computes what its placement gives it of each layer.  A worker alone, without a communicator, is the same
program without exchanges.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.kernels import updates
from dbmpi.mpi.collective import Collective
from dbmpi.network.layer import Arrays, Context, Layer, accrues, takes_parts
from dbmpi.network.losses import Loss
from dbmpi.objective import Batch, Gradient, Outcome
from dbmpi.replica.exchange import Exchange
from dbmpi.replica.group import Group
from dbmpi.replica.loss import LossExchange
from dbmpi.replica.parameters import LocalParameters
from dbmpi.replica.placement import Placement
from dbmpi.replica.plan import ExchangePlan, plan_exchanges
from dbmpi.replica.stages import Clock, stage
from dbmpi.replica.terms import objectives
from dbmpi.replica.workspace import Workspace

_WORKSPACES = 2  # a batch and the shorter one at the end of an epoch


class Replica(Collective):
    """Loss and gradient of a network on one of the workers that compute it together.

    All workers of a replica call the same methods with the same batch (collective).  A context manager: at its end,
    memory that they share is given back.

    Parameters
    ----------
    layers
        The layers from the input upwards.
    loss
        On top of the last layer, whose outputs have one axis; None if all that is learned are the layers' own
        objectives.
    placement
        What each worker computes.
    parameters
        Which part of the whole parameters this worker holds.
    dtype
        Of parameters and activations.
    seed
        Of masks that are drawn anew each step.
    group
        The workers, of which this is one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        loss: Loss | None,
        placement: Placement,
        parameters: LocalParameters,
        dtype: np.dtype[np.floating],
        seed: int,
        group: Group,
    ) -> None:
        rank = group.rank
        self._layers = tuple(layers)
        self._loss = loss
        self.parameters = parameters
        self._dtype = dtype
        self._seed = seed
        self._group = group
        plans = plan_exchanges(self._layers, placement)
        self._mine = [owned[rank] for owned in placement.boxes]
        self._needed = [plan.inputs.needed[rank] for plan in plans]
        nothing = Box((0,), (0,))
        self._summed = [nothing if plan.outputs is None else plan.outputs.needed[rank] for plan in plans]
        self._stages = [
            stage(place, layer, mine, plan, group)
            for place, (layer, mine, plan) in enumerate(zip(self._layers, self._mine, plans, strict=True))
        ]
        self._within = [
            plan.outputs is not None or one.exchange.within for plan, one in zip(plans, self._stages, strict=True)
        ]
        self._gaps = [takes_parts(layer) for layer in self._layers]
        self._objectives = objectives(self._layers, placement, group)
        self._aside = [
            place
            for place, layer in enumerate(self._layers)
            if place in self._objectives or parameters.shared(place) or not accrues(layer)
        ]
        self._scratch = np.empty(0, dtype)
        last = placement.boxes[-1]
        self._turned = LossExchange(group, last) if loss is not None and group.size > 1 else None
        self._terms = group.shelf(fixed=2)  # one of float64, in elements that may be float32
        shape = tuple(self._layers[-1].output_shape)
        self._gathered = Exchange(group, ExchangePlan(shape, last, (Box.whole(shape),) * len(last)))
        self._workspaces: OrderedDict[int, Workspace] = OrderedDict()
        self._clock = Clock(len(self._layers))

    @property
    def size(self) -> int:
        """Elements of this worker's parameters."""
        return self.parameters.size

    @property
    def partitions(self) -> int:
        """Number of workers."""
        return self._group.size

    @property
    def seconds(self) -> dict[str, list[float]]:
        """Time spent so far, by layer: ``forward``, ``backward``, ``exchange`` (waiting for others included)."""
        return self._clock.seconds

    def serve_while_waiting(self, serve: Callable[[], bool] | None) -> None:
        """Let this rank go on with other duties while it waits for the other partitions."""
        self._group.serve = serve

    def prepare(self, samples: int) -> None:
        """Make room for what the workers share in batches of up to so many samples (collective).

        Otherwise the first such batch does, in which this rank does not serve others.
        """
        self._group.make_room(samples, self._dtype.itemsize)

    def free(self) -> None:
        """Give back what the workers share (collective)."""
        self._group.free()

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
        """Return the outcome of the whole batch and write this worker's part of the gradient of its mean loss.

        Parameters
        ----------
        parameters, gradient
            This worker's part, flat; for the gradient also what gives room for a layer's.
        batch
            Inputs ``(*input shape, samples)`` of all of the batch, in `dtype`.
        on_gradient
            Called with each layer's number, from the last to the first, as soon as its part of `gradient` is complete.
        step
            A number for masks that are drawn anew each step.
        add
            Add to what is in `gradient`, instead of overwriting it.
        """
        views = self.parameters.views(parameters, "parameters")
        room = gradient if callable(gradient) else self.parameters.cut(gradient, "gradient").__getitem__
        batch = self._checked(batch)
        context = Context(True, self._seed, step)
        aside = self._aside if add else ()
        work = self._workspace(batch.samples)
        terms = self._forward(views, batch.inputs, work, context)
        top = work.gradient(len(self._layers))
        if self._loss is None:
            top.fill(0)
        elif top is not work.outputs[-1]:
            np.copyto(top, work.outputs[-1])
        outcome = self._outcome(top, batch, terms)
        self._clock.start()
        for place in reversed(range(len(self._layers))):
            part = room(place)
            self._clock.start()  # a layer may have waited for its room
            computed = self._room(part.size) if place in aside else part
            of_layer = self.parameters.tensors(place, computed)
            objective = self._objectives.get(place)
            if objective is not None:
                objective.backward(views[place], of_layer, work)
            one = self._stages[place]
            one.backward(views[place], of_layer, work, context, self._clock, add=add and computed is part)
            self.parameters.add_up(place, computed)
            if computed is not part:  # what is computed aside is added when it is whole
                updates.add(part, computed)
            if on_gradient is not None:
                on_gradient(place)
            one.finish_backward(work, self._clock)
            if objective is not None:
                objective.backward_below(work)
        return outcome

    def evaluate(self, parameters: np.ndarray, batch: Batch) -> Outcome:
        """Return the outcome of the batch; dropout is off."""
        batch = self._checked(batch)
        work = self._workspace(batch.samples)
        views = self.parameters.views(parameters, "parameters")
        terms = self._forward(views, batch.inputs, work, Context(training=False))
        return self._outcome(work.outputs[-1], batch, terms)

    def outputs(self, parameters: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """Return the last layer's outputs (outputs, samples) of all workers, before the loss; a new array."""
        inputs = self._checked_inputs(inputs)
        work = self._workspace(inputs.shape[-1])
        self._forward(self.parameters.views(parameters, "parameters"), inputs, work, Context(training=False))
        whole = np.empty((*self._gathered.needed.shape, inputs.shape[-1]), self._dtype)
        self._gathered.fill(work.outputs[-1], whole)
        return whole.reshape(-1, inputs.shape[-1])

    def _forward(self, views: list[Arrays], inputs: np.ndarray, work: Workspace, context: Context) -> float:
        """Compute all layers; return this worker's part of the objectives, summed over the samples."""
        work.take(inputs)
        terms = 0.0
        self._clock.start()
        for place, one in enumerate(self._stages):
            one.forward(views[place], work, context, self._clock)
            if place in self._objectives:
                terms += self._objectives[place].forward(views[place], inputs, work)
                self._clock.lap("forward", place)
        return terms

    def _outcome(self, values: np.ndarray, batch: Batch, terms: float) -> Outcome:
        """Return loss and correct samples of the whole batch; `values` becomes this worker's part of the gradient."""
        loss, correct = 0.0, -1
        if self._loss is not None:
            flat = values.reshape(-1, values.shape[-1])
            apply = self._loss.apply if self._turned is None else partial(self._turned.apply, self._loss)
            loss, correct = apply(flat, batch.targets, batch.weights)
        if self._objectives and self._group.size > 1:
            everybody, what = range(self._group.size), "the objectives of the other partitions"
            terms = float(self._group.sum(self._terms, np.array([terms]), everybody, what)[0])
        return Outcome(batch.samples, loss + terms, correct)

    def _checked(self, batch: Batch) -> Batch:
        """Return the batch with targets as the kernels expect them; these use classes as indices without looking."""
        batch = batch._replace(inputs=self._checked_inputs(batch.inputs))
        targets, samples, outputs = batch.targets, batch.samples, self._layers[-1].output_shape[0]
        if self._loss is None:
            return batch
        if batch.weights is not None:
            if batch.weights.shape != (samples,):
                raise ValueError(f"weights: given {_description(batch.weights)}, expected ({samples},)")
            batch = batch._replace(weights=np.ascontiguousarray(batch.weights, self._dtype))
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

    def _room(self, size: int) -> np.ndarray:
        """Return memory for the gradient of a layer that cannot add it to another."""
        if self._scratch.size < size:
            self._scratch = np.empty(size, self._dtype)
        return self._scratch[:size]

    def _workspace(self, samples: int) -> Workspace:
        self._group.make_room(samples, self._dtype.itemsize)
        if samples not in self._workspaces:
            if len(self._workspaces) == _WORKSPACES:
                self._workspaces.popitem(last=False)
            linear = self._loss is not None and getattr(self._layers[-1], "activation", None) == "linear"
            self._workspaces[samples] = Workspace(
                self._mine, self._needed, self._within, self._gaps, self._summed, samples, self._dtype, linear
            )
        self._workspaces.move_to_end(samples)
        return self._workspaces[samples]


def _description(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
