"""How a client copies the parameters that the shards hold: in place, between hosts, or between two pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from dbmpi.mpi import waiting
from dbmpi.paramserver.holdings import Holdings
from dbmpi.paramserver.protocol import ShardMap
from dbmpi.paramserver.wire import landing, widen_landed

FETCHES, PUSHES = 0, 1
"""What a client announces to shards on other hosts."""


class ShardCopies:
    """One client's ways to the parameters of all shards.

    Parameters
    ----------
    shards
        Where the shards are.
    number
        Number of the client.
    held
        The pieces of the client's own vector that they hold.
    parameters
        This client's own vector where the shards hold it, if this worker is to compute on it.

    Attributes
    ----------
    parameters
        As given.
    fetched_bytes
        Bytes of parameters copied from the shards so far.
    fetched_pieces
        Number of transfers.
    """

    def __init__(self, shards: ShardMap, number: int, held: Holdings, parameters: np.ndarray | None) -> None:
        self._shards, self._number, self._held = shards, number, held
        self._window, self._memories, self._ranks = shards.window, shards.memories, shards.ranks
        self.parameters = parameters
        self.fetched_bytes = self.fetched_pieces = 0
        # Every client begins with another shard, so that they do not all crowd at the first one.
        holders = [shard for shard in range(len(shards.ranks)) if self._held.whole[shard]]
        turn = number % max(len(holders), 1)
        self._order = holders[turn:] + holders[:turn]
        distant = [shard for shard in self._order if shards.window.near(shards.ranks[shard]) is None]
        self._unheard = distant if shards.window.transport == "rma" else []

    def copy(self, *parameters: np.ndarray, serve: Callable[[], bool] | None = None, exact: bool = False) -> list[int]:
        """Copy the parameters whether own pushes have been applied or not; return the shards' versions before that.

        Parameters
        ----------
        *parameters
            As for :meth:`fetch`.
        serve
            Called meanwhile; only the worker's own thread may do that.
        exact
            As for :meth:`fetch`.
        """
        versions, landed = [0] * len(self._ranks), list[np.ndarray]()
        with self._announced(FETCHES):
            for shard in self._order:
                if self._shards.consistent:
                    versions[shard] = self._copy_consistently(shard, parameters, serve, exact)
                else:
                    versions[shard] = self._version(shard)
                    landed += self._begin_copy(shard, parameters, exact)
            self._window.complete_gets()
        for part in landed:
            widen_landed(part)
        return versions

    def _version(self, shard: int) -> int:
        memory = self._memories[shard]
        return self._window.load(self._ranks[shard], memory.version(self._number % memory.partitions))

    def _begin_copy(self, shard: int, parameters: tuple[np.ndarray, ...], exact: bool) -> list[np.ndarray]:
        """Begin to copy a shard's parameters, unless the vector is the shard's own memory; return what to widen."""
        memory, rank = self._memories[shard], self._ranks[shard]
        landed, rounded = list[np.ndarray](), self._shards.rounded and not exact and self._window.near(rank) is None
        for vector, held in zip(parameters, self._held.fetched, strict=True):
            for piece in held[shard] if vector is not self.parameters else ():
                arriving = part = vector[piece.local : piece.local + piece.length]
                if self.parameters is not None:
                    np.copyto(part, self.parameters[piece.local : piece.local + piece.length])
                elif rounded:
                    arriving = landing(part)
                    landed.append(part)
                    self._window.begin_get(rank, memory.rounded_parameters + piece.start * arriving.itemsize, arriving)
                else:
                    self._window.begin_get(rank, memory.parameters + piece.start * memory.itemsize, part)
                self.fetched_bytes += arriving.nbytes
                self.fetched_pieces += 1
        return landed

    def _copy_consistently(
        self, shard: int, parameters: tuple[np.ndarray, ...], serve: Callable[[], bool] | None, exact: bool
    ) -> int:
        """Copy a shard's parameters until no push was begun or ended meanwhile; return its version.

        After the first failure the shard is asked not to start another push, so that the next copy succeeds.
        """
        memory, rank = self._memories[shard], self._ranks[shard]
        asked, version = False, 0

        def copied() -> bool:
            nonlocal asked, version
            before = self._window.load(rank, memory.sequence)
            if before % 2 == 0:
                version = self._version(shard)
                landed = self._begin_copy(shard, parameters, exact)
                self._window.complete_gets()
                if self._window.load(rank, memory.sequence) == before:
                    for part in landed:
                        widen_landed(part)
                    return True
            if not asked:
                asked = True
                self._window.store(rank, memory.wanted(self._number), 1)
            return False

        waiting.until(copied, f"shard {shard} on rank {rank} to be between two pushes", serve=serve)
        if asked:
            self._window.store(rank, memory.wanted(self._number), 0)
        return version

    @contextmanager
    def _announced(self, activity: int) -> Iterator[None]:
        """Tell shards on other hosts that data are on the way, so that they do not sleep: MPI is faster then."""
        self._announce(activity, 1)
        yield
        self._announce(activity, 0)

    def _announce(self, activity: int, value: int) -> None:
        for shard in self._unheard:
            self._window.store(self._ranks[shard], self._memories[shard].active(self._number, activity), value)
