"""The locally connected layer of the paper's image networks beside PyTorch's unfold and batched matrix products.

A field of 10 x 10 in images of 100 x 100 x 3 with filters of its own at each of the 91 x 91 places: PyTorch has no such
layer, and what one writes with it copies every field first.  A step is the forward and the backward pass with the
gradients for weights and inputs (and, in ours, the biases), in float32 with one thread.  Both take a step in turn, and
the multiply-add peak of the core is measured in the same rounds.

The ratio is that of elapsed times; beside it stands that of the processor's time, and the share of the peak is by the
processor's time, too.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import common
from one_layer import Case

BATCHES = (32, 128)
CASES = [Case("local", (3, 100, 100), size=10, maps=maps) for maps in (8, 16)]
SPEED = 50
PEAK = 0.45


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("local_layer", options.json)
    rows = [
        compare(report, case, batch, (1 if options.quick else 3) if batch > 32 else (3 if options.quick else 5))
        for case in CASES
        for batch in BATCHES
    ]
    header = ("maps", "batch", "ours ms", "quartiles", "PyTorch ms", "quartiles", "ratio", "CPU ratio")
    peaks = ("forward", "backward", "GFLOP/s", "of peak", "PyTorch")
    report.table("Forward and backward in turn, one thread (medians)", (*header, *peaks), rows)
    report.finish()


def compare(report: common.Report, case: Case, batch: int, rounds: int) -> tuple[Any, ...]:
    """Time both in turn and return a row of the table."""
    with ExitStack() as stack:
        ours, peer = (stack.enter_context(one) for one in case.contestants(batch))

        def step() -> dict[str, dict[str, float]]:
            return {name: ours.do(name) for name in ("forward", "backward")}

        for _ in range(10):  # steps that do not count; PyTorch's takes as long as a hundred
            step()
        # Several of ours in every round, as they are short.
        found = common.in_turn(
            rounds,
            together=False,
            ours=lambda: [step() for _ in range(9)],
            peer=peer.do,
            peak=lambda: ours.do("peak"),
        )
        flops = ours.do("work")["flops"]
    peak = common.median([one["flops"] for one in found["peak"]])
    own = [one for several in found["ours"] for one in several]

    def times(kind: str, *passes: str) -> list[float]:
        return [sum(one[name][kind] for name in passes) for one in own]

    steps, others = times("seconds", "forward", "backward"), [one["seconds"] for one in found["peer"]]
    other_processor = common.median([one["processor"] for one in found["peer"]])
    processor = {
        passes: common.median(times("processor", *passes))
        for passes in (("forward", "backward"), ("forward",), ("backward",))
    }
    whole, forward, backward = (
        part * flops / seconds for part, seconds in zip((1, 1 / 3, 2 / 3), processor.values(), strict=True)
    )
    ratio = common.median(others) / common.median(steps)
    what = f"{case.maps} maps, batch {batch}"
    report.at_least(f"speed of PyTorch's, {what}", ratio, SPEED)
    report.at_least(f"share of the multiply-add peak, {what}", whole / peak, PEAK)
    return (
        *(case.maps, batch),
        *(1e3 * common.median(steps), common.spread([1e3 * value for value in steps])),
        *(1e3 * common.median(others), common.spread([1e3 * value for value in others])),
        *(f"{ratio:.0f}", f"{other_processor * whole / flops:.0f}"),
        *(f"{100 * forward / peak:.0f} %", f"{100 * backward / peak:.0f} %"),
        *(whole / 1e9, f"{100 * whole / peak:.0f} %", f"{100 * flops / other_processor / peak:.1f} %"),
    )


if __name__ == "__main__":
    main()
