"""Every kind of layer and loss beside PyTorch's own operators, and the paper's speech network.

Forward and backward on the same shapes, in float32 with one thread, each contestant in the memory layout of its own:
ours has the samples innermost; PyTorch's has them outermost, and for convolutions the maps innermost, which its oneDNN
likes best.  Where PyTorch has no such operator, it is what one writes with it: `unfold` and `bmm` for filters that are
not tied, `lp_pool2d` for L2 pooling, `conv2d` on the mean of the maps for local contrast normalisation, a target for
each output for one-vs-all classes.  The reconstruction is the objective of one stage that learns without targets
(filters, a decoder, L2 pooling with a penalty), with the gradients of its parameters.  Local layers and the speech
network are measured at more length, and with targets of their own, in local_layer.py and speech_step.py.

The ratio is that of elapsed times; beside it stands that of the processor's time, which agrees on a quiet machine.
Copying is inputs, outputs and parameters, each read and written once as fast as one core copies memory.  For what
consists of products the shares of the multiply-add peak are given, by the processor's time.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import common
import speech_step
from one_layer import Case

BATCHES = (32, 128)
CASES = (
    # Layers of the speech network.
    *(Case("dense", (2560,), maps=2560, activation=one) for one in ("linear", "relu", "tanh", "sigmoid")),
    Case("dense", (2560,), maps=8192),
    # A part of the paper's images, as PyTorch takes seconds for whole ones.
    Case("local", (3, 40, 40), size=10, maps=8),
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
    Case("softmax", (8192,)),
    Case("one-vs-all", (21000,)),
    Case("logistic", (8192,)),
    Case("squared", (8192,)),
    Case("local reconstruction", (3, 40, 40), size=10, maps=8),
    Case("convolution reconstruction", (3, 100, 100), size=5, maps=16),
)
SPEED = 1.0


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("layers", options.json)
    rounds = 3 if options.quick else 11
    rows = [compare(report, str(case), batch, case.contestants(batch), rounds) for case in CASES for batch in BATCHES]
    network = "a step of the speech network"
    rows += [compare(report, network, batch, speech_step.contestants(1, batch), rounds) for batch in BATCHES]
    header = ("layer", "batch", "ours ms", "quartiles", "PyTorch ms", "quartiles", "ratio", "CPU ratio")
    report.table(
        "Forward and backward in turn, one thread (medians)", (*header, "copying ms", "of peak", "PyTorch"), rows
    )
    report.finish()


def compare(
    report: common.Report, what: str, batch: int, contestants: Iterable[common.Contestant], rounds: int
) -> tuple[Any, ...]:
    """Time both in turn and return a row of the table."""
    with ExitStack() as stack:
        ours, peer = (stack.enter_context(one) for one in contestants)
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
    report.at_least(f"speed of PyTorch's, {what}, batch {batch}", other / own, SPEED)
    quartiles = [common.spread([1e3 * value for value in values]) for values in seconds.values()]
    copying = work["bytes"] / common.median([one["bytes"] for one in steps["copy"]])
    peak = common.median([one["flops"] for one in steps["peak"]])
    shares = [f"{100 * work['flops'] / each / peak:.0f} %" if work["flops"] else "" for each in processor]
    return (
        *(what, batch),
        *(1e3 * own, quartiles[0]),
        *(1e3 * other, quartiles[1]),
        *(f"{other / own:.2f}", f"{processor[1] / processor[0]:.2f}"),
        1e3 * copying,
        *shares,
    )


if __name__ == "__main__":
    main()
