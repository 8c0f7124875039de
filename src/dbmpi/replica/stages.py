"""One layer on one worker: local work, named movement, local work.

A layer is split by outputs, each worker computing those of its box from all inputs that they need, or by inputs, each
worker making of its own inputs a part of the sums behind all outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, cast

from dbmpi.index.boxes import Box
from dbmpi.network.layer import Arrays, Context, InParts, Layer, SplitByInputs
from dbmpi.replica.exchange import Exchange, Moving
from dbmpi.replica.group import Group
from dbmpi.replica.plan import LayerPlan, interior

if TYPE_CHECKING:
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
        complete: Callable[[], None],
    ) -> None:
        """Compute the gradients for this worker's parameters and for its outputs of the layer below.

        `complete` is called when the parameters' gradient is there and they themselves are needed no more.
        """
        ...


def stage(place: int, layer: Layer, output: Box, plan: LayerPlan, group: Group) -> Stage:
    """Return the stage of a worker that owns the outputs in a box of layer number `place`."""
    if plan.outputs is not None:
        return _ByInputs(place, layer, Exchange(group, plan.outputs))
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
        if place > 0 and isinstance(layer, InParts) and not output.empty and not exchange.in_place:
            inside, rest = interior(layer, output, exchange.mine)
            if rest and not inside.empty:
                self._inside, self._rest = inside, rest

    def forward(self, parameters: Arrays, work: Workspace, context: Context, clock: Clock) -> None:
        place, moving = self._place, None
        inputs, outputs = work.inputs[place], work.outputs[place]
        moves = place > 0 and not self.exchange.in_place
        if moves:
            moving = self.exchange.start_fill(work.outputs[place - 1], inputs)
            clock.lap("exchange", place)
        if self._inside is not None:
            layer = cast(InParts, self._layer)
            layer.forward_part(self._output, self._inside, parameters, inputs, outputs, context)
            clock.lap("forward", place)
        if moving is not None:
            self.exchange.finish_fill(moving, inputs)
            clock.lap("exchange", place)
        if self._inside is not None:
            for part in self._rest:
                layer.forward_part(self._output, part, parameters, inputs, outputs, context)
        elif not self._output.empty:
            self._layer.forward(self._output, parameters, inputs, outputs, context)
        clock.lap("forward", place)

    def backward(
        self,
        parameters: Arrays,
        parameter_gradient: Arrays,
        work: Workspace,
        context: Context,
        clock: Clock,
        complete: Callable[[], None],
    ) -> None:
        place = self._place
        below = work.input_gradient(place) if place > 0 else None
        moves = below is not None and not self.exchange.in_place
        moving: list[Moving] | None = None

        def start() -> None:
            nonlocal moving
            if moves and moving is None:
                assert below is not None
                clock.lap("backward", place)
                moving = self.exchange.start_add(below, work.gradient(place))
                clock.lap("exchange", place)

        if not self._output.empty:
            self._layer.backward(
                self._output,
                parameters,
                work.inputs[place],
                work.outputs[place],
                work.gradient(place + 1),
                parameter_gradient,
                below,
                replace(context, inputs_done=start),
            )
        elif below is not None:
            below.fill(0)
        start()
        clock.lap("backward", place)
        complete()
        if moving is not None:
            self.exchange.finish_add(moving, work.gradient(place))
        clock.lap("exchange", place)


class _ByInputs:
    def __init__(self, place: int, layer: Layer, exchange: Exchange) -> None:
        self._place, self._layer = place, cast(SplitByInputs, layer)
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
        complete: Callable[[], None],
    ) -> None:
        place = self._place
        gradient, of_sums = work.gradient(place + 1), work.sums(place)
        if gradient.size:
            self._layer.begin_backward(work.outputs[place], gradient, parameter_gradient, context)
        clock.lap("backward", place)
        self.exchange.fill(gradient, of_sums)
        clock.lap("exchange", place)
        if of_sums.size:
            below = work.input_gradient(place)
            self._layer.partial_backward(parameters, work.inputs[place], of_sums, parameter_gradient, below, context)
        clock.lap("backward", place)
        complete()
        clock.lap("exchange", place)
