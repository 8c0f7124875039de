"""The vector work of an L-BFGS iteration, beside the memory's speed and torch.optim.LBFGS, and cut over two ranks.

Both minimise the same quadratic of 40 million float32 parameters with 10 pairs of history.  What the loss and the
gradient take is measured and left out: the rest is the method's own work.  Ours is compared with what its bytes need at
the speed of a copy, measured in the same process in the same rounds: for m pairs, an iteration reads and writes 2m + 2
vectors for the direction, 4 for the step, 3 for the difference of gradients, and reads 2m + 1 for the dot products.

Two shards, each a rank of one thread under mpirun, run beside one such rank.  What memory lets two cores gain is told
by a copy, made by both at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import common

PAIRS = 10
MOST_OF_BYTES = 1.3
SPEED = 2.0
SHARDS = 2
SPEED_OF_SHARDS = 1.7


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(int(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--shard"]:
        common.prepare_runtime()
        from dbmpi.mpi import world

        contestant(int(sys.argv[2]), world.start())
        return
    options = common.options(__doc__)
    report = common.Report("sandblaster", options.json)
    size = 4_000_000 if options.quick else 40_000_000
    rows = []
    for threads in (1, 2):
        with ExitStack() as stack:
            ours = stack.enter_context(
                common.Contestant((sys.executable, __file__, "--contestant", str(size)), threads=threads)
            )
            command = (common.peers_python(), common.PEERS / "lbfgs.py", str(threads), str(size), str(PAIRS))
            peer = stack.enter_context(common.Contestant(command, threads=threads))
            for contestant_ in (ours, peer):
                for _ in range(PAIRS + 1):  # until the history is full
                    contestant_.do()
            rounds = common.in_turn(
                3 if options.quick else 7,
                together=threads > 1,
                ours=ours.do,
                copy=partial(ours.do, "copy"),
                peer=peer.do,
            )
        own, copy, other = (
            common.median([one["seconds"] for one in rounds[name]]) for name in ("ours", "copy", "peer")
        )
        needed = vectors_moved(PAIRS) / 2 * copy
        rows.append((threads, 1e3 * own, 1e3 * needed, own / needed, 1e3 * other, other / own))
        report.at_most(f"time over that of its bytes, {threads} threads", own / needed, MOST_OF_BYTES)
        report.at_least(f"torch.optim.LBFGS over ours, {threads} threads", other / own, SPEED)
    header = ("threads", "ours ms", "its bytes ms", "ratio", "PyTorch ms", "PyTorch / ours")
    report.table(f"Vector work of an iteration, {size:,} parameters, {PAIRS} pairs (medians)", header, rows)
    row = compare_shards(size, 3 if options.quick else 9)
    report.at_least(f"speed of {SHARDS} shards to one", row[2], SPEED_OF_SHARDS)
    header = ("1 shard ms", f"{SHARDS} shards ms", "ratio", "ratio of copies")
    report.table("The same, each shard a rank of one thread, in turn (medians)", header, [row])
    report.finish()


def compare_shards(size: int, rounds: int) -> tuple[float, float, float, float]:
    """Time one shard and several in turn; return a row of the table."""
    with ExitStack() as stack:
        one, several = (
            stack.enter_context(common.Contestant(common.on_ranks(ranks, __file__, "--shard", str(size))))
            for ranks in (1, SHARDS)
        )
        for contestant_ in (one, several):
            for _ in range(PAIRS + 1):
                contestant_.do()
        found = common.in_turn(
            rounds,
            one=one.do,
            several=several.do,
            copy=partial(one.do, "copy"),
            copies=partial(several.do, "copy"),
        )
    times = {name: common.median([its["seconds"] for its in values]) for name, values in found.items()}
    ratio, ratio_of_copies = times["one"] / times["several"], times["copy"] / times["copies"]
    return 1e3 * times["one"], 1e3 * times["several"], ratio, ratio_of_copies


def vectors_moved(pairs: int) -> int:
    """Return how many vectors an iteration reads or writes: direction, step, difference of gradients, products."""
    return (2 * pairs + 2) + 4 + 3 + (2 * pairs + 1)


def contestant(size: int, comm: Any = None) -> None:
    """Take one iteration, or make one copy, for each line of standard input; under mpirun, as one shard of several."""
    import numpy as np

    from dbmpi.index.layout import cut
    from dbmpi.kernels import vectors
    from dbmpi.methods.descent import Limits
    from dbmpi.methods.lbfgs import History, lbfgs
    from dbmpi.methods.local_space import LocalSpace, alone
    from dbmpi.mpi import waiting

    rank, ranks = (0, 1) if comm is None else (comm.rank, comm.size)
    held = cut(size, ranks)[rank]
    curvatures = np.geomspace(1, 1e4, size)[held.start : held.stop].astype(np.float32)
    parameters = np.ones(len(held), np.float32)

    def over_ranks(values: np.ndarray) -> np.ndarray:
        from mpi4py import MPI

        return waiting.allreduce(comm, values, MPI.SUM, "the other shards")

    reduce = alone if ranks == 1 else over_ranks
    given = {"parameters": parameters, "curvatures": curvatures}
    space = LocalSpace(len(held), np.float32, reduce, rank, ranks, given)
    for name in ("gradient", "other gradient"):
        space.create(name)
    spent = 0.0

    def evaluate(point: str, gradient: str) -> float:
        nonlocal spent
        began = time.perf_counter()
        np.multiply(parameters, curvatures, out=space.writable(gradient))
        loss = float(reduce(np.array([0.5 * np.dot(parameters, space.array(gradient))], np.float64))[0])
        spent += time.perf_counter() - began
        return loss

    history = History(space, PAIRS)
    # One iteration at a time: the callback is where the clock is read, and the loop waits there for the next line.
    marks: list[float] = []

    def step() -> Mapping[str, Any]:
        nonlocal spent
        spent = 0.0
        marks.clear()

        def told(progress: object) -> None:
            marks.append(time.perf_counter() - spent)

        # The first iteration measures the gradient anew; the second is a whole one.
        lbfgs(space, evaluate, history=history, limits=Limits(0, 0, iterations=2), callback=told)
        return {"seconds": marks[1] - marks[0]}

    source, target = np.ones(len(held), np.float32), np.zeros(len(held), np.float32)

    def copy() -> Mapping[str, Any]:
        times = []
        reduce(np.zeros(1))  # all copy at once
        for work in (lambda: vectors.combine(target, [1.0], [source]), lambda: np.copyto(target, source)):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return {"seconds": min(times)}

    if comm is None:
        common.serve(step=step, copy=copy)
    else:
        common.serve_together(comm, step=step, copy=copy)


if __name__ == "__main__":
    main()
