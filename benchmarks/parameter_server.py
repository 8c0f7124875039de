"""Push + apply + fetch of 41,777,152 floats by one worker and one shard, beside a parameter server over gloo.

Ours runs in three ways: `copied` (through the inbox, as in a push to any shard that shares no memory, and a copy of the
parameters), `push in place` (the shard's kernel reads the gradient where the worker has computed it) and `in place`
(the worker also computes on the shard's own parameters).  All take turns with the peer, which applies plain SGD.

Beside each stands the share of the time that its bytes need at the copy bandwidth of one core, measured in the same
rounds: a kernel reads the gradient and reads and writes the parameters and the state; a copy reads and writes.
"""

from __future__ import annotations

import functools
import sys
import time
from contextlib import ExitStack
from typing import Any

import common

FLOATS = 41_777_152
RULES = ("sgd", "adagrad")
WAYS = {
    "copied": {"push": "copied", "fetch": "copied"},
    "push in place": {"push": "shared", "fetch": "copied"},
    "in place": {"push": "shared", "fetch": "shared"},
}
COPIES = {"copied": 2, "push in place": 1, "in place": 0}
TRAFFIC = {"sgd": 3, "adagrad": 5}
"""Vectors that a rule's kernel reads or writes."""
TARGETS = {("copied", "sgd"): 3, ("copied", "adagrad"): 2, ("in place", "sgd"): 5, ("in place", "adagrad"): 3}
_ORDER, _ANSWER = 1, 2


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(sys.argv[2])
        return
    options = common.options(__doc__)
    report = common.Report("parameter_server", options.json)
    with ExitStack() as stack:
        work = {"gloo": stack.enter_context(common.Contestant((common.peers_python(), PEER))).do}
        for way in WAYS:
            ours = stack.enter_context(common.Contestant(common.on_ranks(2, __file__, "--contestant", way)))
            for rule in RULES:
                work[f"{way} {rule}"] = functools.partial(ours.do, rule)
        rounds = common.in_turn(5 if options.quick else 15, **work, copy=common.copy_bandwidth())
    bandwidth = common.median([one["bytes"] for one in rounds["copy"]])
    seconds = {name: [one["seconds"] for one in rounds[name]] for name in work}
    gloo = common.median(seconds["gloo"])
    rows: list[tuple[Any, ...]] = [("gloo", "sgd", 1e3 * gloo, quartiles(seconds["gloo"]), "", "")]
    for way in WAYS:
        for rule in RULES:
            own = seconds[f"{way} {rule}"]
            ratio = gloo / common.median(own)
            needed = 4 * FLOATS * (2 * COPIES[way] + TRAFFIC[rule]) / bandwidth
            share = f"{100 * needed / common.median(own):.0f} %"
            rows.append((way, rule, 1e3 * common.median(own), quartiles(own), f"{ratio:.2f}", share))
            if (way, rule) in TARGETS:
                report.at_least(f"speed of gloo's plain SGD: {way}, {rule}", ratio, TARGETS[way, rule])
    header = ("way", "rule", "ms", "quartiles", "times gloo's speed", "of copy bandwidth")
    report.table(f"Push + apply + fetch, in turn; one core copies {bandwidth / 1e9:.0f} GB/s", header, rows)
    report.finish()


PEER = common.PEERS / "parameter_server.py"


def quartiles(seconds: list[float]) -> str:
    return common.spread([1e3 * one for one in seconds])


def contestant(way: str) -> None:
    """Be the shard (rank 0, which is told what to do) or the worker, and serve rounds of the rule that is named."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi.config import ServerSection
    from dbmpi.index.layout import cut
    from dbmpi.mpi import waiting, world
    from dbmpi.mpi.topology import Plan
    from dbmpi.paramserver.rules import Adagrad, Rule, Sgd, State
    from dbmpi.paramserver.schedule import Moment
    from dbmpi.paramserver.store import Store

    class Either:
        """The rule that was named last."""

        state_names = Adagrad.state_names

        def __init__(self) -> None:
            self.rules: dict[str, Rule] = {"sgd": Sgd(0.01), "adagrad": Adagrad(0.01)}
            self.name = "sgd"

        def init(self, parameters: np.ndarray) -> State:
            return self.rules["adagrad"].init(parameters)

        def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State, moment: Moment) -> None:
            self.rules[self.name].apply(parameters, gradient, state, moment)

    comm, rule, dtype = world.start(), Either(), np.dtype(np.float32)
    plan = Plan(shards=1, replicas=1)
    with Store(comm, plan, cut(FLOATS, plan.shards), ServerSection(**WAYS[way]), dtype, FLOATS) as store:
        if comm.rank == 0:
            server = store.server(rule)
            server.begin(None)

            def work(name: str) -> dict[str, float]:
                rule.name = name
                answer = np.empty(1)
                request = comm.Irecv(answer, 1, _ANSWER)
                waiting.complete(comm.Isend(np.ones(1), 1, _ORDER), "the worker")
                waiting.complete(request, "the worker", serve=server.poll)
                return {"seconds": float(answer[0])}

            common.serve(**{name: functools.partial(work, name) for name in RULES})
            waiting.complete(comm.Isend(np.zeros(1), 1, _ORDER), "the worker")
        else:
            client = store.client()
            gradient = client.gradients[0]
            parameters = client.parameters if client.parameters is not None else np.zeros(FLOATS, dtype)
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
