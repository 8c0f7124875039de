"""The start of a run in worlds of 8, 64 and 512 ranks: nothing grows faster than the world, on no rank.

Chosen ranks go through the true start of a run, up to the first step of a worker and the first look of a shard, with a
stand-in for MPI that counts.  Work is counted in lines of dbmpi that are carried out, memory as Python's and NumPy's
peak and the windows.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mpi4py
import numpy as np
import pytest
from parallel import tiny
from unit.counted_mpi import Comm, Counted, Mpi
from unit.partition_layers import NETWORKS

import dbmpi
from dbmpi.data.run_data import Supplied
from dbmpi.downpour import run as downpour_run
from dbmpi.downpour import shard
from dbmpi.errors import RunFailed
from dbmpi.index.layout import Layout
from dbmpi.machine.signals import StopSignal
from dbmpi.mpi import topology, window
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.paramserver import bottleneck
from dbmpi.replica.arrangement import aligned
from dbmpi.replica.exchange import Exchange
from dbmpi.replica.group import Group
from dbmpi.replica.parameters import LocalParameters
from dbmpi.replica.placement import automatic
from dbmpi.replica.plan import plan_exchanges
from dbmpi.sandblaster import run
from dbmpi.sandblaster.coordinator import Coordinator
from dbmpi.session import Session

TRAIN = import_module("dbmpi.runs.training")
WORLDS = (8, 64, 512)
HOST = 4
"""Ranks of a host."""
NAME = 64
"""Bytes of the name of a host."""
INBOX = 16 << 20
HEAP = 1800
"""Bytes of Python's objects for each rank of the world: most for a shard's queue, piece and memory on a client."""
UNITS = 500
_PARAMETERS = (tiny.FEATURES + 1) * UNITS + (UNITS + 1) * UNITS + (UNITS + 1) * tiny.CLASSES
SOURCE = str(Path(dbmpi.__file__).parent)


class Start(NamedTuple):
    """What the start of one rank came to."""

    calls: Counter[str]
    moved: int
    windows: int
    heap: int
    lines: int


class Started(RunFailed):
    """A rank has come to its first step."""


def cost(work: Callable[[], object]) -> tuple[int, int]:
    """Return how many lines of dbmpi some work carries out, and its peak of memory in bytes."""
    lines = 0

    def line(frame: Any, event: str, arg: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return line

    def call(frame: Any, event: str, arg: object) -> Any:
        return line if frame.f_code.co_filename.startswith(SOURCE) else None

    before = sys.gettrace()
    gc.collect()  # its moments would else decide about the peak
    gc.disable()
    tracemalloc.start()
    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(before)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.enable()
    return lines, peak


class Starter:
    """Starts ranks of one world."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, world: int, sections: dict[str, Any]) -> None:
        self._patch = monkeypatch
        self._run = tiny.describe(directory, **sections)
        self.plan = topology.plan(self._run.topology, world)
        self._said: dict[int, np.ndarray] = {}

        def started(*_: object, **__: object) -> None:
            raise Started

        monkeypatch.setattr(downpour_run, "downpour", started)
        monkeypatch.setattr(shard.Shard, "serve", started)
        monkeypatch.setattr(Coordinator, "run", started)
        monkeypatch.setattr(run, "waiting", SimpleNamespace(until=started, STALL_SECONDS=1.0, LONG_SECONDS=1.0))
        # What does not depend on the world, or on this machine alone.
        monkeypatch.setattr(Session, "_use_kernels", lambda *_: None)
        monkeypatch.setattr(run, "use_kernels", lambda: None)
        monkeypatch.setattr(bottleneck, "copy_bandwidth", lambda: 1e10)
        monkeypatch.setattr(window, "_shared_memory_free", lambda: 1 << 40)

    def start(self, rank: int) -> Start:
        """Let a rank come to its first step."""
        plan = self.plan
        replica = (plan.worker_of(rank) or 0) // plan.partitions * plan.partitions
        first_on_hosts = range(0, plan.world, HOST)
        splits = [
            first_on_hosts,
            plan.shard_ranks,
            plan.worker_ranks,
            plan.worker_ranks[replica : replica + plan.partitions],
        ]
        counted = Counted(rank, plan.world, HOST, splits, self._said)
        mpi = Mpi(counted)
        self._patch.setattr(mpi4py, "MPI", mpi)
        self._patch.setattr(window, "MPI", mpi)

        def work() -> None:
            everybody = Comm(counted, range(plan.world))
            with pytest.raises(Started), ExitStack() as stack:
                TRAIN.run_once(self._run, stack, supplied=Supplied(), comm=everybody, stop=StopSignal())

        lines, heap = cost(work)
        return Start(counted.calls, counted.moved, counted.windows, heap, lines)


KINDS = {
    "separate": lambda world: {"topology": {"shards": world // 8}},
    "colocated": lambda world: {"topology": {"shards": world, "colocate": True}},
    "partitions": lambda world: {
        "topology": {"shards": world // 4, "partitions": 3},
        "server": {"align": "partition", "transport": "p2p"},
    },
    "sandblaster": lambda world: {"topology": {"shards": world // 8}, "optimizer": {"method": "sandblaster"}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_start_of_a_rank_grows_no_faster_than_the_world(kind, tmp_path, monkeypatch):
    tiny.write_data(tmp_path)
    found: dict[str, dict[int, Start]] = {}
    for world in WORLDS:
        sections = KINDS[kind](world)
        sections["server"] = {"inbox_mib": INBOX >> 20, **sections.get("server", {})}
        sections["network"] = {"layers": ({"units": UNITS}, {"units": UNITS}, {"units": tiny.CLASSES})}
        starter = Starter(tmp_path, monkeypatch, world, sections)
        plan = starter.plan
        # First those that tell the others something: the first worker about the data, then rank 0 about the rest.
        ranks = {
            "first shard": plan.shard_ranks[0],
            "first worker": plan.worker_ranks[0],
            "last worker": plan.worker_ranks[-1],
            "last shard": plan.shard_ranks[-1],
        }
        with suppress(Exception):  # also loads what is loaded late
            starter.start(plan.worker_ranks[0])
        for role, rank in ranks.items():
            found.setdefault(role, {})[world] = starter.start(rank)
    for role, starts in found.items():
        few, more, many = (starts[world] for world in WORLDS)
        assert few.calls == more.calls == many.calls, role
        assert "Isend" not in many.calls, role
        # Numbers of eight bytes, of each rank, and a bit for each shard; the lead gets the names of the hosts.
        names = NAME / HOST if ranks[role] == 0 else 0
        assert many.moved - more.moved <= (8.25 + names) * (WORLDS[2] - WORLDS[1]), role
        slopes = [
            {name: (getattr(after, name) - getattr(before, name)) / ranks for name in ("lines", "heap")}
            for before, after, ranks in ((few, more, WORLDS[1] - WORLDS[0]), (more, many, WORLDS[2] - WORLDS[1]))
        ]
        # The lead has more to do, which knows all replicas; the last shard of the smallest world may be it.
        least = 24 if ranks[role] in (0, starter.plan.shard_ranks[-1]) else 12
        assert slopes[1]["lines"] <= max(2 * slopes[0]["lines"], least), (role, slopes)
        assert slopes[1]["heap"] <= HEAP, (role, slopes)
        for world, start in starts.items():
            # Two gradients of a worker or a shard's part, the inbox, headers of the clients on the host; and of each
            # client of another host four headers and some words.
            assert start.windows <= 8 * _PARAMETERS + INBOX + 2**16 + 600 * world, (role, world)
            assert start.heap <= 16 * _PARAMETERS + 2**20 + HEAP * world, (role, world)


@pytest.mark.parametrize(("network", "near"), [("images-8", True), ("speech", True), ("speech", False)])
@pytest.mark.slow
def test_the_plans_of_a_rank_grow_no_faster_than_the_partitions(network, near):
    layers = NETWORKS[network]()
    layout = Layout(tuple(tensor for layer in layers for tensor in layer.tensors.values()))
    costs = []
    sizes = (9, 36, 144)
    for partitions in sizes:

        def work(partitions: int = partitions) -> None:
            counted = Counted(partitions // 2, partitions, partitions if near else 1, [], {})
            group = Group(Comm(counted, range(partitions)))
            assert group.near == near
            placement = automatic(layers, partitions)
            LocalParameters(layers, layout, placement, group, np.dtype(np.float32))
            for plan in plan_exchanges(layers, placement):
                Exchange(group, plan.inputs)
                if plan.outputs is not None:
                    Exchange(group, plan.outputs)
            aligned(layers, layout, placement, 3 * partitions)

        costs.append(cost(work))
    for what in zip(*costs, strict=True):
        few, more, many = (value / partitions for value, partitions in zip(what, sizes, strict=True))
        assert more <= 1.2 * few
        assert many <= 1.2 * more


def test_an_order_to_all_ranks_looks_at_each_message_a_few_times():
    """Also where no message leaves before all are sent."""
    looks = 0

    class Leaving:
        def Test(self) -> bool:  # noqa: N802
            nonlocal looks
            looks += 1
            return looks > 2 * 512

    class Never(Comm):
        def Isend(self, values: np.ndarray, rank: int, tag: int) -> Any:  # noqa: N802
            super().Isend(values, rank, tag)
            return Leaving()

    counted = Counted(0, 512, HOST, [], {})
    mailbox = Mailbox(Never(counted, range(512)), Role.SHARD)
    for rank in range(512):
        mailbox.send(rank, Role.WORKER, MessageKind.END)
    assert counted.calls["Isend"] == 512
    assert looks <= 2 * 512
    mailbox.close()
    assert looks > 2 * 512 + 500
