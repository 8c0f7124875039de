"""The work of one replica that is cut over some partitions: operations, values that move, messages, memory.

All numbers come from the layers and from the plan of exchanges that a run would use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbmpi.config import NetworkSection, OwnLayer
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.plan.constants import FIRST, WEIGHTED
from dbmpi.plan.rates import between_both
from dbmpi.replica.plan import ExchangePlan, LayerPlan, plan_exchanges
from dbmpi.replica.tensors import tensor_boxes

if TYPE_CHECKING:
    from dbmpi.network.description import Network
    from dbmpi.network.layer import Layer
    from dbmpi.plan.constants import MachineConstants
    from dbmpi.replica.placement import Placement

_SAMPLED = 64
"""Workers whose messages are counted, at most."""
_BUFFERS = 4
"""Buffers for gradients of activations, each for the largest layer."""


@dataclass(frozen=True)
class LayerWork:
    """One layer in a step, of the worker that has most of it."""

    name: str
    kind: str
    """The type of the layer in a configuration, and whether it is the first one."""
    operations: int
    """Floating-point operations for a sample, forward and backward."""
    size: float
    """What its speed depends on: weights of one of its products, or operations where it has no weights."""
    values: int
    """Values of a sample that a worker receives forward; backward, it sends as many back."""
    peers: int
    """Workers that it exchanges a message with, in each direction."""
    gathers: bool
    """Whether all workers need everything, so that one collective moves the values."""

    @property
    def moves(self) -> bool:
        """Whether anything moves between workers."""
        return self.values > 0


@dataclass(frozen=True)
class ReplicaWork:
    """A step of one replica."""

    partitions: int
    layers: tuple[LayerWork, ...]
    inputs: int
    """Numbers of a sample."""
    outputs: int
    """Of the last layer, which the loss takes."""
    turned: int
    """Outputs of the last layer that change for the loss from a cut by units to one by samples; 0 where none do."""
    parameters: int
    """Parameters of the worker that has most."""
    activations: int
    """Numbers for a sample that a worker keeps, with buffers for gradients."""


def work_of(network: Network, placement: Placement) -> ReplicaWork:
    """Count the work of a replica.

    Parameters
    ----------
    network
        Its layers.
    placement
        How it is cut.
    """
    layers, workers = network.layers, placement.partitions
    plans = plan_exchanges(layers, placement)
    counted = [
        _layer(layer, placement, number, plan) for number, (layer, plan) in enumerate(zip(layers, plans, strict=True))
    ]
    # As `replica.workspace` has it: inputs of all layers but the first, the last one's outputs, and buffers.
    activations = 0
    for worker in _some(workers):
        needed = [plan.inputs.needed[worker].size for plan in plans[1:]]
        owned = placement.boxes[-1][worker].size
        summed = [0 if plan.outputs is None else plan.outputs.needed[worker].size for plan in plans]
        largest = max([*needed, *summed, *(boxes[worker].size for boxes in placement.boxes)])
        activations = max(activations, sum(needed) + owned + _BUFFERS * largest)
    parameters = max(
        sum(box.size for box in tensor_boxes(layers, placement, worker).values()) for worker in _some(workers)
    )
    return ReplicaWork(
        workers,
        tuple(counted),
        math.prod(network.input_shape),
        *(0 if network.loss is None else network.outputs,) * 2,
        parameters,
        activations,
    )


def check_layers(section: NetworkSection) -> None:
    """Raise UserError where a `section` describes layers whose speed nothing says: those of the user's own."""
    for name, layer in zip(section.layer_names, section.layers, strict=True):
        if isinstance(layer, OwnLayer):
            raise UserError(
                f"layer {name!r} is one of your own, and no constants of a machine say how fast it is: measure the "
                "network with dbmpi bench network instead"
            )


def size_of(layer: Layer, output: Box) -> float:
    """Return what the speed of a layer depends on, beside the samples of a batch.

    For a layer with weights that is the size of one product, outputs at one position times their inputs; otherwise the
    operations for a sample.

    Parameters
    ----------
    layer
        The layer.
    output
        The box of its outputs that is computed.
    """
    if layer.tensors and hasattr(layer, "inputs"):
        return float(layer.inputs * output.shape[0])
    return float(layer.flops(output, 1))


def compute_seconds(layer: LayerWork, samples: int, constants: MachineConstants) -> float:
    """Return the time of one thread for a layer's forward and backward pass.

    Parameters
    ----------
    layer
        The layer.
    samples
        Of a batch.
    constants
        Of the machine.
    """
    if not layer.operations:
        return 0.0
    rate = between_both(constants.rates[layer.kind], layer.size, samples)
    return layer.operations * samples / rate


def _layer(layer: Layer, placement: Placement, number: int, plan: LayerPlan) -> LayerWork:
    boxes = placement.boxes[number]
    first = number == 0
    if plan.outputs is None:
        found = [(layer.flops(box, 1, input_gradient=not first), box) for box in _shapes(boxes)]
        operations, largest = max(found, key=lambda one: one[0])
        size = size_of(layer, largest)
    else:  # split by inputs: a share of all outputs
        shares, whole = [box.size for box in placement.boxes[number - 1]], Box.whole(layer.output_shape)
        share = max(shares) / sum(shares)
        operations = math.ceil(layer.flops(whole, 1, input_gradient=not first) * share)
        size = size_of(layer, whole) * share
    exchange = plan.outputs or plan.inputs
    values, peers = _moved(exchange)
    kind = str(getattr(getattr(layer, "section", None), "type", "own"))
    kind += FIRST if first and kind in WEIGHTED else ""
    gathers = exchange.kind == "gather" and exchange.in_order
    return LayerWork(layer.name, kind, operations, size, values, peers, gathers)


def _moved(exchange: ExchangePlan) -> tuple[int, int]:
    """Return the most values that a worker receives or sends, and with how many others it exchanges messages."""
    if exchange.kind == "none":
        return 0, 0
    values = peers = 0
    for worker in _some(len(exchange.owned)):
        way = exchange.forward(worker)
        sent = sum(move.box.size for move in way.sends)
        values = max(values, sent, exchange.received(worker))
        peers = max(peers, len(way.receives), len(way.sends))
    return values, peers


def _some(workers: int) -> list[int]:
    """Return workers to look at: all of a few, else some of them, spread evenly."""
    return sorted(
        {number * workers // _SAMPLED for number in range(_SAMPLED)} if workers > _SAMPLED else range(workers)
    )


def _shapes(boxes: Sequence[Box]) -> list[Box]:
    """Return boxes that are not empty, one of each shape."""
    return list({box.shape: box for box in boxes if not box.empty}.values())
