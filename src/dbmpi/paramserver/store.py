"""The parameter server as a whole: plan the memory of all ranks, open it, and connect shards and workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from mpi4py import MPI

from dbmpi.config import ServerSection
from dbmpi.errors import UserError
from dbmpi.index.layout import Stretch
from dbmpi.kernels.bfloat16 import BFLOAT16
from dbmpi.kernels.memory import aligned_empty
from dbmpi.mpi import window as windows
from dbmpi.mpi.blocking import Collective
from dbmpi.mpi.transport import transport_between
from dbmpi.mpi.window import Window
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.memory import Memory, chunk_elements, lines
from dbmpi.paramserver.protocol import ShardMap
from dbmpi.paramserver.round_server import RoundServer
from dbmpi.paramserver.rules import Rule
from dbmpi.paramserver.server import Server

if TYPE_CHECKING:
    from dbmpi.mpi.topology import Plan


class Store(Collective):
    """The shards' memory and one rank's ways to it (collective to open and to free).

    Parameters
    ----------
    comm
        All ranks of the plan.
    plan
        The role of each rank.
    ranges
        The range of the flat vector that each shard holds.
    section
        How gradients and parameters travel.
    dtype
        Of the parameters.
    gradient_size
        Elements of a buffer to compute a gradient in, if this rank is a worker.
    shared
        Whether ranks of a host may share memory.
    chunk
        Elements of a chunk in the inbox; by default as many as the section allows.
    compensates
        Whether workers hand over the parameters that a gradient was computed at beside it, for delay compensation.
    kept_size
        Elements of these, if so and this rank is a worker.
    rounded
        Whether workers that compute on the shards' memory multiply bfloat16, which the shards then keep there, too.
    hosts
        For each rank the lowest one on its host, where that is known already.

    Attributes
    ----------
    shards
        Where the shards are.
    ranges, window
        Those of the shards.
    notes
        What a user should know about how the memory is shared; the same on all ranks.
    overlap
        Whether a worker may fetch and push while it computes.

    Raises
    ------
    UserError
        On every rank, if these ranks and hosts cannot do what the section asks for.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        plan: Plan,
        ranges: Sequence[range],
        section: ServerSection,
        dtype: np.dtype[np.floating],
        gradient_size: int,
        *,
        shared: bool = True,
        chunk: int | None = None,
        compensates: bool = False,
        kept_size: int = 0,
        rounded: bool = False,
        hosts: np.ndarray | None = None,
    ) -> None:
        self._plan = plan
        self._dtype = dtype
        self._gradient_size, self._kept_size = gradient_size, kept_size
        self._vectors = 2 if compensates else 1
        self.overlap = section.overlap == "threads" and MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._gradients = 2 if self.overlap and section.gradients == "whole" else 1
        self._shard = plan.shard_of(comm.rank)
        self._worker = plan.worker_of(comm.rank)
        self.ranges = tuple(ranges)
        self.notes: tuple[str, ...] = ()
        if section.overlap == "threads" and not self.overlap:
            self.notes += ("this MPI does not let several threads call it: nothing is overlapped",)
        self._common = section.fetch == "shared"
        self._rounds = rounded and self._common
        hosts = windows.hosts(comm) if hosts is None else hosts
        if self._common:
            check_common(plan, hosts, section.align)
        if chunk is None:
            inbox = section.inbox_mib * 2**20 / self._vectors
            chunk = chunk_elements(inbox, section.chunk_kib * 2**10, plan.workers, dtype.itemsize)
        self._wire = section.wire == "bfloat16" and _apart(plan, hosts if shared else np.arange(comm.size))
        none: list[tuple[int, ...]] = [()] * plan.shards
        near = _neighbours(plan, hosts) if shared and section.push == "shared" else none
        for in_place in (near, none):
            self._memories = [self._memory(shard, chunk, in_place[shard]) for shard in range(plan.shards)]
            lacks = windows.missing(comm, self._nbytes())
            if lacks <= 0:
                break
        if shared and lacks > 0:
            self._refuse_or_note(lacks)
        if shared and lacks > 0 and section.wire == "bfloat16":  # the ranks of a host, too, send each other copies
            shared, self._wire = False, _apart(plan, np.arange(comm.size))
            self._memories = [self._memory(shard, chunk, ()) for shard in range(plan.shards)]
        shared = shared and lacks <= 0
        if shared and in_place is none and any(near):
            less = ' (server.gradients = "layers" needs less)' if section.gradients == "whole" else ""
            self.notes += (f"/dev/shm has no room for gradients that shards read in place{less}: they are copied",)
        transport, notes = transport_between(comm, section.transport, hosts if shared else np.arange(comm.size))
        self.notes += notes
        self.window = Window.allocate(comm, self._nbytes(), shared=shared, transport=transport)
        self.shards = ShardMap(
            window=self.window,
            memories=self._memories,
            ranks=plan.shard_ranks,
            ranges=self.ranges,
            consistent=section.consistent,
            discard_above=section.max_staleness if section.on_stale == "discard" else 0,
            rounded=self._wire,
        )
        self._whole = self._common_parameters() if self._common else None
        self._rounded = self._common_rounded() if self._rounds else None

    def server(self, rule: Rule, *, rounds: bool = False) -> Server:
        """Return the server of this rank's shard.

        Parameters
        ----------
        rule
            Applies gradients.
        rounds
            Whether all of a round are applied together.
        """
        assert self._shard is not None
        held = self.ranges[self._shard]
        if self._whole is not None:
            parameters = self._whole[held.start : held.stop]
        else:
            parameters = self._vector(self.window.local, self._memories[self._shard].parameters, len(held))
        kind = RoundServer if rounds else Server
        server = kind(self.shards, self._shard, self._plan.worker_ranks, rule, parameters)
        if self._rounded is not None:
            server.rounded = self._rounded[held.start : held.stop]
        elif self._wire:
            start = self._memories[self._shard].rounded_parameters
            server.rounded = self.window.local[start : start + len(held) * BFLOAT16.itemsize].view(BFLOAT16)
        return server

    def client(
        self,
        stretches: Sequence[Stretch] | None = None,
        parts: Sequence[range] | None = None,
        serve: Callable[[], bool] | None = None,
        fetched: Sequence[range] | None = None,
    ) -> Client:
        """Return the client of this rank's worker.

        Parameters
        ----------
        stretches
            The pieces of the shards' vector that make up the worker's own; by default all.
        parts
            The ranges of the worker's own vector that are pushed one by one; by default one range, all of it.
        serve
            Called while the rank waits.
        fetched
            The ranges of the worker's own vector that are fetched into arrays of their own.
        """
        assert self._worker is not None
        size, nbytes = self._gradient_size, lines(self._gradient_size * self._dtype.itemsize)
        if self._in_place:
            starts = [self._words() + number * nbytes for number in range(self._gradients)]
            gradients = [self._vector(self.window.local, start, size) for start in starts]
        else:
            gradients = [np.zeros(size, self._dtype) for _ in range(self._gradients)]
        kept = None
        if self._vectors > 1 and self._in_place:
            kept = self._vector(self.window.local, self._words() + self._gradients * nbytes, self._kept_size)
        elif self._vectors > 1:
            kept = aligned_empty(self._kept_size, self._dtype)
        client = Client(
            self.shards,
            self._worker,
            stretches=stretches,
            parts=parts,
            fetched=fetched,
            gradients=gradients,
            parameters=None if self._whole is None else _own(self._whole, stretches),
            kept=kept,
            serve=serve,
        )
        client.rounded = None if self._rounded is None else _own(self._rounded, stretches)
        return client

    def free(self) -> None:
        """Give the memory back (collective); a second call does nothing."""
        self._whole = self._rounded = None
        self.window.free()

    def _memory(self, shard: int, chunk: int, in_place: tuple[int, ...]) -> Memory:
        elements = len(self.ranges[shard])
        chunk = min(chunk, elements)
        if self._common:
            elements = self.ranges[-1].stop if shard == 0 else 0
        plan, size, vectors = self._plan, self._dtype.itemsize, self._vectors
        rounded = self._rounds or self._wire
        return Memory(plan.shards, plan.workers, elements, size, chunk, plan.partitions, in_place, vectors, rounded)

    def _words(self) -> int:
        """Return the bytes of this rank's window before its gradients."""
        return self._memories[0].words_nbytes if self._shard is None else self._memories[self._shard].nbytes

    @property
    def _in_place(self) -> bool:
        """Whether some shard reads this rank's gradients where they lie."""
        return self._worker is not None and any(memory.reads(self._worker) for memory in self._memories)

    def _nbytes(self) -> int:
        """Return the bytes of this rank's window."""
        sizes = [*[self._gradient_size] * self._gradients, self._kept_size] if self._in_place else []
        return self._words() + sum(lines(size * self._dtype.itemsize) for size in sizes)

    def _common_parameters(self) -> np.ndarray:
        """Return the whole parameters, which are in the first shard's window."""
        near = self.window.near(self._plan.shard_ranks[0])
        assert near is not None
        return self._vector(near, self._memories[0].parameters, self.ranges[-1].stop)

    def _common_rounded(self) -> np.ndarray:
        """Return the whole parameters in bfloat16, behind these."""
        near = self.window.near(self._plan.shard_ranks[0])
        assert near is not None
        start, elements = self._memories[0].rounded_parameters, self.ranges[-1].stop
        found: np.ndarray = near[start : start + elements * BFLOAT16.itemsize].view(BFLOAT16)
        return found

    def _vector(self, memory: np.ndarray, start: int, elements: int) -> np.ndarray:
        vector: np.ndarray = memory[start : start + elements * self._dtype.itemsize].view(self._dtype)
        return vector

    def _refuse_or_note(self, lacks: int) -> None:
        """Refuse the run, or note that not even the parameters fit into shared memory."""
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


def _apart(plan: Plan, hosts: np.ndarray) -> bool:
    """Return whether some replica and some shard share no memory; `hosts` says which ranks do."""
    learning = {int(hosts[rank]) for rank in plan.worker_ranks[: plan.replicas * plan.partitions]}
    return len(learning | {int(hosts[rank]) for rank in plan.shard_ranks}) > 1


def check_common(plan: Plan, hosts: np.ndarray, align: Literal["equal", "partition"]) -> None:
    """Refuse to share the parameters where the `plan`, the `hosts` of its ranks or `align` do not allow it."""
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


def _own(whole: np.ndarray, stretches: Sequence[Stretch] | None) -> np.ndarray:
    """Return a worker's own vector, a piece of the whole."""
    if stretches is None:
        return whole
    start = stretches[0].start if stretches else 0
    for stretch in stretches:
        # The caller has refused tensors that several partitions hold, so the stretches are in order.
        assert stretch.start == start + stretch.local
    return whole[start : start + sum(stretch.length for stretch in stretches)]
