"""Products of bfloat16 matrices alone, beside oneDNN's in PyTorch (``linear``).

The shapes are those of the dense layers of all networks in ``examples/``, at their batches, and each kind of product is
measured by itself: forward, by the transposed weights, and the gradient of the weights.  Ours has float32 sums as its
result; PyTorch rounds its result to bfloat16.  The peak of what multiplies (AMX tiles, or vectors of AVX512-BF16),
without any memory, is measured in the same rounds.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import common

INPUT_SHAPES = {
    "digits": (64,),
    "fashion-mnist": (784,),
    "fashion-mnist-local": (1, 28, 28),
    "images-8": (3, 100, 100),
    "images-16": (3, 100, 100),
    "images-36": (3, 100, 100),
    "speech": (440,),
}
"""Shape of a sample of each example with dense layers."""
KINDS = {"forward": "forward", "inputs": "by the transposed weights", "weights": "gradient of the weights"}
"""What each kind of product is called in a table."""
PEER = 1.0
"""Times PyTorch's speed that is aimed at, for each shape and kind."""


class Shape(NamedTuple):
    """A dense layer and a batch."""

    units: int
    inputs: int
    batch: int


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(Shape(*map(int, sys.argv[2:5])))
        return
    options = common.options(__doc__)
    report = common.Report("products", options.json)
    rows = []
    for shape, networks in sorted(shapes().items(), key=lambda one: one[0].units * one[0].inputs):
        for threads in (1, 2):
            rows += compare(report, shape, networks, threads, 3 if options.quick else 9)
    header = ("networks", "units x inputs", "batch", "threads", "product")
    results = ("ours ms", "PyTorch ms", "GFLOP/s", "of peak", "ratio", "CPU s")
    report.table("Products in turn (medians)", (*header, *results), rows)
    report.finish()


def shapes() -> dict[Shape, str]:
    """Return the dense layers of the examples, and the names of the networks that have them."""
    from dbmpi import config
    from dbmpi.network.dense import DenseLayer
    from dbmpi.network.description import Network

    found: dict[Shape, str] = {}
    for name, input_shape in INPUT_SHAPES.items():
        run = config.load(Path(__file__).parent.parent / "examples" / f"{name}.toml")
        for layer in Network(run.network, input_shape, 1).layers:
            if isinstance(layer, DenseLayer):
                shape = Shape(layer.section.units, layer.inputs, run.optimizer.batch_size)
                found[shape] = f"{found[shape]}, {name}" if shape in found else name
    return found


def compare(report: common.Report, shape: Shape, networks: str, threads: int, rounds: int) -> list[tuple[Any, ...]]:
    """Time all kinds of product of a shape in turn; return their rows of the table."""
    arguments = [str(size) for size in shape]
    rows = []
    with ExitStack() as stack:
        ours, peer = (
            stack.enter_context(common.Contestant(command, threads=threads))
            for command in (
                (sys.executable, __file__, "--contestant", *arguments),
                (common.peers_python(), common.PEERS / "products.py", str(threads), *arguments),
            )
        )
        for kind, name in KINDS.items():
            found = common.in_turn(
                rounds,
                together=threads > 1,
                ours=lambda kind=kind: ours.do(kind),  # type: ignore[misc]
                peer=lambda kind=kind: peer.do(kind),  # type: ignore[misc]
                peak=lambda: ours.do("peak"),
            )
            (own, other), (own_processor, other_processor) = (
                [common.median([step[clock] for step in found[one]]) for one in ("ours", "peer")]
                for clock in ("seconds", "processor")
            )
            flops = 2 * shape.units * shape.inputs * shape.batch
            share = flops / own / threads / common.median([one["flops"] for one in found["peak"]])
            size = f"{shape.units} x {shape.inputs}"
            described = (networks, size, shape.batch, threads, name)
            ratios = (f"{other / own:.2f}", f"{other_processor / own_processor:.2f}")
            rows.append((*described, 1e3 * own, 1e3 * other, flops / own / 1e9, f"{100 * share:.0f} %", *ratios))
            plural = f"{threads} thread{'s' if threads > 1 else ''}"
            report.at_least(f"PyTorch's speed, {size}, batch {shape.batch}, {name}, {plural}", other / own, PEER)
    return rows


def contestant(shape: Shape) -> None:
    """Serve products of ours."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi.kernels import bfloat16
    from dbmpi.kernels.memory import aligned_empty

    units, inputs, batch = shape
    random = np.random.default_rng(1)
    made = []
    for size in ((units, inputs), (inputs, batch), (units, batch)):
        made.append(aligned_empty(size, bfloat16.BFLOAT16))
        bfloat16.rounded(random.normal(size=size).astype(np.float32), made[-1])
    weights, activations, gradient = made
    outputs, input_gradient, weight_gradient = (
        aligned_empty(size) for size in ((units, batch), (inputs, batch), (units, inputs))
    )
    common.serve(
        forward=common.repeated(lambda: bfloat16.product(weights, activations, outputs)),
        inputs=common.repeated(lambda: bfloat16.product(weights.T, gradient, input_gradient)),
        weights=common.repeated(lambda: bfloat16.product(gradient, activations.T, weight_gradient)),
        peak=common.bfloat16_peak(),
    )


if __name__ == "__main__":
    main()
