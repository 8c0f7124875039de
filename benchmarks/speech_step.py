"""One training step of the paper's speech network, beside PyTorch's.

The network is that of the paper's section 5: 440 inputs, four layers of 2560 sigmoid units, a softmax over 8192 states;
41,777,152 parameters.  A step is the loss, the gradient and the update by plain SGD of the flat parameter vector, in
float32.  Both contestants take a step in turn; the multiply-add peak of the core is measured in the same rounds.

The ratio to PyTorch is that of elapsed times; beside it stands that of the processor's time, and the share of the peak
is by the processor's time, too: on a quiet machine they agree, on a busy one they say what the program is to blame for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import common

SIZES = (440, 2560, 2560, 2560, 2560, 8192)
PARAMETERS = 41_777_152
SPEED = {1: 2.5, 2: 2.2}
"""Times PyTorch's samples/s that are aimed at, by threads."""
PEAK = {128: 0.65, 512: 0.75}
"""Share of the multiply-add peak of one core that is aimed at, by batch."""


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(int(sys.argv[2]))
        return
    options = common.options(__doc__)
    report = common.Report("speech_step", options.json)
    rows = []
    for threads in (1, 2):
        for batch in (128, 512):
            rounds = (3 if options.quick else 15) if batch == 128 else (2 if options.quick else 9)
            rows.append(compare(report, threads, batch, rounds))
    header = (
        "threads",
        "batch",
        "ours ms",
        "quartiles",
        "PyTorch ms",
        "quartiles",
        "samples/s",
        "PyTorch",
        "ratio",
        "CPU s",
    )
    report.table("Training steps in turn (medians)", (*header, "GFLOP/s", "of peak"), rows)
    report.finish()


def contestants(threads: int, batch: int) -> tuple[common.Contestant, common.Contestant]:
    """Start ours and PyTorch's."""
    peer = (common.peers_python(), common.PEERS / "speech_step.py", str(threads), str(batch))
    return (
        common.Contestant((sys.executable, __file__, "--contestant", str(batch)), threads=threads),
        common.Contestant(peer, threads=threads),
    )


def compare(report: common.Report, threads: int, batch: int, rounds: int) -> tuple[Any, ...]:
    """Time both in turn, show where our time goes, and return a row of the table."""
    with ExitStack() as stack:
        ours, peer = (stack.enter_context(one) for one in contestants(threads, batch))
        flops = ours.do("work")["flops"]
        rounds_of = common.in_turn(
            rounds, together=threads > 1, ours=ours.do, peer=peer.do, peak=lambda: ours.do("peak")
        )
        parts = [ours.do("parts") for _ in range(max(3, rounds // 2))]
        copy = common.median([float(ours.do("copy")["bytes"]) for _ in range(3)])
    own, other = (common.median([step["seconds"] for step in rounds_of[name]]) for name in ("ours", "peer"))
    own_processor, other_processor = (
        common.median([step["processor"] for step in rounds_of[name]]) for name in ("ours", "peer")
    )
    peak = common.median([one["flops"] for one in rounds_of["peak"]]) * threads
    whole = common.median([sum(part.values()) for part in parts])
    report.table(
        f"Where a step goes: {threads} thread{'s' if threads > 1 else ''}, batch {batch} "
        f"(peak {peak / 1e9:.0f} GFLOP/s, copying {copy / 1e9:.0f} GB/s by one core)",
        ("part", "ms", "%", "GFLOP/s"),
        [
            (name, 1e3 * own_part, 100 * own_part / whole, products / own_part / 1e9 if products else "")
            for name, products in parts_flops(batch).items()
            for own_part in [common.median([part[name] for part in parts])]
        ],
    )
    ratio, share = other / own, flops * threads / own_processor / peak
    plural = f"{threads} thread{'s' if threads > 1 else ''}, batch {batch}"
    report.at_least(f"samples/s of PyTorch's, {plural}", ratio, SPEED[threads])
    if threads == 1:
        report.at_least(f"share of the multiply-add peak, {plural}", share, PEAK[batch])
    milliseconds = [[1e3 * step["seconds"] for step in rounds_of[name]] for name in ("ours", "peer")]
    return (
        threads,
        batch,
        *(1e3 * own, common.spread(milliseconds[0])),
        *(1e3 * other, common.spread(milliseconds[1])),
        *(batch / own, batch / other, f"{ratio:.2f}", f"{other_processor / own_processor:.2f}"),
        *(flops / own / 1e9, f"{100 * share:.0f} %"),
    )


PARTS = ("products forward", "products of input gradients", "products of weight gradients", "activations", "loss")


def parts_flops(batch: int) -> dict[str, int]:
    """Return the operations of each part of a step; 0 where they are not products."""
    products = [2 * batch * inputs * outputs for inputs, outputs in pairwise(SIZES)]
    counted = (sum(products), sum(products[1:]), sum(products), 0, 0)
    return {**dict(zip(PARTS, counted, strict=True)), "update": 0, "all else": 0}


def contestant(batch: int) -> None:
    """Serve steps of our network."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi import config
    from dbmpi.kernels import matmul, updates
    from dbmpi.kernels.memory import aligned_empty
    from dbmpi.objective import Batch
    from dbmpi.replica.whole import WholeNetwork

    hidden = [config.Dense(units=units, activation="sigmoid") for units in SIZES[1:-1]]
    section = config.NetworkSection(loss="softmax", layers=(*hidden, config.Dense(units=SIZES[-1])))
    network = WholeNetwork(section, (SIZES[0],), 1)
    assert network.layout.size == PARAMETERS
    parameters, gradient = aligned_empty(PARAMETERS), aligned_empty(PARAMETERS)
    network.initial(0, parameters)
    random = np.random.default_rng(1)
    inputs = random.normal(size=(SIZES[0], batch)).astype(np.float32)
    data = Batch(inputs, random.integers(0, SIZES[-1], batch).astype(np.int32))

    def step() -> None:
        network.loss_and_gradient(parameters, data, gradient)
        updates.sgd(parameters, gradient, 0.01)

    def parts() -> Mapping[str, float]:
        with clocks() as seconds:
            start = time.perf_counter()
            network.loss_and_gradient(parameters, data, gradient)
            middle = time.perf_counter()
            updates.sgd(parameters, gradient, 0.01)
            end = time.perf_counter()
        return {**seconds, "update": end - middle, "all else": middle - start - sum(seconds.values())}

    step()
    print(f"matrix products: {matmul.provider()}", file=sys.stderr)
    common.serve(
        step=common.timed(step),
        parts=parts,
        work=lambda: {"bytes": 2 * (parameters.nbytes + inputs.nbytes), "flops": network.flops(batch)},
        peak=common.fma_peak(),
        copy=common.copy_bandwidth(),
    )


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Measure the parts of a gradient while the block runs."""
    from dbmpi.kernels.activations import ACTIVATIONS, Activation
    from dbmpi.network import dense, losses

    seconds = dict.fromkeys(PARTS, 0.0)

    def clocked(function: Callable[..., Any], part: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            seconds[part(*arguments)] += time.perf_counter() - start
            return result

        return call

    def kind(a: Any, b: Any, *_: Any) -> str:
        return PARTS[1] if not a.flags.c_contiguous else PARTS[2] if not b.flags.c_contiguous else PARTS[0]

    product, apply, activations = dense.product, losses.Loss.apply, dict(ACTIVATIONS)
    dense.product = clocked(product, kind)
    losses.Loss.apply = clocked(apply, lambda *_: PARTS[4])  # type: ignore[method-assign]
    for name, pair in activations.items():
        ACTIVATIONS[name] = Activation(*(clocked(one, lambda *_: PARTS[3]) for one in pair))
    try:
        yield seconds
    finally:
        dense.product = product
        losses.Loss.apply = apply  # type: ignore[method-assign]
        ACTIVATIONS.update(activations)


if __name__ == "__main__":
    main()
