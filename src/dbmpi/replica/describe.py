"""A placement as a table: how layers are cut, what moves, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dbmpi.index.boxes import Box
from dbmpi.replica.placement import Placement, Split, can_split_by_inputs, values_moved
from dbmpi.replica.plan import LayerPlan, plan_exchanges

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer


def describe(layers: Sequence[Layer], placement: Placement, samples: int = 1, itemsize: int = 4) -> str:
    """Return a table of how every layer is cut, what moves, and why.

    Parameters
    ----------
    layers, placement
        As for `plan_exchanges`.
    samples, itemsize
        Samples of a batch and bytes of a value.

    Returns
    -------
    str
        A line a layer: shape of the outputs, into how many parts each axis is cut, shape of the largest box and its
        size against a fair share, what is exchanged and how, KiB that the busiest worker receives and that all receive
        together in a forward pass (a backward pass moves as much), and the reason.
    """
    head = ("layer", "outputs", "cut", "largest box", "load", "split by", "exchange", "KiB worst", "KiB all", "because")
    rows: list[tuple[str, ...]] = [head]
    for number, (layer, plan) in enumerate(zip(layers, plan_exchanges(layers, placement), strict=True)):
        owned = placement.boxes[number]
        largest = max(owned, key=lambda box: box.size)
        exchange = plan.outputs or plan.inputs
        worst = max(exchange.received(worker) for worker in range(placement.partitions)) if plan.values else 0
        if plan.outputs is not None:
            kind = "reduction" if exchange.kind == "gather" else f"{exchange.kind}, added"
            # In reverse, a worker receives a part of its own outputs from each other one.
            parts = sum(not need.empty for need in exchange.needed)
            worst = max(box.size * (parts - (not need.empty)) for box, need in zip(owned, exchange.needed, strict=True))
        else:
            kind = exchange.kind
        rows.append(
            (
                layer.name,
                _by(layer.output_shape),
                _cut(owned),
                _by(largest.shape),
                f"{largest.size * placement.partitions / Box.whole(layer.output_shape).size:.2f}",
                plan.split,
                kind,
                f"{worst * samples * itemsize / 1024:.1f}",
                f"{plan.values * samples * itemsize / 1024:.1f}",
                _reason(layers, placement, number, plan),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def summarise(layers: Sequence[Layer], placement: Placement, samples: int, itemsize: int = 4) -> str:
    """Return one line: into how many parts each layer is cut, and how much moves in a step.

    Parameters
    ----------
    layers, placement
        As for `plan_exchanges`.
    samples, itemsize
        Samples of a batch and bytes of a value.
    """
    plans = plan_exchanges(layers, placement)
    cuts = (
        f"{layer.name} {_cut(owned)}{' by inputs' if split == 'inputs' else ''}"
        for layer, owned, split in zip(layers, placement.boxes, placement.splits, strict=True)
    )
    moved = 2 * sum(plan.values for plan in plans) * samples * itemsize
    return f"{placement.partitions} partitions: {', '.join(cuts)}; {moved / 1024:,.1f} KiB between them a step"


def _reason(layers: Sequence[Layer], placement: Placement, number: int, plan: LayerPlan) -> str:
    """Return why values move for a layer as they do."""
    layer, owned = layers[number], placement.boxes[number]
    if placement.partitions == 1:
        return "one worker computes all"
    if number == 0:
        return "every worker reads the inputs that it needs"
    below = placement.boxes[number - 1]
    if can_split_by_inputs(layer):
        other: Split = "inputs" if plan.split == "outputs" else "outputs"
        moved = values_moved(layer, below, owned, other)
        return f"{plan.values} values a sample move; split by {other}, {moved} would"
    if plan.inputs.kind == "none":
        return "every worker owns the inputs that it needs"
    if plan.inputs.kind == "gather":
        return "every output needs all inputs"
    halo = max(len(plan.inputs.forward(worker).receives) for worker in range(min(placement.partitions, 256)))
    return f"fields reach into the boxes of up to {halo} other{'s' if halo > 1 else ''}"


def _cut(owned: Sequence[Box]) -> str:
    """Return into how many parts each axis is cut."""
    boxes = [box for box in owned if not box.empty]
    parts = [len(set(axis)) for axis in zip(*(zip(b.starts, b.stops, strict=True) for b in boxes), strict=True)]
    even = _by(parts) if math.prod(parts) == len(boxes) else f"{len(boxes)} boxes, bands differ"
    return even if len(boxes) == len(owned) else f"{even} ({len(owned) - len(boxes)} idle)"


def _by(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))
