"""The parameter server as a whole: plan the memory of all ranks, open it, and connect shards and workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from mpi4py import MPI

from dbmpi.config import ServerSection
from dbmpi.errors import UserError
from dbmpi.index.layout import Stretch
from dbmpi.mpi import window as windows
from dbmpi.mpi.blocking import Collective
from dbmpi.mpi.transport import transport_between
from dbmpi.mpi.window import Window
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.memory import Memory, chunk_elements, lines
from dbmpi.paramserver.rules import Rule
from dbmpi.paramserver.server import Server

if TYPE_CHECKING:
    from dbmpi.mpi.topology import Plan


class Store(Collective):
    """The shards' memory and one rank's ways to it (collective to open and to free).

    Attributes
    ----------
    ranges
        The range of the flat vector that each shard holds.
    notes
        What the user should know of how the memory is shared; the same on all ranks.
    overlap
        Whether a worker may fetch and push while it computes.
    window
        The window of all ranks.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        plan: Plan,
        ranges: Sequence[range],
        section: ServerSection,
        dtype: np.dtype[np.floating],
        own: int,
        *,
        shared: bool = True,
        chunk: int | None = None,
    ) -> None:
        """Open the memory.

        Parameters
        ----------
        comm
            All ranks of the plan.
        plan
            Which rank plays which role.
        ranges
            The range of the flat vector that each shard holds.
        section
            How gradients and parameters travel.
        dtype
            Of the parameters.
        own
            Elements of a gradient of this rank, if it is a worker.
        shared
            Whether ranks of a host may share memory.
        chunk
            Elements of a chunk in the inbox; by default as many as the section allows.

        Raises
        ------
        UserError
            On every rank, if the section asks for what these ranks and hosts do not have.
        """
        self._plan = plan
        self._dtype = dtype
        self._own = own
        self.overlap = section.overlap == "threads" and MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._gradients = 2 if self.overlap and section.gradients == "whole" else 1
        self._shard = plan.shard_of(comm.rank)
        self._worker = plan.worker_of(comm.rank)
        self.ranges = tuple(ranges)
        self.notes: tuple[str, ...] = ()
        if section.overlap == "threads" and not self.overlap:
            self.notes += ("this MPI does not let several threads call it: nothing is overlapped",)
        self._common = section.fetch == "shared"
        self._consistent = section.consistent
        hosts = windows.hosts(comm)
        if self._common:
            _check_common(plan, hosts, section.align)
        if chunk is None:
            chunk = chunk_elements(section.inbox_mib * 2**20, section.chunk_kib * 2**10, plan.workers, dtype.itemsize)
        near = _neighbours(plan, hosts) if section.push == "shared" else [()] * plan.shards
        nobody: list[tuple[int, ...]] = [()] * plan.shards
        for in_place in (near, nobody):
            self._memories = [self._memory(shard, chunk, in_place[shard]) for shard in range(plan.shards)]
            lacks = windows.missing(comm, self._nbytes())
            if lacks <= 0:
                break
        if lacks > 0 and shared:
            self._refuse_or_note(lacks)
        if lacks <= 0 and shared and in_place is nobody and any(near):
            less = ' (server.gradients = "layers" needs less)' if section.gradients == "whole" else ""
            self.notes += (f"/dev/shm has no room for gradients that shards read in place{less}: they are copied",)
        if not shared:
            self._memories = [self._memory(shard, chunk, nobody[shard]) for shard in range(plan.shards)]
        memories = hosts if shared and lacks <= 0 else np.arange(comm.size)
        transport, notes = transport_between(comm, section.transport, memories)
        self.notes += notes
        self.window = Window.allocate(comm, self._nbytes(), shared=shared, transport=transport)
        self._whole = self._common_parameters() if self._common else None

    def server(self, rule: Rule) -> Server:
        """Return the server of this rank's shard."""
        assert self._shard is not None
        held, memory = self.ranges[self._shard], self._memories[self._shard]
        if self._whole is not None:
            parameters = self._whole[held.start : held.stop]
        else:
            parameters = self._vector(self.window.local, memory.parameters, len(held))
        return Server(self.window, memory, self._shard, self._plan.worker_ranks, rule, parameters, self._consistent)

    def client(self, runs: Sequence[Stretch] | None = None, serve: Callable[[], bool] | None = None) -> Client:
        """Return the client of this rank's worker.

        Parameters
        ----------
        runs
            Which parts of the shards' vector the worker's own is made of; by default all.
        serve
            Called while the rank waits.
        """
        assert self._worker is not None
        gradients = []
        if any(memory.reads(self._worker) for memory in self._memories):
            size = lines(self._own * self._dtype.itemsize)
            start = self._words()
            gradients = [
                self._vector(self.window.local, start + number * size, self._own) for number in range(self._gradients)
            ]
        return Client(
            self.window,
            self._memories,
            self._plan.shard_ranks,
            self.ranges,
            self._worker,
            gradients=gradients,
            parameters=None if self._whole is None else _own(self._whole, runs),
            serve=serve,
            runs=runs,
            counts=self._worker % self._plan.partitions == 0,
            consistent=self._consistent,
        )

    def free(self) -> None:
        """Give the memory back (collective); a second call does nothing."""
        self._whole = None
        self.window.free()

    def _memory(self, shard: int, chunk: int, in_place: tuple[int, ...]) -> Memory:
        elements = len(self.ranges[shard])
        chunk = min(chunk, elements)
        if self._common:
            elements = self.ranges[-1].stop if shard == 0 else 0
        plan = self._plan
        return Memory(plan.shards, plan.workers, elements, self._dtype.itemsize, chunk, plan.partitions, in_place)

    def _words(self) -> int:
        """Return the bytes of this rank's window before its gradients."""
        return self._memories[0].words_nbytes if self._shard is None else self._memories[self._shard].nbytes

    def _nbytes(self) -> int:
        """Return the bytes of this rank's window."""
        nbytes = self._words()
        worker = self._worker
        if worker is not None and any(memory.reads(worker) for memory in self._memories):
            nbytes += self._gradients * lines(self._own * self._dtype.itemsize)
        return nbytes

    def _common_parameters(self) -> np.ndarray:
        """Return the whole parameters, which lie on the first shard's rank."""
        near = self.window.near(self._plan.shard_ranks[0])
        assert near is not None
        return self._vector(near, self._memories[0].parameters, self.ranges[-1].stop)

    def _vector(self, memory: np.ndarray, start: int, elements: int) -> np.ndarray:
        vector: np.ndarray = memory[start : start + elements * self._dtype.itemsize].view(self._dtype)
        return vector

    def _refuse_or_note(self, lacks: int) -> None:
        """Say that not even the parameters fit into shared memory."""
        lacking = f"/dev/shm lacks {lacks / 2**20:.0f} MiB for the memory that the ranks of a host share"
        fix = "enlarge it (docker run --shm-size, or mount -o remount,size=... /dev/shm)"
        if self._common:
            raise UserError(f'server.fetch = "shared": {lacking}; {fix}, or set server.fetch = "copied"')
        self.notes += (f"{lacking}: they send each other copies instead, which is slower; {fix}",)


def _neighbours(plan: Plan, hosts: np.ndarray) -> list[tuple[int, ...]]:
    """Return for each shard the clients on its host; the shards of a host share one tuple."""
    on_host: dict[int, list[int]] = {int(hosts[holder]): [] for holder in plan.shard_ranks}
    for client, rank in enumerate(plan.worker_ranks):
        on_host.get(int(hosts[rank]), []).append(client)
    shared = {host: tuple(clients) for host, clients in on_host.items()}
    return [shared[int(hosts[holder])] for holder in plan.shard_ranks]


def _check_common(plan: Plan, hosts: np.ndarray, align: Literal["equal", "partition"]) -> None:
    """Refuse to share the parameters where they cannot be."""
    number = len(set(hosts.tolist()))
    if number > 1:
        raise UserError(
            f'server.fetch = "shared": the ranks run on {number} hosts, and only the ranks of one can compute on the '
            'same memory; set server.fetch = "copied", or start all ranks on one host'
        )
    if plan.partitions > 1 and align == "equal":
        raise UserError(
            f'server.fetch = "shared": a replica has {plan.partitions} partitions, and the parameters of one are no '
            'single piece of the whole; set server.align = "partition", or server.fetch = "copied"'
        )


def _own(whole: np.ndarray, runs: Sequence[Stretch] | None) -> np.ndarray:
    """Return a worker's own vector, a piece of the whole."""
    if runs is None:
        return whole
    start = runs[0].start if runs else 0
    for run in runs:
        # The caller has refused tensors that several partitions hold; then all that is left is in order.
        assert run.start == start + run.local
    return whole[start : start + sum(run.length for run in runs)]
