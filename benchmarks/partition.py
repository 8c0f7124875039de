"""One model on two ranks beside the same on one: what is left of a factor of two when a model is cut.

A step is the loss, the gradient and the update by plain SGD, in float32, one thread a rank: alone, and as two
partitions on two cores, in turn.  The networks are the paper's: speech (dense layers, every boundary a full gather),
and images (locally connected, halos between two halves).

The time of a rank is its compute and what it spends in exchanges, in which it also waits for the other; the share of
exchanges is that of the slower rank's step.

The update, and the filters of the images, come from memory, which both ranks share: how much more two of them copy at
once than one does is told, too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import common

CASES = {
    # configuration, batch, speed-up to reach
    "speech": ("speech.toml", 128, 1.75),
    "images": ("images-8.toml", 32, 1.8),
}
INPUTS = {"speech": (440,), "images-8": (3, 100, 100)}
EXCHANGE = 0.08
PARTITIONS = 2


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(sys.argv[2], int(sys.argv[3]))
        return
    options = common.options(__doc__)
    report = common.Report("partition", options.json)
    rows = []
    for name, (configuration, batch, speed) in CASES.items():
        path = common.ROOT / "examples" / configuration
        rounds = (2 if options.quick else 9) if name == "images" else (5 if options.quick else 25)
        row, ratio, share = compare(path, batch, rounds)
        rows.append((name, *row))
        report.at_least(f"speed of two partitions to one, {name}, batch {batch}", ratio, speed)
        report.at_most(f"share of exchange and waiting, {name}, batch {batch}", share, EXCHANGE)
    header = ("network", "batch", "1 rank ms", "quartiles", "2 ranks ms", "quartiles", "ratio", "exchange %")
    more = ("waiting ms", "update ms: 1 rank", "2 ranks", "ratio of copies")
    report.table("Training steps in turn (medians)", (*header, *more), rows)
    report.finish()


def compare(path: Path, batch: int, rounds: int) -> tuple[tuple[Any, ...], float, float]:
    """Time both in turn; return a row of the table, the speed-up, and the share of exchanges."""
    program = (__file__, "--contestant", str(path), str(batch))
    with ExitStack() as stack:
        alone = stack.enter_context(common.Contestant((sys.executable, *program)))
        cut = stack.enter_context(common.Contestant(common.on_ranks(PARTITIONS, *program)))
        steps = common.in_turn(
            rounds, alone=alone.do, copy=partial(alone.do, "copy"), cut=cut.do, copies=partial(cut.do, "copy")
        )
    one, two = ([step["seconds"] for step in steps[name]] for name in ("alone", "cut"))
    shares = [max(step["exchange"]) / step["seconds"] for step in steps["cut"]]
    ratio, share = common.median(one) / common.median(two), common.median(shares)
    waiting = [max(step["exchange"]) - min(step["exchange"]) for step in steps["cut"]]
    quartiles = [common.spread([1e3 * value for value in values]) for values in (one, two)]
    updates = [1e3 * common.median([step["update"] for step in steps[name]]) for name in ("alone", "cut")]
    copy, copies = (common.median([one["seconds"] for one in steps[name]]) for name in ("copy", "copies"))
    row = (
        batch,
        *(1e3 * common.median(one), quartiles[0]),
        *(1e3 * common.median(two), quartiles[1]),
        *(f"{ratio:.2f}", f"{100 * share:.1f}", 1e3 * common.median(waiting)),
        *updates,
        PARTITIONS * copy / copies,
    )
    return row, ratio, share


def contestant(configuration: str, batch: int) -> None:
    """Serve steps of the network; under mpirun, cut over all ranks."""
    common.prepare_runtime()
    import time

    import numpy as np

    from dbmpi.config import load
    from dbmpi.kernels import updates
    from dbmpi.kernels.memory import aligned_empty
    from dbmpi.mpi import waiting, world
    from dbmpi.network.description import Network
    from dbmpi.objective import Batch
    from dbmpi.replica import placement
    from dbmpi.replica.replica import Replica

    comm = world.start()
    from mpi4py import MPI

    run = load(Path(configuration))
    network = Network(run.network, INPUTS[Path(configuration).stem], seed=1)
    replica = Replica(network, placement.automatic(network.layers, comm.size), comm if comm.size > 1 else None)
    parameters, gradient = aligned_empty(replica.size), aligned_empty(replica.size)
    for stretch in replica.parameters.runs:
        network.initial(stretch.start, parameters[stretch.local : stretch.local + stretch.length])
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((*network.input_shape, batch), dtype=np.float32)
    data = Batch(inputs, rng.integers(0, network.outputs, batch).astype(np.int32))

    def step() -> Mapping[str, Any]:
        waiting.barrier(comm, "the other partitions")
        before = sum(replica.seconds["exchange"])
        start = time.perf_counter()
        replica.loss_and_gradient(parameters, data, gradient)
        computed = time.perf_counter()
        updates.sgd(parameters, gradient, 0.01)
        update = time.perf_counter() - computed
        waiting.barrier(comm, "the other partitions")
        seconds = time.perf_counter() - start
        mine = np.zeros(comm.size)
        mine[comm.rank] = sum(replica.seconds["exchange"]) - before
        return {
            "seconds": seconds,
            "update": update,
            "exchange": waiting.allreduce(comm, mine, MPI.SUM, "times").tolist(),
        }

    copy_some = common.copy_bandwidth(64)

    def copy() -> Mapping[str, Any]:
        waiting.barrier(comm, "the other partitions")
        start = time.perf_counter()
        copy_some()
        waiting.barrier(comm, "the other partitions")
        return {"seconds": time.perf_counter() - start}

    common.serve_together(comm, step=step, copy=copy)


if __name__ == "__main__":
    main()
