"""A shard of a Sandblaster run: executes the coordinator's commands on its part of the vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.saver import ShardSaver
from dbmpi.kernels import updates
from dbmpi.methods.local_space import LocalSpace
from dbmpi.mpi import blocking, waiting
from dbmpi.mpi.failures import RankLost
from dbmpi.mpi.tags import Tag
from dbmpi.sandblaster.board import Bundles
from dbmpi.sandblaster.commands import Command, execute

if TYPE_CHECKING:
    from dbmpi.index.layout import Stretch
    from dbmpi.mpi.topology import Plan
    from dbmpi.mpi.window import Window


class BundleSource(NamedTuple):
    """What a shard takes of the bundles of one worker."""

    bundles: Bundles
    pieces: Sequence[Stretch]
    """With starts within the shard."""


class ShardSpace(LocalSpace):
    """The vectors of one shard, float32, and where gradients come from.

    Parameters
    ----------
    comm, shards
        The communicator of all ranks, and that of the shards.
    window
        This rank's window.
    sources
        For every replica, its workers.
    version
        Of the parameters, for checkpoints.
    vectors
        The parameters, and what is carried along unchanged.

    Attributes
    ----------
    ended
        Whether the run is over.
    whole
        Whether each command that has arrived was carried out to its end.
    saver
        Writes the shard's part of checkpoints.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        shards: MPI.Intracomm,
        window: Window,
        sources: Sequence[Sequence[BundleSource]],
        version: int,
        vectors: Mapping[str, np.ndarray],
    ) -> None:
        size = len(vectors["parameters"])
        self._comm, self._others, self._window, self._sources = comm, shards, window, sources
        super().__init__(size, np.float32, self._sum_over_shards, shards.rank, shards.size, vectors)
        self.version = version
        self.saver: ShardSaver | None = None
        self.ended = False
        self.whole = True
        self._missed = 0

    def accrue(self, name: str, replica: int, bundle: int) -> None:
        """Add the gradient that a replica has committed in a `bundle` to the vector `name`.

        The worker has no part in it: its memory is read, even while it computes or is halted, and where it has died on
        this host.  Where it cannot be read any more the next :meth:`meet` counts it.
        """
        target = self.writable(name)
        try:
            for source in self._sources[replica]:
                self._accrue(target, source, bundle)
        except RankLost:
            self._missed += 1

    def write_with(self, saver: ShardSaver) -> None:
        """Let a `saver` write this shard's part of checkpoints."""
        self.saver, self.before_change = saver, saver.keep

    def meet(self) -> np.ndarray:
        """Wait for all shards; what was written before is then visible in their windows.

        Returns how many bundles some shard could not read since the last time, because their worker has died.
        """
        self._window.sync()
        missed, self._missed = self._missed, 0
        return self._sum_over_shards(np.array([float(missed)]))

    def snapshot(self, step: int, identity: int, names: Sequence[str], last: bool) -> None:
        """Take vectors for a checkpoint.

        Parameters
        ----------
        step, identity, last
            As for :meth:`dbmpi.checkpoint.saver.ShardSaver.begin`.
        names
            Of the vectors.
        """
        assert self.saver is not None
        self.saver.begin(step, identity, {name: self.array(name) for name in names}, self.version, last=last)

    def end(self) -> None:
        """Note that the run is over."""
        self.ended = True

    def poll(self) -> bool:
        """Execute the next command, if one has arrived: what all shards but the lead's do."""
        status = MPI.Status()
        saved = self.saver is not None and self.saver.poll()
        if self.ended or not self._comm.Iprobe(0, Tag.COMMANDS, status):
            return saved
        data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        with blocking.blocking("the rest of a command of the coordinator"):
            self._comm.Recv([data, MPI.BYTE], 0, Tag.COMMANDS)
        self.whole = False
        execute(self, Command.decode(data.tobytes()))
        self.whole = True
        return True

    def _accrue(self, target: np.ndarray, source: BundleSource, bundle: int) -> None:
        """Add what a shard takes of one worker's bundle."""
        bundles = source.bundles
        rank, begin = bundles.rank, bundles.gradient_of(bundle)
        near = self._window.near(rank)
        if near is not None:
            self._window.sync()
        for start, local, length, _ in source.pieces:
            offset = begin + 4 * local
            if near is not None:
                part = near[offset : offset + 4 * length].view(np.float32)
            else:
                part = np.empty(length, np.float32)
                self._window.get(rank, offset, part)
            updates.add(target[start : start + length], part)
        if source.pieces:
            self._window.store(rank, bundles.taken(self._others.rank, bundle), bundle + 1)

    def _sum_over_shards(self, values: np.ndarray) -> np.ndarray:
        if self._others.size == 1:
            return values
        return waiting.allreduce(self._others, values, MPI.SUM, "the other shards to carry out a command")


class Shards:
    """All shards, as the lead's rank commands them.

    Parameters
    ----------
    comm, plan
        The communicator of all ranks, and their roles.
    lead
        The lead's own shard.
    """

    def __init__(self, comm: MPI.Intracomm, plan: Plan, lead: ShardSpace) -> None:
        self.comm, self.plan, self.lead = comm, plan, lead
        self._leaving: list[tuple[MPI.Request, np.ndarray]] = []

    def submit(self, command: Command) -> np.ndarray:
        """Let all shards carry out a command; return the result on the lead's, which is the same on all."""
        data = np.frombuffer(command.encode(), np.uint8)
        self._leaving = [(request, sent) for request, sent in self._leaving if not request.Test()]
        for rank in self.plan.shard_ranks[1:]:
            self._leaving.append((self.comm.Isend([data, MPI.BYTE], rank, Tag.COMMANDS), data))
        return execute(self.lead, command)

    def end(self) -> None:
        """Let the shards end, and wait until the last commands have left."""
        self.submit(Command("end", ()))
        for request, _ in self._leaving:
            waiting.complete(request, "the last commands to leave")
