"""Push + apply + fetch of 41,777,152 floats under each update rule, beside a parameter server over gloo with plain SGD.

One worker and one shard, as they are by default: the shard's kernel reads the gradient where the worker has computed
it, and the worker copies the parameters.  All rules take turns with the peer, which applies plain SGD.

In the same rounds, one core applies each rule's kernel alone.  Beside it stands the share of this time that its bytes
need at the copy bandwidth of one core: a kernel reads the gradient, and reads and writes the parameters and the state.
A copy writes where it does not read, which costs the memory more than an update in place, so that the share may exceed
100 %.  A second share is therefore of the bandwidth of the simplest update in place, which scales a vector.
"""

from __future__ import annotations

import functools
import sys
import time
from contextlib import ExitStack
from typing import Any

import common

FLOATS = 41_777_152
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"rule": "sgd"},
    "momentum": {"rule": "momentum"},
    "nesterov": {"rule": "momentum", "nesterov": True},
    "adagrad": {"rule": "adagrad"},
    "rmsprop": {"rule": "rmsprop"},
    "adam": {"rule": "adam", "weight_decay": 1e-4},
    "adamw": {"rule": "adamw", "weight_decay": 1e-2},
}
PEER = common.PEERS / "parameter_server.py"
GLOO, SGD, BANDWIDTH = 1.5, 0.6, 85.0
"""Speed that is aimed at: times gloo's and times our own SGD's, with Adam; and % of the copy bandwidth, of each."""
_ORDER, _ANSWER = 1, 2


def main() -> None:
    if sys.argv[1:2] == ["--server"]:
        server()
        return
    if sys.argv[1:2] == ["--kernels"]:
        kernels()
        return
    options = common.options(__doc__)
    report = common.Report("rules", options.json)
    with ExitStack() as stack:
        ours = stack.enter_context(common.Contestant(common.on_ranks(2, __file__, "--server")))
        alone = stack.enter_context(common.Contestant((sys.executable, __file__, "--kernels")))
        work = {"gloo": stack.enter_context(common.Contestant((common.peers_python(), PEER))).do}
        for name in RULES:
            work[name] = functools.partial(ours.do, name)
            work[f"kernel {name}"] = functools.partial(alone.do, name)
        work["copy"], work["scale"] = functools.partial(alone.do, "copy"), functools.partial(alone.do, "scale")
        rounds = common.in_turn(5 if options.quick else 15, **work)
    bandwidth = common.median([one["bytes"] for one in rounds["copy"]])
    seconds = {name: [one["seconds"] for one in rounds[name]] for name in work}
    in_place = 2 * 4 * FLOATS / common.median(seconds["scale"])
    gloo, sgd = common.median(seconds["gloo"]), common.median(seconds["sgd"])
    rows: list[tuple[Any, ...]] = [("gloo: sgd", 1e3 * gloo, quartiles(seconds["gloo"]), "", "")]
    for name in RULES:
        own = common.median(seconds[name])
        rows.append((name, 1e3 * own, quartiles(seconds[name]), f"{gloo / own:.2f}", f"{sgd / own:.2f}"))
    machine = common.machine()["processor"]
    header = ("rule", "ms", "quartiles", "times gloo's speed", "times our sgd's")
    report.table(f"Push + apply + fetch, in turn, on {machine}", header, rows)
    rows = []
    for name in RULES:
        own, vectors = common.median(seconds[f"kernel {name}"]), rounds[f"kernel {name}"][0]["vectors"]
        moved = 4 * FLOATS * vectors / own
        share, of_place = 100 * moved / bandwidth, f"{100 * moved / in_place:.0f} %"
        rows.append((name, vectors, 1e3 * own, quartiles(seconds[f"kernel {name}"]), f"{share:.0f} %", of_place))
        report.at_least(f"% of the copy bandwidth, kernel of {name}", share, BANDWIDTH)
    header = ("rule", "vectors", "ms", "quartiles", "of copy bandwidth", "of scaling in place")
    title = f"one core copies {bandwidth / 1e9:.0f} GB/s, and scales {in_place / 1e9:.0f} GB/s in place"
    report.table(f"Kernels alone, in turn; {title}", header, rows)
    adam = common.median(seconds["adam"])
    report.at_least("speed of gloo's plain SGD, with Adam", gloo / adam, GLOO)
    report.at_least("speed of our own SGD, with Adam", sgd / adam, SGD)
    report.finish()


def quartiles(seconds: list[float]) -> str:
    return common.spread([1e3 * one for one in seconds])


def kernels() -> None:
    """Apply the rule that is named, or copy."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi.config import OptimizerSection
    from dbmpi.kernels import updates
    from dbmpi.paramserver.rules import rule

    gradient = np.random.default_rng(1).normal(size=FLOATS).astype(np.float32)
    parameters, arrays = np.zeros(FLOATS, np.float32), [np.ones(FLOATS, np.float32) for _ in range(2)]

    def work(name: str) -> dict[str, float]:
        made = rule(OptimizerSection(learning_rate=1e-6, **RULES[name]))
        state = dict(zip(made.state_names, arrays, strict=False))
        for array in arrays:
            array.fill(1)
        start = time.perf_counter()
        made.apply(parameters, gradient, state)
        return {"seconds": time.perf_counter() - start, "vectors": 3 + 2 * len(state)}

    for name in RULES:
        work(name)  # compiles
    scale = common.timed(lambda: updates.scale(arrays[0], 1.0))
    common.serve(copy=common.copy_bandwidth(), scale=scale, **{name: functools.partial(work, name) for name in RULES})


def server() -> None:
    """Be the shard (rank 0, which is told what to do) or the worker, and serve rounds of the rule that is named."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi.config import OptimizerSection, ServerSection
    from dbmpi.index.layout import cut
    from dbmpi.mpi import waiting, world
    from dbmpi.mpi.topology import Plan
    from dbmpi.paramserver.rules import Rule, State, rule
    from dbmpi.paramserver.schedule import Moment
    from dbmpi.paramserver.store import Store

    class Named:
        """The rule that was named last; all have the same arrays."""

        state_names = ("first", "second")

        def __init__(self) -> None:
            self.now: Rule = rule(OptimizerSection(rule="sgd"))

        def init(self, parameters: np.ndarray) -> State:
            return {name: np.ones_like(parameters) for name in self.state_names}

        def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State, moment: Moment) -> None:
            self.now.apply(parameters, gradient, dict(zip(self.now.state_names, state.values(), strict=False)), moment)

    comm, named, dtype = world.start(), Named(), np.dtype(np.float32)
    plan = Plan(shards=1, replicas=1)
    with Store(comm, plan, cut(FLOATS, plan.shards), ServerSection(), dtype, FLOATS) as store:
        if comm.rank == 0:
            shard = store.server(named)
            shard.begin(None)

            def work(name: str) -> dict[str, float]:
                named.now = rule(OptimizerSection(learning_rate=1e-6, **RULES[name]))
                for array in shard.state.values():
                    array.fill(1)
                answer = np.empty(1)
                request = comm.Irecv(answer, 1, _ANSWER)
                waiting.complete(comm.Isend(np.ones(1), 1, _ORDER), "the worker")
                waiting.complete(request, "the worker", serve=shard.poll)
                return {"seconds": float(answer[0])}

            common.serve(**{name: functools.partial(work, name) for name in RULES})
            waiting.complete(comm.Isend(np.zeros(1), 1, _ORDER), "the worker")
        else:
            client = store.client()
            gradient, parameters = client.gradients[0], np.zeros(FLOATS, dtype)
            gradient.fill(1)
            go = np.ones(1)
            while True:
                request = comm.Irecv(go, 0, _ORDER)
                waiting.until(request.Test, "an order", seconds=3600, longest_sleep=0.01)
                if not go[0]:
                    break
                start = time.perf_counter()
                client.push(gradient)
                client.fetch(parameters)
                waiting.complete(comm.Isend(np.array([time.perf_counter() - start]), 0, _ANSWER), "the shard")


if __name__ == "__main__":
    main()
