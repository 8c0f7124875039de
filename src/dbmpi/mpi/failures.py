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
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from dbmpi.errors import EndedByDeath, RunFailed
from dbmpi.machine.endings import outlived
from dbmpi.mpi import pieces, waiting
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_abandoned: list[tuple[pieces.Operation, np.ndarray | None]] = []
"""Transfers that never end, and the arrays that MPI may still write to."""
_BETWEEN_POLLS = 0.1
_NAME = 64
"""Largest number of bytes of a host's name."""
_FIRST_TO_SPEAK = 5.0
"""Seconds for which all other ranks leave it to the lowest one to report which rank has died."""


RESUMING = "The same command with --set checkpoint.resume=auto goes on from the last checkpoint, if there is one"


class RankLost(RunFailed):
    """A rank that this one waits for has died."""


class RanksMissing(EndedByDeath):
    """Ranks have died without which the run cannot go on, and new processes may take their places."""


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
        _abandoned.append((request, memory))
        raise


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
    with suppress(RunFailed):
        waiting.until(
            lambda: probe(comm, Tag.DEATHS) or set(ranks) <= {*dead(comm)}, "the other ranks to end", seconds=seconds
        )


class Watch:
    """Checks now and then whether a rank has died, and ends the run where it cannot continue without that one.

    As a context manager it checks in every wait, and reports which rank has died where MPI does not.

    Parameters
    ----------
    comm
        The ranks that are watched (collective).
    advice
        What a user can do after a death, a sentence.

    Attributes
    ----------
    on
        Whether there is anything to check: without fault tolerance MPI itself ends the job.
    dead
        Ranks that have died, as of the last check.
    replaceable
        Number of ranks whose places new processes can take: then the run ends on all ranks by `RanksMissing`.
    """

    def __init__(self, comm: MPI.Comm, advice: str = RESUMING) -> None:
        self._comm, self._advice = comm, advice
        self.on = _TOLERATED
        self.replaceable = 0
        self._hosts = hosts(comm) if self.on else []
        self._next = 0.0
        self._roles: Mapping[int, str] = {}
        self._dispensable: Collection[int] = ()
        self._speaker: int | None = None
        self._speaks_until = 0.0
        self._serving = ExitStack()
        self.dead: frozenset[int] = frozenset()

    def do_without(self, dispensable: Collection[int], roles: Mapping[int, str]) -> None:
        """Let the run survive the death of the `dispensable` ranks from now on.

        `roles` gives for other ranks what messages say behind their names: why the run cannot continue without them.
        """
        self._dispensable, self._roles = dispensable, roles

    def check(self, *, now: bool = False) -> bool:
        """Check the ranks, a few times a second at most unless `now`; called in every wait.

        Returns False: this is no sign of life.

        Raises
        ------
        RunFailed
            If a rank has died without which the run cannot continue.
        """
        if not self.on or (time.monotonic() < self._next and not now):
            return False
        self._next = time.monotonic() + _BETWEEN_POLLS
        if probe(self._comm, Tag.DEATHS):
            raise EndedByDeath("")  # another rank has reported why
        goes_on = probe(self._comm, Tag.REPLACEMENT)
        if len(gone := dead(self._comm)) > len(self.dead):
            self.dead = frozenset(gone)
        missed = sorted(self.dead.difference(self._dispensable))
        if missed:
            self._give_up(missed)
        if goes_on:
            raise RanksMissing("")
        return False

    def __enter__(self) -> Watch:
        if self.on:
            self._serving.enter_context(waiting.serving(self.check))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._serving.close()
        if error is not None and reports_death(error):
            until = time.monotonic() + 2 * _FIRST_TO_SPEAK
            while time.monotonic() < until:
                self.check()  # raises
                time.sleep(_BETWEEN_POLLS)

    @property
    def replaces(self) -> bool:
        """Whether new processes can take the places of all that have died."""
        return len(self.dead) <= self.replaceable > 0

    def end(self, why: str) -> NoReturn:
        """End the run on all ranks because of a death; `why` is a sentence for the user."""
        if self.replaces:
            self._tell(Tag.REPLACEMENT)
            raise RanksMissing(why)
        self._tell(Tag.DEATHS)
        raise EndedByDeath(f"{why}.  {self._advice}")

    def name(self, rank: int) -> str:
        """Return the name of a rank for messages, with its host and its role."""
        return f"rank {rank} on {self._hosts[rank]}{self._roles.get(rank, '')}"

    def _give_up(self, missed: list[int]) -> None:
        """Report on one rank which rank has died, and let the others end; MPI's Abort does not where one has died."""
        if self._speaker is None:
            self._speaker = min(set(range(self._comm.size)) - self.dead)
            self._speaks_until = time.monotonic() + _FIRST_TO_SPEAK
        if not self.replaces and self._comm.rank != self._speaker and time.monotonic() < self._speaks_until:
            return
        name = self.name(missed[0])
        if self.replaces:
            self.end(f"{name} has died")
        self.end(f"{name} has died, and the run cannot go on without it")

    def _tell(self, tag: Tag) -> None:
        """Send all ranks that live a notice."""
        word = np.zeros(1, np.int64)
        for rank in set(range(self._comm.size)) - self.dead - {self._comm.rank}:
            with suppress(RankLost), partner(self._comm, rank):
                _abandoned.append((self._comm.Isend(word, rank, tag), word))


def hosts(comm: MPI.Comm) -> list[str]:
    """Return the name of the host of each rank of `comm` (collective)."""
    from mpi4py import MPI

    name = np.zeros(_NAME, np.uint8)
    letters = MPI.Get_processor_name().encode()[:_NAME]
    name[: len(letters)] = np.frombuffer(letters, np.uint8)
    names = np.empty((comm.size, _NAME), np.uint8)
    waiting.complete(comm.Iallgather(name, names), "the names of the other ranks' hosts")
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in names]
