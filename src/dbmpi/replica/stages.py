"""One layer on one worker: local work, named movement, local work.

A layer is split by outputs, each worker computing those of its box from all inputs that they need, or by inputs, each
worker computing from its own inputs a part of the sums behind all outputs.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from dbmpi.index.boxes import Box
from dbmpi.network.layer import Arrays, Backward, Context, Forward, InParts, Layer, SplitByInputs
from dbmpi.replica.exchange import Exchange
from dbmpi.replica.group import Group
from dbmpi.replica.plan import LayerPlan, interior

if TYPE_CHECKING:
    import numpy as np

    from dbmpi.replica.workspace import Workspace


class Clock:
    """How a worker spends its time: seconds by kind and layer, from one call to the next.

    Parameters
    ----------
    layers
        Number of layers.
    """

    def __init__(self, layers: int) -> None:
        self.seconds = {kind: [0.0] * layers for kind in ("forward", "backward", "exchange")}
        self._before = time.perf_counter()

    def start(self) -> None:
        """Do not count the time since the last call."""
        self._before = time.perf_counter()

    def lap(self, kind: str, number: int) -> None:
        """Count the time since the last call as `kind` of layer `number`."""
        now = time.perf_counter()
        self.seconds[kind][number] += now - self._before
        self._before = now


class Sweep(NamedTuple):
    """One pass over a batch on one worker, forward and perhaps backward."""

    work: Workspace
    context: Context
    clock: Clock


class Stage(ABC):
    """A layer on one worker.

    Parameters
    ----------
    number
        Of the layer.
    layer
        The layer.
    output
        The outputs that this worker owns.
    exchange
        What moves between the workers.
    """

    def __init__(self, number: int, layer: Layer, output: Box, exchange: Exchange) -> None:
        self.exchange = exchange
        self._number, self._layer, self._output = number, layer, output

    @abstractmethod
    def forward(self, parameters: Arrays, sweep: Sweep) -> None:
        """Compute this worker's outputs from every worker's outputs of the layer below.

        `parameters` are those of the layer on this worker, and `sweep` has the arrays.
        """

    @abstractmethod
    def backward(self, parameters: Arrays, gradient: Arrays, sweep: Sweep, *, add: bool) -> None:
        """Compute the gradient for this worker's parameters, and start to move that for the outputs of the layer below.

        Afterwards the parameters are needed no more.

        Parameters
        ----------
        parameters
            Of the layer on this worker.
        gradient
            Arrays for their gradient.
        sweep
            After its forward pass, and the backward passes of the layers above.
        add
            Add to `gradient` instead of overwriting it.
        """

    @abstractmethod
    def finish_backward(self, sweep: Sweep) -> None:
        """Complete the gradient for this worker's outputs of the layer below, in the arrays of `sweep`."""


def stage(number: int, layer: Layer, output: Box, plan: LayerPlan, group: Group) -> Stage:
    """Return the stage of a worker.

    Parameters
    ----------
    number
        Of the layer.
    layer
        The layer.
    output
        The outputs that this worker owns.
    plan
        What moves for the layer.
    group
        The workers.
    """
    if plan.outputs is not None:
        return _ByInputs(number, layer, output, Exchange(group, plan.outputs))
    return _ByOutputs(number, layer, output, Exchange(group, plan.inputs))


class _ByOutputs(Stage):
    """Computes the outputs of a box.

    While inputs travel, the outputs that depend on this worker's own are computed; while the gradient for the inputs
    travels, that for the parameters.
    """

    def __init__(self, number: int, layer: Layer, output: Box, exchange: Exchange) -> None:
        super().__init__(number, layer, output, exchange)
        self._moves = number > 0 and not exchange.in_place
        self._adding = False
        self._inside: Box | None = None
        self._rest: tuple[Box, ...] = ()
        if self._moves and isinstance(layer, InParts) and not output.empty:
            inside, rest = interior(layer, output, exchange.owned)
            if rest and not inside.empty:
                self._inside, self._rest = inside, rest

    def forward(self, parameters: Arrays, sweep: Sweep) -> None:
        number, (work, context, clock) = self._number, sweep
        inputs = work.inputs[number]
        task = Forward(self._output, parameters, work.operands(number), work.outputs[number], context)
        if self._moves:
            self.exchange.fill.start(work.outputs[number - 1], inputs)
            clock.lap("exchange", number)
        if self._inside is not None:
            work.round_inputs(number)  # those that have not arrived count when they are rounded again
            cast(InParts, self._layer).forward_part(task, self._inside)
            clock.lap("forward", number)
        if self._moves:
            self.exchange.fill.finish(inputs)
            clock.lap("exchange", number)
        work.round_inputs(number)
        for part in self._rest:
            cast(InParts, self._layer).forward_part(task, part)
        if self._inside is None and not self._output.empty:
            self._layer.forward(task)
        clock.lap("forward", number)

    def backward(self, parameters: Arrays, gradient: Arrays, sweep: Sweep, *, add: bool) -> None:
        number, (work, context, clock) = self._number, sweep
        below = work.input_gradient(number) if number > 0 else None
        start = partial(self._start_adding, below, sweep)
        self._adding = False
        if not self._output.empty:
            inputs, outputs, of_outputs = work.operands(number), work.outputs[number], work.output_gradient(number)
            task = Backward(
                *(self._output, parameters, inputs, outputs, context),
                gradient=of_outputs,
                parameter_gradient=gradient,
                input_gradient=below,
                add=add,
                inputs_done=start,
                rounded_gradient=work.rounded_gradient(number),
            )
            self._layer.backward(task)
        elif below is not None:
            below.fill(0)
        start()
        clock.lap("backward", number)

    def finish_backward(self, sweep: Sweep) -> None:
        if self._adding:
            self.exchange.add.finish(sweep.work.output_gradient(self._number - 1))
        sweep.clock.lap("exchange", self._number)

    def _start_adding(self, below: np.ndarray | None, sweep: Sweep) -> None:
        """Start to move the gradient for the inputs, unless that has been done or nothing moves."""
        if below is None or not self._moves or self._adding:
            return
        sweep.clock.lap("backward", self._number)
        self.exchange.add.start(below, sweep.work.output_gradient(self._number - 1))
        self._adding = True
        sweep.clock.lap("exchange", self._number)


class _ByInputs(Stage):
    """Computes from its own inputs a part of the sums behind all outputs."""

    def forward(self, parameters: Arrays, sweep: Sweep) -> None:
        number, (work, _, clock), layer = self._number, sweep, cast(SplitByInputs, self._layer)
        sums, outputs = work.sums(number), work.outputs[number]
        if sums.size:
            work.round_inputs(number)
            layer.partial_forward(parameters, work.operands(number), sums)
        clock.lap("forward", number)
        self.exchange.add(sums, outputs)
        clock.lap("exchange", number)
        if outputs.size:
            layer.finish_forward(parameters, outputs)
        clock.lap("forward", number)

    def backward(self, parameters: Arrays, gradient: Arrays, sweep: Sweep, *, add: bool) -> None:
        number, (work, context, clock), layer = self._number, sweep, cast(SplitByInputs, self._layer)
        inputs, outputs, below = work.operands(number), work.outputs[number], work.input_gradient(number)
        of_outputs, of_sums = work.output_gradient(number), work.sums(number)
        task = Backward(
            *(self._output, parameters, inputs, outputs, context),
            gradient=of_outputs,
            parameter_gradient=gradient,
            input_gradient=below,
            add=add,
            rounded_gradient=work.rounded_gradient(number),
        )
        if of_outputs.size:
            layer.begin_backward(task)
        clock.lap("backward", number)
        self.exchange.fill(of_outputs, of_sums)
        clock.lap("exchange", number)
        if of_sums.size:
            layer.partial_backward(replace(task, gradient=of_sums))
        clock.lap("backward", number)

    def finish_backward(self, sweep: Sweep) -> None:
        sweep.clock.lap("exchange", self._number)
