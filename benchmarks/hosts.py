"""Push and fetch between hosts, with the line as fast as it goes and with one of 1 Gbit/s.

A worker on one host and a shard on another, joined by TCP, move 8 million floats by each transport, and by the one that
`transport = "auto"` takes.  A push counts until the shard has applied it.  With the line limited, the share of it that
the floats alone would need at 1 Gbit/s is what counts; TCP and Ethernet take 6 % themselves.

Two replicas and a shard on three hosts then move as many floats over lines of 1 Gbit/s, as float32 and, by
`wire = "bfloat16"`, at half the bytes.  The replicas share the line that leaves the shard.

The hosts are network namespaces of this machine, made by hosts.sh in ../shared/cluster, or in the folder that
DBMPI_TEST_CLUSTER names; needs root and iproute2.  The MPI is that of the Python that runs this.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT / "tests"))
from harness.hosts import NoHostsError, at, hosts, limit_link, mend_link, spread

FLOATS = 8_000_000
BYTES = 4 * FLOATS
GBIT = 1e9 / 8
"""Bytes a second of the limited line."""
OF_THE_LINE = 0.8
TRANSPORTS = ("rma", "p2p", "auto")
SHARD_HOST, WORKER_HOST, OTHER_HOST = "dbh1", "dbh2", "dbh3"
WIRES = ("float32", "bfloat16")
FASTER = 1.8


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    options = common.options(__doc__)
    report = common.Report("hosts", options.json)
    launches, repeats = (1, 3) if options.quick else (3, 5)
    with ExitStack() as stack:
        try:
            stack.enter_context(hosts())
        except NoHostsError as why:
            sys.exit(f"hosts.py {why}")
        for line, limit in (("as fast as it goes", False), ("1 Gbit/s", True)):
            pair = (SHARD_HOST, WORKER_HOST)
            with limited_to_gbit(*pair if limit else ()):
                taken = common.in_turn(launches, **{name: launcher(pair, name, repeats) for name in TRANSPORTS})
            rows = []
            for name, runs in taken.items():
                median = {what: common.median([t for run in runs for t in run[what]]) for what in ("push", "fetch")}
                row = [name, *(f"{BYTES / median[what] / 1e9:.3f}" for what in median)]
                shares = {what: BYTES / median[what] / GBIT for what in median}
                row += [f"{100 * share:.0f} %" if limit else "" for share in shares.values()]
                rows.append((*row, runs[-1]["transport"]))
                for what, share in shares.items():
                    if limit and name == "auto":
                        report.at_least(f"{what} of the line of 1 Gbit/s, transport = auto", share, OF_THE_LINE)
            header = ("transport", "push GB/s", "fetch GB/s", "push, of the line", "fetch, of the line", "used")
            report.table(f"32 MB between two hosts, the line {line}", header, rows)
        all_hosts = (SHARD_HOST, WORKER_HOST, OTHER_HOST)
        with limited_to_gbit(*all_hosts):
            taken = common.in_turn(launches, **{wire: launcher(all_hosts, "auto", repeats, wire) for wire in WIRES})
        compare(report, taken)
    report.finish()


def compare(report: common.Report, taken: dict[str, list[dict[str, Any]]]) -> None:
    """Show how much faster rounded numbers travel."""
    rows, median = [], {}
    for wire, runs in taken.items():
        seconds = {what: [t for run in runs for t in run[what]] for what in ("push", "fetch")}
        seconds["both"] = [sum(pair) for pair in zip(seconds["push"], seconds["fetch"], strict=True)]
        median[wire] = {what: common.median(times) for what, times in seconds.items()}
        row = [wire, *(f"{1e3 * time:.0f}" for time in median[wire].values())]
        rows.append((*row, f"{runs[-1]['bytes'] / 1e6:.1f}", runs[-1]["transport"]))
    ratios = {what: median["float32"][what] / median["bfloat16"][what] for what in median["float32"]}
    rows.append(("float32 / bfloat16", *(f"{ratio:.2f}" for ratio in ratios.values()), "", ""))
    header = ("wire", "push ms", "fetch ms", "both ms", "MB of a push", "used")
    report.table("8 million floats of each of two replicas and a shard on three hosts, lines of 1 Gbit/s", header, rows)
    for what, ratio in ratios.items():
        report.at_least(f"speed of float32's on the wire, {what}", ratio, FASTER)


@contextmanager
def limited_to_gbit(*limited: str) -> Iterator[None]:
    """Let what leaves each of these hosts pass at 1 Gbit/s."""
    try:
        for host in limited:
            limit_link(host, "1gbit", "128kb")
        yield
    finally:
        for host in limited:
            mend_link(host)


def launcher(
    places: Sequence[str], transport: str, repeats: int, wire: str = "float32"
) -> Callable[[], dict[str, Any]]:
    """Return what launches a shard and workers, each on its host, and returns what they tell."""
    command = list(common.on_ranks(len(places), __file__, "--contestant", transport, wire, str(repeats)))
    command[1:1], more = spread(places)

    def launch() -> dict[str, Any]:
        done = subprocess.run(
            at(SHARD_HOST, command, Path.cwd()),
            env=common.environment(1, **more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            check=True,
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return launch


def contestant(transport: str, wire: str, repeats: int) -> None:
    """Be the shard (rank 0) or a worker, which measures and tells rank 0; rank 0 prints."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi.config import ServerSection
    from dbmpi.index.layout import cut
    from dbmpi.mpi import waiting, world
    from dbmpi.mpi.topology import Plan
    from dbmpi.paramserver.rules import Sgd
    from dbmpi.paramserver.store import Store
    from dbmpi.paramserver.wire import compile_wire

    comm, dtype = world.start(), np.dtype(np.float32)
    plan = Plan(shards=1, replicas=comm.size - 1)
    section = ServerSection.model_validate({"transport": transport, "wire": wire})
    compile_wire()
    with Store(comm, plan, cut(FLOATS, plan.shards), section, dtype, FLOATS) as store:
        seconds, moved = np.zeros((2, repeats)), np.zeros(1)
        server = store.server(Sgd(0.01)) if comm.rank == 0 else None
        if server is not None:
            server.begin(None)
            found: dict[str, Any] = {"push": [], "fetch": [], "transport": store.window.transport}
            for worker in range(1, comm.size):
                waiting.complete(comm.Irecv(seconds, worker), "a worker", serve=server.poll)
                waiting.complete(comm.Irecv(moved, worker), "a worker", serve=server.poll)
                for what, times in zip(("push", "fetch"), seconds.tolist(), strict=True):
                    found[what] += times
            print(json.dumps(found | {"bytes": moved[0]}), flush=True)
            return
        client = store.client()
        gradient, parameters = client.gradients[0], np.zeros(FLOATS, dtype)
        gradient[:] = np.random.default_rng(comm.rank).normal(size=FLOATS)
        for number in range(-1, repeats):  # the first one sets up connections, and does not count
            before, times = client.pushed_bytes, [time.perf_counter()]
            client.push(gradient)
            client.wait()
            times.append(time.perf_counter())
            client.fetch(parameters)
            times.append(time.perf_counter())
            if number >= 0:
                seconds[:, number], moved[0] = np.diff(times), client.pushed_bytes - before
        for numbers in (seconds, moved):
            waiting.complete(comm.Isend(numbers, 0), "the shard")


if __name__ == "__main__":
    main()
