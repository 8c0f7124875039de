"""Layers without matrix products beside PyTorch's own operators: pooling, local contrast normalisation, dropout.

Forward and backward of one layer on the same shapes, in float32, each contestant in the memory layout of its own: ours
has the samples innermost, PyTorch's has them outermost.  L2 pooling is its ``lp_pool2d``, local contrast normalisation
is what one writes with its ``conv2d`` on the mean of the maps.

The ratio is that of elapsed times; beside it stands that of the processor's time, which agrees on a quiet machine.
Copying is the layer's inputs and outputs, each read and written once as fast as one core copies memory.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import common

BATCHES = (32, 128)
LAYERS = (
    # kind, (maps, rows, columns), size, stride: maps of 100 x 100 images under fields of 10 x 10, and pooled ones
    ("l2", (8, 91, 91), 5, 1),
    ("l2", (8, 91, 91), 3, 2),
    ("average", (8, 91, 91), 5, 1),
    ("average", (8, 91, 91), 3, 2),
    ("max", (8, 91, 91), 5, 1),
    ("max", (8, 91, 91), 3, 2),
    ("normalisation", (8, 87, 87), 5, 1),
    ("dropout", (8, 87, 87), 1, 1),
)
SPEED = 1.0


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        batch, (kind, *numbers) = int(sys.argv[2]), sys.argv[3:]
        contestant(batch, kind, *map(int, numbers))
        return
    options = common.options(__doc__)
    report = common.Report("layers", options.json)
    rows = [
        compare(report, batch, kind, shape, size, stride, 3 if options.quick else 11)
        for kind, shape, size, stride in LAYERS
        for batch in BATCHES
    ]
    header = ("layer", "batch", "ours ms", "quartiles", "PyTorch ms", "quartiles", "ratio", "CPU ratio", "copying ms")
    report.table("Forward and backward in turn, one thread (medians)", header, rows)
    report.finish()


def compare(
    report: common.Report, batch: int, kind: str, shape: tuple[int, ...], size: int, stride: int, rounds: int
) -> tuple[Any, ...]:
    """Time both in turn and return a row of the table."""
    numbers = [str(number) for number in (*shape, size, stride)]
    with ExitStack() as stack:
        ours = stack.enter_context(
            common.Contestant((sys.executable, __file__, "--contestant", str(batch), kind, *numbers))
        )
        peer = stack.enter_context(
            common.Contestant((common.peers_python(), common.PEERS / "layers.py", "1", str(batch), kind, *numbers))
        )
        steps = common.in_turn(rounds, ours=ours.do, peer=peer.do, copy=lambda: ours.do("copy"))
        moved = ours.do("bytes")["bytes"]
    seconds = {name: [one["seconds"] for one in steps[name]] for name in ("ours", "peer")}
    own, other = (common.median(values) for values in seconds.values())
    processor = [common.median([one["processor"] for one in steps[name]]) for name in ("ours", "peer")]
    what = f"{kind} of {size}x{size}, stride {stride}" if kind != "dropout" else kind
    report.at_least(f"speed of PyTorch's, {what}, batch {batch}", other / own, SPEED)
    quartiles = [common.spread([1e3 * value for value in values]) for values in seconds.values()]
    copying = moved / common.median([one["bytes"] for one in steps["copy"]])
    return (
        what,
        batch,
        *(1e3 * own, quartiles[0]),
        *(1e3 * other, quartiles[1]),
        *(f"{other / own:.2f}", f"{processor[1] / processor[0]:.2f}"),
        1e3 * copying,
    )


def contestant(batch: int, kind: str, maps: int, rows: int, columns: int, size: int, stride: int) -> None:
    """Serve forward and backward passes of our layer."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi.kernels.memory import aligned_empty
    from dbmpi.network.dropout import Dropout
    from dbmpi.network.layer import Context, Layer
    from dbmpi.network.normalisation import Normalisation
    from dbmpi.network.pooling import Pooling
    from dbmpi.partition.boxes import Box

    shape = (maps, rows, columns)
    layer: Layer
    if kind == "normalisation":
        layer = Normalisation(kind, shape, size)
    elif kind == "dropout":
        layer = Dropout(kind, shape, 0.5)
    else:
        layer = Pooling(kind, shape, kind, (size, size), stride)
    box, context = Box.whole(layer.output_shape), Context()

    def activations(features: tuple[int, ...]) -> np.ndarray:
        return aligned_empty((*features, batch))

    inputs, input_gradient = (activations(layer.input_box(box).shape) for _ in range(2))
    outputs, gradient = (activations(layer.output_shape) for _ in range(2))
    inputs[...] = np.random.default_rng(1).normal(size=inputs.shape)

    def forward_and_backward() -> None:
        gradient[...] = 1  # a layer may overwrite it
        layer.forward(box, {}, inputs, outputs, context)
        layer.backward(box, {}, inputs, outputs, gradient, {}, input_gradient, context)

    forward_and_backward()
    common.serve(
        step=common.timed(forward_and_backward),
        copy=common.copy_bandwidth(64),
        bytes=lambda: {"bytes": 2 * (inputs.nbytes + outputs.nbytes)},
    )


if __name__ == "__main__":
    main()
