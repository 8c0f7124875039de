"""Push and fetch between hosts, with the line as fast as it goes and with one of 1 Gbit/s.

A worker on one host and a shard on another, joined by TCP, move 8 million floats by each transport, and by the one that
`transport = "auto"` takes.  A push counts until the shard has applied it.  With the line limited, the share of it that
the floats alone would need at 1 Gbit/s is what counts; TCP and Ethernet take 6 % themselves.

The hosts are network namespaces of this machine, made by hosts.sh in ../shared/cluster, or in the folder that
DBMPI_TEST_CLUSTER names; needs root and iproute2.  The MPI is that of the Python that runs this.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
SHARD_HOST, WORKER_HOST = "dbh1", "dbh2"


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(sys.argv[2], int(sys.argv[3]))
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
            with limited_to_gbit(limit):
                taken = common.in_turn(launches, **{name: launcher(name, repeats) for name in TRANSPORTS})
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
    report.finish()


@contextmanager
def limited_to_gbit(limit: bool) -> Iterator[None]:
    """Let what leaves each of the two hosts pass at 1 Gbit/s."""
    if not limit:
        yield
        return
    try:
        for host in (SHARD_HOST, WORKER_HOST):
            limit_link(host, "1gbit", "128kb")
        yield
    finally:
        for host in (SHARD_HOST, WORKER_HOST):
            mend_link(host)


def launcher(transport: str, repeats: int) -> Callable[[], dict[str, Any]]:
    """Return what launches a shard and a worker, each on its host, and returns what they tell."""
    command = list(common.on_ranks(2, __file__, "--contestant", transport, str(repeats)))
    command[1:1], more = spread([SHARD_HOST, WORKER_HOST])

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


def contestant(transport: str, repeats: int) -> None:
    """Be the shard (rank 0) or the worker, which measures and tells rank 0; rank 0 prints."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi.config import ServerSection
    from dbmpi.index.layout import cut
    from dbmpi.mpi import waiting, world
    from dbmpi.mpi.topology import Plan
    from dbmpi.paramserver.rules import Sgd
    from dbmpi.paramserver.store import Store

    comm, dtype = world.start(), np.dtype(np.float32)
    plan = Plan(shards=1, replicas=1)
    section = ServerSection.model_validate({"transport": transport})
    with Store(comm, plan, cut(FLOATS, plan.shards), section, dtype, FLOATS) as store:
        seconds = np.zeros((2, repeats))
        if comm.rank == 0:
            server = store.server(Sgd(0.01))
            server.begin(None)
            waiting.complete(comm.Irecv(seconds, 1), "the worker", serve=server.poll)
            push, fetch = seconds.tolist()
            print(json.dumps({"push": push, "fetch": fetch, "transport": store.window.transport}), flush=True)
            return
        client = store.client()
        gradient, parameters = client.gradients[0], np.zeros(FLOATS, dtype)
        gradient.fill(1)
        for number in range(-1, repeats):  # the first one sets up connections, and does not count
            times = [time.perf_counter()]
            client.push(gradient)
            client.wait()
            times.append(time.perf_counter())
            client.fetch(parameters)
            times.append(time.perf_counter())
            if number >= 0:
                seconds[:, number] = np.diff(times)
        waiting.complete(comm.Isend(seconds, 0), "the shard")


if __name__ == "__main__":
    main()
