"""Downpour on the paper's speech network: samples a second of several replicas, beside DDP and one without a server.

Every replica and every shard is a process of one thread; batches of 128, plain SGD, as PyTorch's
DistributedDataParallel over gloo (two processes of one thread) has it, too.  All of them take turns.  A turn is long
enough that it does not matter much who of the asynchronous replicas comes to its end last.

"By CPU" is the speed-up over one replica that two idle cores would give: twice the processor's time of one replica's
sample, by that of ours, shard included.  On a busy machine it says what the program is to blame for.

Hidden communication is the share of the time that the blocking path spends on fetches and pushes (per step) which the
overlapped path does not.

The cost of more replicas and shards than cores is shown for a network with a seventh of the parameters,
440-4x1024-2048, as eight replicas of the large one need 6 GB and many minutes.  Each parameter costs the same
arithmetic and the same bytes.

With ``--bfloat16`` all multiply bfloat16: ours by ``network.precision``, DDP under PyTorch's autocast; without the
table of replicas and shards.
"""

from __future__ import annotations

import functools
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import common

SPEECH = (440, 2560, 2560, 2560, 2560, 8192)
SMALL = (440, 1024, 1024, 1024, 1024, 2048)
BATCH = 128
DDP_STEPS = 3
SMALL_STEPS = 80
"""Steps of all replicas together at a turn, in the table of replicas and shards."""
WAYS: dict[str, dict[str, Any]] = {
    "blocking": {"fetch": "copied", "overlap": "none"},
    "overlapped": {"fetch": "copied", "overlap": "threads"},
    "in place": {"fetch": "shared", "overlap": "threads"},
}
LIKE_DDP_ROUNDED = {"amx": 2.5}
"""With products of bfloat16, by what multiplies."""
LIKE_DDP, LIKE_ONE, LIKE_ONE_OF_FIVE, HIDDEN = 2.3, 1.6, 1.85, 0.8
_ORDER, _ANSWER = 1, 2


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(*sys.argv[2:5], *map(int, sys.argv[5:]))
        return
    options = common.options(__doc__, bfloat16="products of bfloat16, beside DDP under autocast, instead of float32")
    precision = "bfloat16" if options.bfloat16 else "float32"
    report = common.Report("downpour_scaling", options.json)
    rounds, steps = (2, 10) if options.quick else (5, 20)
    with ExitStack() as stack:
        step = common.ROOT / "benchmarks/speech_step.py"
        alone = contender(stack, sys.executable, step, "--contestant", BATCH, precision)
        engine = alone.do("engine")["engine"]
        peer = contender(stack, common.peers_python(), common.PEERS / "ddp_step.py", BATCH, DDP_STEPS, precision)
        work = {"one replica, no server": alone.do, "DDP": functools.partial(peer.do, "steps")}
        for way in WAYS:
            for period in (1, 5) if way == "overlapped" else (1,):
                ours = contender(stack, *ranks(way, period, steps, replicas=2, shards=1, precision=precision))
                work[f"{way}, n = {period}"] = functools.partial(ours.do, "steps")
        say(f"{len(work)} contestants take {rounds + 1} turns each")
        taken = common.in_turn(rounds, **work)
    samples = dict.fromkeys(work, 2 * steps * BATCH) | {"one replica, no server": BATCH, "DDP": 2 * DDP_STEPS * BATCH}
    speed = {name: samples[name] / common.median([one["seconds"] for one in taken[name]]) for name in work}
    one, ddp = speed["one replica, no server"], speed["DDP"]
    cost = {name: common.median([one["processor"] for one in taken[name]]) / samples[name] for name in work}
    alone_cost = cost["one replica, no server"]
    rows = [
        (
            name,
            *(f"{speed[name]:.0f}", f"{speed[name] / ddp:.2f}", f"{speed[name] / one:.2f}"),
            *("" if name == "DDP" else f"{2 * alone_cost / cost[name]:.2f}", waited(taken[name])),
        )
        for name in work
    ]
    header = ("2 replicas + 1 shard", "samples/s", "of DDP", "of one replica", "by CPU", "ms of a step for transfers")
    report.table("Samples a second, in turn (medians)", header, rows)
    best = max(speed["overlapped, n = 1"], speed["in place, n = 1"])
    if options.bfloat16:
        if engine in LIKE_DDP_ROUNDED:
            report.at_least("samples/s of DDP's under autocast, n = 1", best / ddp, LIKE_DDP_ROUNDED[engine])
        report.finish()
        return
    report.at_least("samples/s of DDP's, n = 1", best / ddp, LIKE_DDP)
    report.at_least("samples/s of one replica's, n = 1", best / one, LIKE_ONE)
    report.at_least("samples/s of one replica's, n = 5", speed["overlapped, n = 5"] / one, LIKE_ONE_OF_FIVE)
    visible = {way: transfers(taken[f"{way}, n = 1"]) for way in WAYS}
    report.at_least("hidden communication", 1 - visible["overlapped"] / visible["blocking"], HIDDEN)
    table(report, (1, 2, 4, 8), (1, 2) if options.quick else (1, 2, 4))
    report.finish()


def table(report: common.Report, replicas: tuple[int, ...], shards: tuple[int, ...]) -> None:
    """Show the cost against numbers of replicas and shards; more than the cores is oversubscribed."""
    rows = []
    for number in replicas:
        for holders in shards:
            with ExitStack() as stack:
                steps = SMALL_STEPS // number
                ours = contender(stack, *ranks("overlapped", 1, steps, number, holders, "small"))
                turns = common.in_turn(2, ours=functools.partial(ours.do, "steps"))["ours"]
            rate = number * steps * BATCH / common.median([one["seconds"] for one in turns])
            rows.append((number, holders, f"{rate:.0f}", waited(turns)))
            say(f"{number} replicas, {holders} shards: {rate:.0f} samples/s")
    header = ("replicas", "shards", "samples/s", "ms of a step for transfers")
    report.table("Overlapped, n = 1, by numbers of replicas and shards, small network", header, rows)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def contender(stack: ExitStack, *command: Any) -> common.Contestant:
    return stack.enter_context(common.Contestant(command))


def ranks(
    way: str,
    period: int,
    steps: int,
    replicas: int,
    shards: int,
    network: str = "speech",
    precision: str = "float32",
) -> tuple[str, ...]:
    numbers = map(str, (period, steps, replicas, shards))
    return common.on_ranks(replicas + shards, __file__, "--contestant", network, way, precision, *numbers)


def transfers(turns: list[dict[str, float]]) -> float:
    """Return the seconds of a step that a replica spends on fetches and pushes."""
    return common.median([one["transfers"] for one in turns])


def waited(turns: list[dict[str, float]]) -> str:
    return f"{1e3 * transfers(turns):.1f}" if "transfers" in turns[0] else ""


def contestant(which: str, way: str, precision: str, period: int, steps: int, replicas: int, shards: int) -> None:
    """Be a shard or a replica; rank 0 is told when all replicas are to take their steps."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi import config
    from dbmpi.downpour.algorithm import downpour
    from dbmpi.downpour.datapath import DataPath, Flow, Push
    from dbmpi.index.layout import cut
    from dbmpi.monitor.measures import Stopwatch
    from dbmpi.mpi import waiting, world
    from dbmpi.mpi.topology import Plan
    from dbmpi.objective import Batch, Outcome
    from dbmpi.paramserver.rules import Sgd
    from dbmpi.paramserver.store import Store
    from dbmpi.replica.whole import WholeNetwork

    comm, dtype = world.start(), np.dtype(np.float32)
    plan, sizes = Plan(shards, replicas), {"speech": SPEECH, "small": SMALL}[which]
    hidden = [config.Dense(units=units, activation="sigmoid") for units in sizes[1:-1]]
    section = config.NetworkSection.model_validate(
        {"loss": "softmax", "layers": (*hidden, config.Dense(units=sizes[-1])), "precision": precision}
    )
    network = WholeNetwork(section, (sizes[0],), 1)
    size = network.layout.size
    ends = np.cumsum([(inputs + 1) * outputs for inputs, outputs in pairwise(sizes)]).tolist()
    parts = tuple(range(start, stop) for start, stop in pairwise((0, *ends)))

    class Gate:
        """Lets the loop take some steps when it is told to, and tells how long they took."""

        expired = False

        def __init__(self) -> None:
            self.stopwatch = Stopwatch()
            random = np.random.default_rng(comm.rank)
            inputs = random.normal(size=(sizes[0], BATCH)).astype(np.float32)
            self._batch = Batch(inputs, random.integers(0, sizes[-1], BATCH).astype(np.int32))
            self._step = 0
            self._began = self._processor = 0.0

        def proceed(self, _fetches: bool) -> int | None:
            if self._step % steps == 0:
                if self._step:
                    spent = self.stopwatch.take()
                    transfers = (spent.get("fetch", 0.0) + spent.get("push", 0.0)) / steps
                    processor = time.process_time() - self._processor
                    answer = np.array([time.perf_counter() - self._began, transfers, processor])
                    waiting.complete(comm.Isend(answer, 0, _ANSWER), "rank 0")
                order = np.empty(1)
                waiting.until(comm.Irecv(order, 0, _ORDER).Test, "an order", seconds=3600, longest_sleep=0.01)
                if not order[0]:
                    return None
                self._began, self._processor = time.perf_counter(), time.process_time()
                self.stopwatch.take()
            self._step += 1
            return self._step

        def load(self, _number: int) -> Batch:
            return self._batch

        def stepped(self, _outcome: Outcome) -> None:
            pass

        def pushed(self, _push: Push, *, last: bool) -> None:
            pass

    server_section, rounded = config.ServerSection(**WAYS[way]), precision == "bfloat16"
    with Store(comm, plan, cut(size, plan.shards), server_section, dtype, size, rounded=rounded) as store:
        shard = plan.shard_of(comm.rank)
        if shard is None:
            gate, flow = Gate(), Flow(parts, overlap=store.overlap)
            client = store.client(parts=flow.parts)
            if client.rounded is not None and client.parameters is not None:
                network.keep_rounded(client.parameters, client.rounded)
            path = DataPath(client, flow, gate.stopwatch("push"))
            downpour(network, path, gate, n_push=period, n_fetch=period)
            waiting.barrier(comm, "the others")
            return
        server = store.server(Sgd(1e-6))
        network.initial(store.ranges[shard].start, server.parameters)
        server.begin(None)
        if comm.rank == 0:

            def take_steps() -> dict[str, float]:
                answers, processor = np.empty((replicas, 3)), time.process_time()
                requests = [
                    comm.Irecv(answer, rank, _ANSWER) for answer, rank in zip(answers, plan.worker_ranks, strict=True)
                ]
                tell(1.0)
                for request in requests:
                    waiting.complete(request, "the replicas", serve=server.poll)
                return {
                    "seconds": float(answers[:, 0].max()),
                    "transfers": float(answers[:, 1].mean()),
                    "processor": float(answers[:, 2].sum()) + time.process_time() - processor,
                }

            def tell(order: float) -> None:
                for rank in plan.worker_ranks:
                    waiting.complete(comm.Isend(np.array([order]), rank, _ORDER), "the replicas", serve=server.poll)

            common.serve(steps=take_steps)
            tell(0.0)
        waiting.until(comm.Ibarrier().Test, "the others", serve=server.poll, seconds=3600, longest_sleep=0.001)


if __name__ == "__main__":
    main()
