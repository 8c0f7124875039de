"""One training step of the paper's speech network, beside PyTorch's.

The network is that of the paper's section 5: 440 inputs, four layers of 2560 sigmoid units, a softmax over 8192 states;
41,777,152 parameters.  A step is the loss, the gradient and the update by plain SGD of the flat parameter vector, in
float32.  Both contestants take a step in turn; the multiply-add peak of the core is measured in the same rounds.

With ``--bfloat16`` ours multiplies bfloat16 (``network.precision``), and PyTorch's is under autocast to it; ours in
float32 takes its turn, too.  Our update rounds the parameters block by block, as a shard does it for workers that
compute on its memory (``server.fetch = "shared"``).

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
from machine import has_feature

SIZES = (440, 2560, 2560, 2560, 2560, 8192)
PARAMETERS = 41_777_152
SPEED = {(1, 128): 2.5, (1, 512): 2.5, (2, 128): 2.2, (2, 512): 2.2}
"""Times PyTorch's samples/s that are aimed at, by threads and batch."""
SPEED_WITH_AMX = {(1, 128): 1.9, (1, 512): 1.2, (2, 128): 1.6, (2, 512): 1.2}
"""The same where the processor has matrix registers: one that PyTorch's MKL is made for."""
PEAK = 0.8
"""Share of the multiply-add peak that is aimed at."""
HALVES = {"amx": {128: (2.5, 2.0), 512: (1.5, 3.0)}, "avx512_bf16": {128: (1.3, 1.5), 512: (1.3, 1.5)}}
"""By what multiplies bfloat16, and by batch: times PyTorch's autocast, and times our float32, that are aimed at."""


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(int(sys.argv[2]), *sys.argv[3:])
        return
    options = common.options(__doc__, bfloat16="products of bfloat16, beside PyTorch's autocast, instead of float32")
    report = common.Report("speech_step", options.json)
    if options.bfloat16:
        rows = [halves(report, threads, batch, options.quick) for threads in (1, 2) for batch in (128, 512)]
        header = ("threads", "batch", "ours ms", "our float32", "PyTorch ms", "samples/s", "PyTorch", "ratio", "CPU s")
        report.table("Steps with products of bfloat16 in turn (medians)", (*header, "to float32", "CPU s"), rows)
        report.finish()
        return
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


def contestants(threads: int, batch: int, precision: str = "float32") -> tuple[common.Contestant, common.Contestant]:
    """Start ours and PyTorch's."""
    peer = (common.peers_python(), common.PEERS / "speech_step.py", str(threads), str(batch), precision)
    return (
        common.Contestant((sys.executable, __file__, "--contestant", str(batch), precision), threads=threads),
        common.Contestant(peer, threads=threads),
    )


def halves(report: common.Report, threads: int, batch: int, quick: bool) -> tuple[Any, ...]:
    """Time a step of bfloat16, ours in float32 and PyTorch's in turn; return a row of the table."""
    rounds = (3 if quick else 15) if batch == 128 else (2 if quick else 9)
    with ExitStack() as stack:
        ours, peer = (stack.enter_context(one) for one in contestants(threads, batch, "bfloat16"))
        plain = stack.enter_context(
            common.Contestant((sys.executable, __file__, "--contestant", str(batch)), threads=threads)
        )
        found = common.in_turn(rounds, together=threads > 1, ours=ours.do, plain=plain.do, peer=peer.do)
        parts = [ours.do("parts") for _ in range(max(3, rounds // 2))]
        engine = ours.do("engine")["engine"]
    own, other, before = (common.median([one["seconds"] for one in found[name]]) for name in ("ours", "peer", "plain"))
    processor = {name: common.median([one["processor"] for one in found[name]]) for name in found}
    plural = f"{threads} thread{'s' if threads > 1 else ''}, batch {batch}"
    report.table(
        f"Where a step goes: {plural}, products by {engine}",
        ("part", "ms", "GFLOP/s"),
        [
            (name, 1e3 * taken, products / taken / 1e9 if products else "")
            for name, products in parts_flops(batch).items()
            for taken in [common.median([part[name] for part in parts])]
        ],
    )
    if engine in HALVES:
        to_peer, to_plain = HALVES[engine][batch]
        report.at_least(f"samples/s of PyTorch's autocast, {plural}", other / own, to_peer)
        report.at_least(f"samples/s of our float32, {plural}", before / own, to_plain)
    return (
        *(threads, batch, 1e3 * own, 1e3 * before, 1e3 * other, batch / own, batch / other),
        *(f"{other / own:.2f}", f"{processor['peer'] / processor['ours']:.2f}"),
        *(f"{before / own:.2f}", f"{processor['plain'] / processor['ours']:.2f}"),
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
    speed = SPEED_WITH_AMX if has_feature("amx_tile") else SPEED
    report.at_least(f"samples/s of PyTorch's, {plural}", ratio, speed[threads, batch])
    report.at_least(f"share of the multiply-add peak, {plural}", share, PEAK)
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
ROUNDING = "rounding"


def parts_flops(batch: int) -> dict[str, int]:
    """Return the operations of each part of a step; 0 where they are not products."""
    products = [2 * batch * inputs * outputs for inputs, outputs in pairwise(SIZES)]
    counted = (sum(products), sum(products[1:]), sum(products), 0, 0)
    return {**dict(zip(PARTS, counted, strict=True)), ROUNDING: 0, "update": 0, "all else": 0}


def contestant(batch: int, precision: str = "float32") -> None:
    """Serve steps of our network."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi import config
    from dbmpi.kernels import bfloat16, matmul, updates
    from dbmpi.kernels.memory import aligned_empty
    from dbmpi.objective import Batch
    from dbmpi.paramserver import server
    from dbmpi.replica.whole import WholeNetwork

    hidden = [config.Dense(units=units, activation="sigmoid") for units in SIZES[1:-1]]
    section = config.NetworkSection.model_validate(
        {"loss": "softmax", "layers": (*hidden, config.Dense(units=SIZES[-1])), "precision": precision}
    )
    network = WholeNetwork(section, (SIZES[0],), 1)
    assert network.layout.size == PARAMETERS
    parameters, gradient = aligned_empty(PARAMETERS), aligned_empty(PARAMETERS)
    network.initial(0, parameters)
    random = np.random.default_rng(1)
    inputs = random.normal(size=(SIZES[0], batch)).astype(np.float32)
    data = Batch(inputs, random.integers(0, SIZES[-1], batch).astype(np.int32))

    rounded = aligned_empty(PARAMETERS, bfloat16.BFLOAT16)
    blocks = [slice(0, PARAMETERS)]
    if precision == "bfloat16":
        bfloat16.rounded(parameters, rounded)
        network.keep_rounded(parameters, rounded)
        blocks = [slice(first, min(first + server._BLOCK, PARAMETERS)) for first in range(0, PARAMETERS, server._BLOCK)]

    def update() -> None:
        for block in blocks:
            updates.sgd(parameters[block], gradient[block], 0.01)
            if precision == "bfloat16":
                bfloat16.rounded(parameters[block], rounded[block], far=True)

    def step() -> None:
        network.loss_and_gradient(parameters, data, gradient)
        update()

    def parts() -> Mapping[str, float]:
        with clocks() as seconds:
            start = time.perf_counter()
            network.loss_and_gradient(parameters, data, gradient)
            middle = time.perf_counter()
            gone = dict(seconds)
            update()
            end = time.perf_counter()
        return {**gone, "update": end - middle, "all else": middle - start - sum(gone.values())}

    step()
    multiplies = bfloat16.engine() if precision == "bfloat16" else ", ".join(matmul.providers())
    print(f"matrix products: {multiplies}", file=sys.stderr)
    common.serve(
        step=common.timed(step),
        parts=parts,
        engine=lambda: {"engine": multiplies},
        work=lambda: {"bytes": 2 * (parameters.nbytes + inputs.nbytes), "flops": network.flops(batch)},
        peak=common.fma_peak(),
        copy=common.copy_bandwidth(),
    )


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Measure the parts of a gradient while the block runs."""
    from dbmpi.kernels import bfloat16
    from dbmpi.kernels.activations import ACTIVATIONS, Activation
    from dbmpi.network import dense, losses

    seconds = dict.fromkeys((*PARTS, ROUNDING), 0.0)

    def clocked(function: Callable[..., Any], part: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            seconds[part(*arguments)] += time.perf_counter() - start
            return result

        return call

    def kind(a: Any, b: Any, *_: Any) -> str:
        return PARTS[1] if not a.flags.c_contiguous else PARTS[2] if not b.flags.c_contiguous else PARTS[0]

    product, apply, activations = dense._product, losses.Loss.apply, dict(ACTIVATIONS)
    rounded = bfloat16.rounded
    dense._product = clocked(product, kind)
    bfloat16.rounded = clocked(rounded, lambda *_: ROUNDING)
    losses.Loss.apply = clocked(apply, lambda *_: PARTS[4])  # type: ignore[method-assign]
    for name, pair in activations.items():
        ACTIVATIONS[name] = Activation(*(clocked(one, lambda *_: PARTS[3]) for one in pair))
    try:
        yield seconds
    finally:
        dense._product = product
        bfloat16.rounded = rounded
        losses.Loss.apply = apply  # type: ignore[method-assign]
        ACTIVATIONS.update(activations)


if __name__ == "__main__":
    main()
