"""One worker's part of a replica: the layers one after the other, and the loss on top.

Every worker computes the part of each layer that the placement gives it.  A worker alone, without a communicator, is
the same program without exchanges.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.kernels import updates
from dbmpi.mpi.blocking import Collective
from dbmpi.network.description import Network
from dbmpi.network.layer import Arrays, Context, accrues, takes_parts
from dbmpi.objective import Batch, Gradient, Objective, Outcome
from dbmpi.replica.exchange import Exchange
from dbmpi.replica.group import Group
from dbmpi.replica.loss import LossExchange
from dbmpi.replica.operands import Operands
from dbmpi.replica.parameters import LocalParameters
from dbmpi.replica.placement import Placement
from dbmpi.replica.plan import ExchangePlan, plan_exchanges
from dbmpi.replica.stages import Clock, Stage, Sweep, stage
from dbmpi.replica.terms import terms
from dbmpi.replica.workspace import Footprint, Workspace

if TYPE_CHECKING:
    from mpi4py import MPI

_WORKSPACES = 2  # a batch and the shorter one at the end of an epoch


class Replica(Collective, Objective[Batch]):
    """Loss and gradient of a network on one of the workers that compute it together.

    All workers of a replica call the same methods with the same batch (collective).  A context manager: at its end,
    memory that they share is freed.

    Parameters
    ----------
    network
        Its layers and its loss.
    placement
        What each worker computes.
    comm
        The workers, of which this is one (collective); None for one alone.
    shared
        Let workers of one node exchange through memory that they share; otherwise by messages.

    Attributes
    ----------
    parameters
        The part of the whole parameters that this worker has.
    """

    def __init__(
        self, network: Network, placement: Placement, comm: MPI.Intracomm | None = None, *, shared: bool = True
    ) -> None:
        self._network = network
        self._layers, self._loss, self._dtype = network.layers, network.loss, network.dtype
        self._group = group = Group(comm, shared=shared)
        self.parameters = LocalParameters(self._layers, network.layout, placement, group, self._dtype)
        self._stages: list[Stage] = []
        self._footprints: list[Footprint] = []
        self._operands = Operands(network.rounded)
        for number, (layer, plan) in enumerate(zip(self._layers, plan_exchanges(self._layers, placement), strict=True)):
            owned, by_inputs = placement.boxes[number][group.rank], plan.outputs is not None
            self._stages.append(stage(number, layer, owned, plan, group))
            self._footprints.append(
                Footprint(
                    owned,
                    plan.inputs.needed[group.rank],
                    summed=plan.outputs.needed[group.rank] if plan.outputs is not None else None,
                    within=by_inputs or self._stages[-1].exchange.within,
                    gaps=takes_parts(layer),
                    rounded=network.rounded[number],
                )
            )
        self._terms = terms(self._layers, placement, group)
        self._aside = {
            number
            for number, layer in enumerate(self._layers)
            if number in self._terms or self.parameters.shared(number) or not accrues(layer)
        }
        """Layers that cannot add their gradient to another one."""
        self._scratch = np.empty(0, self._dtype)
        last = placement.boxes[-1]
        self._turned = LossExchange(group, last) if self._loss is not None and group.size > 1 else None
        self._sum_of_terms = group.shelf(fixed=2)  # one of float64, in elements that may be float32
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
        """Call `serve` while this rank waits for the other partitions; it returns whether it did something."""
        self._group.serve = serve

    def keep_rounded(self, parameters: np.ndarray, rounded: np.ndarray) -> None:
        """Multiply by `rounded`, the bfloat16 of `parameters`, which others keep up to date, whenever these are given.

        Both are flat vectors of this worker's size; of the network's layers only those that multiply bfloat16 use it.
        """
        parts = enumerate(self.parameters.parts)
        views = [self.parameters.tensors(number, rounded[part.start : part.stop]) for number, part in parts]
        self._operands.keep(parameters, views)

    def prepare(self, samples: int) -> None:
        """Open the memory that the workers share, for batches of up to so many samples (collective).

        Otherwise the first such batch does this, and this rank does not serve others meanwhile.
        """
        self._group.reserve(samples, self._dtype.itemsize)

    def free(self) -> None:
        """Free the memory that the workers share (collective)."""
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
        changed: bool = True,
    ) -> Outcome:
        """Return the outcome of the whole batch and write this worker's part of the gradient of its **mean** loss.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.
        UserError
            If a class is not one of the outputs.
        """
        views = self.parameters.views(parameters, "parameters")
        buffer = gradient if callable(gradient) else self.parameters.cut(gradient, "gradient").__getitem__
        batch = self._checked(batch)
        sweep = self._sweep(batch.samples, Context(True, self._network.seed, step))
        self._operands.begin(parameters, changed=changed)
        added = self._forward(views, batch.inputs, sweep)
        top = sweep.work.output_gradient(len(self._layers) - 1)
        if self._loss is None:
            top.fill(0)
        elif top is not sweep.work.outputs[-1]:
            np.copyto(top, sweep.work.outputs[-1])
        outcome = self._outcome(top, batch, added)
        for layer in reversed(range(len(self._layers))):
            part = buffer(layer)
            self._clock.start()  # the buffer may have been waited for
            self._backward(layer, self._operands.of(layer, views[layer]), part, sweep, add=add)
            if on_gradient is not None:
                on_gradient(layer)
            self._stages[layer].finish_backward(sweep)
            if layer in self._terms:
                self._terms[layer].backward_below(sweep.work)
        return outcome

    def evaluate(self, parameters: np.ndarray, batch: Batch, *, changed: bool = True) -> Outcome:
        """Return the outcome of `batch`, with dropout off; the others are as for `loss_and_gradient`."""
        batch = self._checked(batch)
        sweep = self._sweep(batch.samples, Context(training=False))
        self._operands.begin(parameters, changed=changed)
        added = self._forward(self.parameters.views(parameters, "parameters"), batch.inputs, sweep)
        return self._outcome(sweep.work.outputs[-1], batch, added)

    def outputs(self, parameters: np.ndarray, inputs: np.ndarray, *, changed: bool = True) -> np.ndarray:
        """Return the last layer's outputs (outputs, samples) of all workers, before the loss; a new array.

        `parameters`, `inputs` and `changed` are as for `loss_and_gradient`.
        """
        inputs = self._checked_inputs(inputs)
        sweep = self._sweep(inputs.shape[-1], Context(training=False))
        self._operands.begin(parameters, changed=changed)
        self._forward(self.parameters.views(parameters, "parameters"), inputs, sweep)
        whole = np.empty((*self._gathered.needed.shape, inputs.shape[-1]), self._dtype)
        self._gathered.fill(sweep.work.outputs[-1], whole)
        return whole.reshape(-1, inputs.shape[-1])

    def _forward(self, views: list[Arrays], inputs: np.ndarray, sweep: Sweep) -> float:
        """Compute all layers; return this worker's part of the terms, summed over the samples."""
        sweep.work.take(inputs)
        total = 0.0
        self._clock.start()
        for layer, one in enumerate(self._stages):
            operands = self._operands.of(layer, views[layer])
            one.forward(operands, sweep)
            if layer in self._terms:
                total += self._terms[layer].forward(operands, sweep.work)
                self._clock.lap("forward", layer)
        return total

    def _backward(self, layer: int, parameters: Arrays, part: np.ndarray, sweep: Sweep, *, add: bool) -> None:
        """Compute a layer's part of the gradient, and start to move the gradient for its inputs."""
        aside = add and layer in self._aside
        computed = self._temporary(part.size) if aside else part
        gradient = self.parameters.tensors(layer, computed)
        if layer in self._terms:
            self._terms[layer].backward(parameters, gradient, sweep.work)
        self._stages[layer].backward(parameters, gradient, sweep, add=add and not aside)
        self.parameters.add_up(layer, computed)
        if aside:
            updates.add(part, computed)

    def _outcome(self, values: np.ndarray, batch: Batch, added: float) -> Outcome:
        """Return loss and correct samples of the whole batch; `values` becomes this worker's part of the gradient.

        `added` is this worker's part of the terms.
        """
        loss, correct = 0.0, -1
        if self._loss is not None:
            flat = values.reshape(-1, values.shape[-1])
            apply = self._loss.apply if self._turned is None else partial(self._turned.apply, self._loss)
            loss, correct = apply(flat, batch.targets, batch.weights)
        if self._terms and self._group.size > 1:
            members, what = range(self._group.size), "the terms of the loss on the other partitions"
            added = float(self._group.sum(self._sum_of_terms, np.array([added]), members, what)[0])
        return Outcome(batch.samples, loss + added, correct)

    def _checked(self, batch: Batch) -> Batch:
        """Return the batch with targets as the kernels expect them; these use classes as indices unchecked."""
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

    def _temporary(self, size: int) -> np.ndarray:
        """Return memory for the gradient of a layer that cannot add it to another."""
        if self._scratch.size < size:
            self._scratch = np.empty(size, self._dtype)
        return self._scratch[:size]

    def _sweep(self, samples: int, context: Context) -> Sweep:
        """Return a pass over so many samples, with the workspace kept for that number."""
        self._group.reserve(samples, self._dtype.itemsize)
        if samples not in self._workspaces:
            if len(self._workspaces) == _WORKSPACES:
                self._workspaces.popitem(last=False)
            linear = self._loss is not None and getattr(self._layers[-1], "activation", None) == "linear"
            self._workspaces[samples] = Workspace(self._footprints, samples, self._dtype, linear=linear)
        self._workspaces.move_to_end(samples)
        return Sweep(self._workspaces[samples], context, self._clock)


def _description(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
