"""One layer on one worker: local work, named movement, local work.

A layer is split by outputs, each worker computing those of its box from all inputs that they need, or by inputs, each
worker making of its own inputs a part of the sums behind all outputs.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

from dbmpi.index.boxes import Box
from dbmpi.network.layer import Arrays, Backward, Context, Forward, InParts, Layer, SplitByInputs
from dbmpi.replica.exchange import Exchange, Moving
from dbmpi.replica.group import Group
from dbmpi.replica.plan import LayerPlan, interior

if TYPE_CHECKING:
    import numpy as np

    from dbmpi.replica.workspace import Workspace


class Clock:
    """Where the time of a worker goes: seconds by kind and layer, from one call to the next."""

    def __init__(self, layers: int) -> None:
        self.seconds = {kind: [0.0] * layers for kind in ("forward", "backward", "exchange")}
        self._before = time.perf_counter()

    def start(self) -> None:
        """Leave out what came before."""
        self._before = time.perf_counter()

    def lap(self, kind: str, place: int) -> None:
        """Count the time since the last call."""
        now = time.perf_counter()
        self.seconds[kind][place] += now - self._before
        self._before = now


class Stage(Protocol):
    """A layer on one worker."""

    exchange: Exchange

    def forward(self, parameters: Arrays, work: Workspace, context: Context, clock: Clock) -> None:
        """Compute this worker's outputs from everybody's outputs of the layer below."""
        ...

    def backward(
        self,
        parameters: Arrays,
        parameter_gradient: Arrays,
        work: Workspace,
        context: Context,
        clock: Clock,
        *,
        add: bool,
    ) -> None:
        """Compute the gradient for this worker's parameters, and start to move that for the outputs of the layer below.

        Afterwards the parameters are needed no more.  With `add` the gradient is added to what is there.
        """
        ...

    def finish_backward(self, work: Workspace, clock: Clock) -> None:
        """Complete the gradient for this worker's outputs of the layer below."""
        ...


def stage(place: int, layer: Layer, output: Box, plan: LayerPlan, group: Group) -> Stage:
    """Return the stage of a worker that owns the outputs in a box of layer number `place`."""
    if plan.outputs is not None:
        return _ByInputs(place, layer, output, Exchange(group, plan.outputs))
    return _ByOutputs(place, layer, output, Exchange(group, plan.inputs))


class _ByOutputs:
    """Computes the outputs of a box.

    While inputs travel, what depends on this worker's own is computed; while their gradient travels, the parameters'.
    """

    def __init__(self, place: int, layer: Layer, output: Box, exchange: Exchange) -> None:
        self._place, self._layer, self._output = place, layer, output
        self.exchange = exchange
        self._inside: Box | None = None
        self._rest: tuple[Box, ...] = ()
        self._moving: list[Moving] | None = None
        if place > 0 and isinstance(layer, InParts) and not output.empty and not exchange.in_place:
            inside, rest = interior(layer, output, exchange.mine)
            if rest and not inside.empty:
                self._inside, self._rest = inside, rest

    def forward(self, parameters: Arrays, work: Workspace, context: Context, clock: Clock) -> None:
        place, moving = self._place, None
        inputs, outputs = work.inputs[place], work.outputs[place]
        task = Forward(self._output, parameters, inputs, outputs, context)
        if place > 0 and not self.exchange.in_place:
            moving = self.exchange.start_fill(work.outputs[place - 1], inputs)
            clock.lap("exchange", place)
        if self._inside is not None:
            layer = cast(InParts, self._layer)
            layer.forward_part(task, self._inside)
            clock.lap("forward", place)
        if moving is not None:
            self.exchange.finish_fill(moving, inputs)
            clock.lap("exchange", place)
        if self._inside is not None:
            for part in self._rest:
                layer.forward_part(task, part)
        elif not self._output.empty:
            self._layer.forward(task)
        clock.lap("forward", place)

    def backward(
        self,
        parameters: Arrays,
        parameter_gradient: Arrays,
        work: Workspace,
        context: Context,
        clock: Clock,
        *,
        add: bool,
    ) -> None:
        place = self._place
        below = work.input_gradient(place) if place > 0 else None
        self._moving = None
        start = partial(self._start_adding, below, work, clock)
        if not self._output.empty:
            inputs, outputs, gradient = work.inputs[place], work.outputs[place], work.gradient(place + 1)
            self._layer.backward(
                Backward(
                    *(self._output, parameters, inputs, outputs, context),
                    *(gradient, parameter_gradient, below, add, start),
                )
            )
        elif below is not None:
            below.fill(0)
        start()
        clock.lap("backward", place)

    def finish_backward(self, work: Workspace, clock: Clock) -> None:
        if self._moving is not None:
            self.exchange.finish_add(self._moving, work.gradient(self._place))
        clock.lap("exchange", self._place)

    def _start_adding(self, below: np.ndarray | None, work: Workspace, clock: Clock) -> None:
        """Let the gradient for the inputs travel; without effect where it does already, or nothing travels."""
        if below is None or self.exchange.in_place or self._moving is not None:
            return
        clock.lap("backward", self._place)
        self._moving = self.exchange.start_add(below, work.gradient(self._place))
        clock.lap("exchange", self._place)


class _ByInputs:
    """Computes for its own inputs a part of the sums behind all outputs."""

    def __init__(self, place: int, layer: Layer, output: Box, exchange: Exchange) -> None:
        self._place, self._layer, self._output = place, cast(SplitByInputs, layer), output
        self.exchange = exchange

    def forward(self, parameters: Arrays, work: Workspace, context: Context, clock: Clock) -> None:
        place = self._place
        sums, outputs = work.sums(place), work.outputs[place]
        if sums.size:
            self._layer.partial_forward(parameters, work.inputs[place], sums)
        clock.lap("forward", place)
        self.exchange.add(sums, outputs)
        clock.lap("exchange", place)
        if outputs.size:
            self._layer.finish_forward(parameters, outputs)
        clock.lap("forward", place)

    def backward(
        self,
        parameters: Arrays,
        parameter_gradient: Arrays,
        work: Workspace,
        context: Context,
        clock: Clock,
        *,
        add: bool,
    ) -> None:
        place = self._place
        inputs, outputs, below = work.inputs[place], work.outputs[place], work.input_gradient(place)
        gradient, of_sums = work.gradient(place + 1), work.sums(place)
        task = Backward(self._output, parameters, inputs, outputs, context, gradient, parameter_gradient, below, add)
        if gradient.size:
            self._layer.begin_backward(task)
        clock.lap("backward", place)
        self.exchange.fill(gradient, of_sums)
        clock.lap("exchange", place)
        if of_sums.size:
            self._layer.partial_backward(replace(task, gradient=of_sums))
        clock.lap("backward", place)

    def finish_backward(self, work: Workspace, clock: Clock) -> None:
        clock.lap("exchange", self._place)
