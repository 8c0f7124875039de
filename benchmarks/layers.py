"""Layers beside PyTorch's own operators: convolution, pooling, local contrast normalisation, dropout.

Forward and backward of one layer on the same shapes, in float32 with one thread, each contestant in the memory layout
of its own: ours has the samples innermost; PyTorch's has them outermost, and for convolutions the maps innermost,
which its oneDNN likes best.  L2 pooling is its ``lp_pool2d``, local contrast normalisation is what one writes with its
``conv2d`` on the mean of the maps.  Locally connected layers are in local_layer.py, dense ones in speech_step.py.

The ratio is that of elapsed times; beside it stands that of the processor's time, which agrees on a quiet machine.
Copying is the layer's inputs and outputs, each read and written once as fast as one core copies memory.  For
convolutions the shares of the multiply-add peak are given, by the processor's time.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import common
from one_layer import Case

BATCHES = (32, 128)
CASES = (
    # Images and deeper maps under fields of 5 x 5.
    Case("convolution", (3, 100, 100), size=5, maps=16),
    Case("convolution", (16, 48, 48), size=5, maps=32),
    # Maps of 100 x 100 images under fields of 10 x 10, and pooled ones.
    Case("l2", (8, 91, 91), size=5),
    Case("l2", (8, 91, 91), size=3, stride=2),
    Case("average", (8, 91, 91), size=5),
    Case("average", (8, 91, 91), size=3, stride=2),
    Case("max", (8, 91, 91), size=5),
    Case("max", (8, 91, 91), size=3, stride=2),
    Case("normalisation", (8, 87, 87), size=5),
    Case("dropout", (8, 87, 87)),
)
SPEED = 1.0


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("layers", options.json)
    rows = [compare(report, case, batch, 3 if options.quick else 11) for case in CASES for batch in BATCHES]
    header = ("layer", "batch", "ours ms", "quartiles", "PyTorch ms", "quartiles", "ratio", "CPU ratio")
    report.table(
        "Forward and backward in turn, one thread (medians)", (*header, "copying ms", "of peak", "PyTorch"), rows
    )
    report.finish()


def compare(report: common.Report, case: Case, batch: int, rounds: int) -> tuple[Any, ...]:
    """Time both in turn and return a row of the table."""
    with ExitStack() as stack:
        ours, peer = (stack.enter_context(one) for one in case.contestants(batch))
        steps = common.in_turn(
            rounds,
            together=False,
            ours=ours.do,
            peer=peer.do,
            copy=lambda: ours.do("copy"),
            peak=lambda: ours.do("peak"),
        )
        work = ours.do("work")
    seconds = {name: [one["seconds"] for one in steps[name]] for name in ("ours", "peer")}
    own, other = (common.median(values) for values in seconds.values())
    processor = [common.median([one["processor"] for one in steps[name]]) for name in ("ours", "peer")]
    report.at_least(f"speed of PyTorch's, {case}, batch {batch}", other / own, SPEED)
    quartiles = [common.spread([1e3 * value for value in values]) for values in seconds.values()]
    copying = work["bytes"] / common.median([one["bytes"] for one in steps["copy"]])
    peak = common.median([one["flops"] for one in steps["peak"]])
    shares = [f"{100 * work['flops'] / each / peak:.0f} %" if case.maps else "" for each in processor]
    return (
        *(str(case), batch),
        *(1e3 * own, quartiles[0]),
        *(1e3 * other, quartiles[1]),
        *(f"{other / own:.2f}", f"{processor[1] / processor[0]:.2f}"),
        1e3 * copying,
        *shares,
    )


if __name__ == "__main__":
    main()
