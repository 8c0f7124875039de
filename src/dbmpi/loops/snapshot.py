"""Checkpoints of a user's own loop: a worker asks the shards for their vectors, one after the other, and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.checkpoint.finite import finite
from dbmpi.checkpoint.schema import PARAMETERS
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.errors import DiskFailed, RunFailed
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.mpi.tags import Tag
from dbmpi.paramserver.server import Server

if TYPE_CHECKING:
    from mpi4py import MPI

_PIECE = 1 << 20
"""Elements of a vector that are sent at once."""

Counts = tuple[int, int, int]
"""Of a shard: its version, the samples behind that, and the version at which the rule's state was begun."""


class Handover:
    """A shard's side: sends its vectors to the workers that ask for them, one worker at a time, and never waits.

    Parameters
    ----------
    comm
        All ranks.
    server
        The shard.
    """

    def __init__(self, comm: MPI.Intracomm, server: Server) -> None:
        self._comm, self._server = comm, server
        self._mailbox = Mailbox(comm, Role.SHARD)
        self._sending: Iterator[bool] | None = None

    def poll(self) -> bool | None:
        """Send what has been asked for; return whether something has left, or None if nothing is being sent.

        While something is, no push may be applied.
        """
        if self._sending is None:
            if self._server.pushing or (message := self._mailbox.receive()) is None:
                return None
            self._sending = self._send(message.source)
        moved = next(self._sending, None)
        if moved is None:
            self._sending = None
        return moved

    def _send(self, rank: int) -> Iterator[bool]:
        """Yield, again and again, whether a piece has left."""
        counts = np.array(counts_of(self._server), np.int64)
        state = self._server.state
        for values in (counts, self._server.parameters, *(state[name] for name in sorted(state))):
            for start in range(0, values.size, _PIECE):
                request = self._comm.Isend(values[start : start + _PIECE], rank, Tag.SNAPSHOT)
                while not request.Test():
                    yield False
                yield True


def counts_of(server: Server) -> Counts:
    """Return what a shard, `server`, has counted."""
    return server.version, server.samples, server.begun


def save(
    comm: MPI.Intracomm,
    shards: Sequence[tuple[int, range]],
    own: Server | None,
    writer: CheckpointWriter,
    vectors: Sequence[str],
    serve: Callable[[], bool],
) -> list[Counts]:
    """Fill a checkpoint with the vectors of all shards; return what they have counted.

    Parameters
    ----------
    comm
        All ranks.
    shards
        The rank of each shard, and its range.
    own
        The shard of this rank, if it has one.
    writer
        Writes the checkpoint; to be committed afterwards.
    vectors
        Names of all vectors, the parameters first, the others sorted.
    serve
        Called while this rank waits.

    Raises
    ------
    DiskFailed
        If the file cannot be written; everything has been received then.
    RunFailed
        If some parameters are not finite, which is found when everything has been received, too.
    """
    found: list[Counts] = []
    failures: list[Exception] = []

    def receive(values: np.ndarray, rank: int) -> None:
        request = comm.Irecv(values, rank, Tag.SNAPSHOT)
        waiting.complete(request, f"the shard on rank {rank} to hand over its vectors", serve=serve)

    def write(name: str, start: int, values: np.ndarray) -> None:
        if failures:
            return
        try:
            if name == PARAMETERS and not finite(values):
                raise RunFailed(f"{writer.path}: some parameters are NaN or infinite; it was not written")
            writer.write(name, start, values)
        except (DiskFailed, RunFailed) as error:
            failures.append(error)

    for rank, held in shards:
        if rank == comm.rank:
            assert own is not None
            waiting.until(lambda: not own.pushing, "the rest of a push to this rank's shard", serve=serve)
            for name, values in {PARAMETERS: own.parameters, **own.state}.items():
                write(name, held.start, values)
            found.append(counts_of(own))
            continue
        mailbox = Mailbox(comm, Role.SHARD)
        mailbox.send(rank, Role.SHARD, MessageKind.CHECKPOINT)
        counts = np.empty(3, np.int64)
        receive(counts, rank)
        buffer = np.empty(min(_PIECE, len(held)), writer.dtype)
        for name in vectors:
            for start in range(held.start, held.stop, _PIECE):
                piece = buffer[: min(_PIECE, held.stop - start)]
                receive(piece, rank)
                write(name, start, piece)
        mailbox.close()
        found.append((int(counts[0]), int(counts[1]), int(counts[2])))
    if failures:
        raise failures[0]
    return found
