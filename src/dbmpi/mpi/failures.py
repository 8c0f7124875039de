"""Ranks that die while the job continues: the only file that touches MPI's fault tolerance.

Most MPIs end the whole job when a rank dies.  Open MPI 5 can let the others live: started with ``mpirun --with-ft
ulfm`` it reports which ranks are gone (User-Level Failure Mitigation), and everything that does not need the dead
rank continues.  Little is asked of it here: which ranks have died, which is known locally, and that probes for messages
from any rank still work.  Memory that a dead rank has shared with its host remains.

Some things fail, as seen with Open MPI 5.0.  One-sided operations between hosts may not return when a rank has died,
even towards another one, so such runs use messages.  One ``MPI_Finalize`` in thirty does not return, and an Abort does
not end the other ranks; so neither is called then.

Without fault tolerance nothing here asks MPI for anything, and no rank is ever dead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import RunFailed
from dbmpi.machine.endings import outlived
from dbmpi.mpi import pieces, waiting
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_abandoned: list[tuple[pieces.Operation, *tuple[np.ndarray | None, ...]]] = []
"""Transfers that never end, and the arrays that MPI may still write to."""


class RankLost(RunFailed):
    """A rank that this one waits for has died."""


def tolerated(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this job's MPI lets ranks live on when another one dies, by the variables of an environment."""
    return outlived(environment)


_TOLERATED = tolerated()


def dead(comm: MPI.Comm) -> tuple[int, ...]:
    """Return the ranks of `comm` that are known to have died, in order; sends nothing, and costs microseconds.

    MPI hears of a death when this rank enters it, e.g. by a probe.
    """
    if not _TOLERATED:
        return ()
    from mpi4py import MPI

    failed, group = comm.Get_failed(), comm.Get_group()
    ranks = sorted(MPI.Group.Translate_ranks(failed, None, group)) if failed.size else ()
    failed.Free()
    group.Free()
    return tuple(ranks)


def reports_death(error: BaseException) -> bool:
    """Whether `error` is MPI's report that a rank has died."""
    if not _TOLERATED:
        return False
    from mpi4py import MPI

    return isinstance(error, MPI.Exception) and error.Get_error_class() in (
        MPI.ERR_PROC_FAILED,
        MPI.ERR_PROC_FAILED_PENDING,
        MPI.ERR_REVOKED,  # by Open MPI itself, when it notices the death in a collective
    )


def probe(comm: MPI.Comm, tag: int, status: MPI.Status | None = None) -> bool:
    """Return whether a message with this `tag` has arrived on `comm`, even where ranks have died; fill in `status`."""
    from mpi4py import MPI

    try:
        return comm.Iprobe(MPI.ANY_SOURCE, tag, status)
    except MPI.Exception as error:
        if not reports_death(error):
            raise
        comm.Ack_failed()  # the next probe finds messages of the ranks that live
        return False


@contextmanager
def partner(comm: MPI.Comm, rank: int) -> Iterator[None]:
    """Raise RankLost where the block, which needs a rank of `comm`, fails because that rank has died."""
    if rank in dead(comm):
        raise RankLost(f"rank {rank} has died")
    try:
        yield
    except Exception as error:  # MPI's own, whose name is not known without importing it
        if reports_death(error):
            raise RankLost(f"rank {rank} has died") from error
        raise


@contextmanager
def survived() -> Iterator[None]:
    """End the block, and nothing else, where MPI reports in it that a rank has died."""
    try:
        yield
    except Exception as error:  # MPI's own, whose name is not known without importing it
        if not reports_death(error):
            raise


def complete(
    request: pieces.Operation,
    comm: MPI.Comm,
    rank: int,
    what: str,
    *,
    memory: np.ndarray | None = None,
    serve: Callable[[], bool] | None = None,
    longest_sleep: float = 1e-3,
) -> None:
    """Wait for a transfer with a rank by testing it.

    Parameters
    ----------
    request
        The transfer.
    comm, rank
        The communicator, and the rank of it that takes part.
    what
        What is waited for, for the message if it never comes.
    memory
        The array that the transfer writes to; it is kept for good where the transfer does not end.
    serve, longest_sleep
        As for :func:`waiting.until`.

    Raises
    ------
    RankLost
        If the rank has died, or dies meanwhile.
    """

    def done() -> bool:
        return request.Test() or (rank in dead(comm) and _raise(rank))

    try:
        with partner(comm, rank):
            waiting.until(done if _TOLERATED else request.Test, what, serve=serve, longest_sleep=longest_sleep)
    except RankLost:
        abandon(request, memory)
        raise


def abandon(request: pieces.Operation, *memory: np.ndarray | None) -> None:
    """Do without a `request` that may never end; the arrays in `memory`, which it uses, are kept for good."""
    _abandoned.append((request, *memory))


def _raise(rank: int) -> bool:
    raise RankLost(f"rank {rank} has died")


def depart(comm: MPI.Comm) -> None:
    """Wait until the first rank arrives, too; the last call of all ranks of `comm` that are left."""
    word = np.zeros(1, np.int64)
    with suppress(RunFailed):  # whatever is wrong now, the process is about to end
        for rank in range(1, comm.size) if comm.rank == 0 else (0,):
            with suppress(RankLost), partner(comm, rank):
                request = (
                    comm.Isend(word, rank, Tag.DEPARTURE) if comm.rank == 0 else comm.Irecv(word, rank, Tag.DEPARTURE)
                )
                complete(request, comm, rank, "the first rank to end", memory=word)


def outlive(comm: MPI.Comm, ranks: Collection[int], seconds: float) -> None:
    """Wait until these `ranks` of `comm` are gone, for so many `seconds` at most."""

    def gone() -> bool:
        probe(comm, Tag.DEPARTURE)  # MPI hears of an end when it is entered
        return set(ranks) <= {*dead(comm)}

    with suppress(RunFailed):
        waiting.until(gone, "the other ranks to end", seconds=seconds)
