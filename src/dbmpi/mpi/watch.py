"""Whether a rank has died without which a run cannot continue, and which one."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from dbmpi.errors import DIED, EndedByDeath
from dbmpi.mpi import common_end, failures, waiting
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_BETWEEN_POLLS = 0.1
_NAME = 64
"""Largest number of bytes of a host's name."""
_FIRST_TO_SPEAK = 5.0
"""Seconds for which all other ranks leave it to the lowest one to report which rank has died."""
RESUMING = "The same command with --set checkpoint.resume=auto goes on from the last checkpoint, if there is one"


class RanksMissing(EndedByDeath):
    """Ranks have died without which the run cannot go on, and new processes may take their places."""


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
    hosts
        Name of the host of each rank, where there is anything to check.
    replaceable
        Number of ranks whose places new processes can take: then the run ends on all ranks by `RanksMissing`.
    rescues
        Whether the run ends by `RanksMissing` in any case, because what is left of it is worth a checkpoint.  Others
        hear that a rank leaves when it leaves the context, and does nothing more for them.
    """

    def __init__(self, comm: MPI.Comm, advice: str = RESUMING) -> None:
        self._comm, self._advice = comm, advice
        self.on = failures.tolerated()
        self.replaceable = 0
        self.rescues = self._notes_only = False
        self.hosts = hosts(comm) if self.on else []
        self._notices: list[tuple[MPI.Request, np.ndarray]] = []
        self._leaving: set[int] = set()
        """Ranks that leave this attempt at the run, to go on with new processes."""
        self._next = 0.0
        self._shards: dict[int, str] = {}
        self._dispensable: Collection[int] = ()
        self._speaker: int | None = None
        self._speaks_until = 0.0
        self._serving = ExitStack()
        self.dead: frozenset[int] = frozenset()

    def do_without_workers(self, shard_ranks: Sequence[int]) -> None:
        """Let the run survive from now on the death of any rank that is none of `shard_ranks`, shard 0 first."""
        self._shards = {rank: f", which holds shard {shard}," for shard, rank in enumerate(shard_ranks)}
        self._dispensable = {*range(self._comm.size)} - {*shard_ranks}

    def check(self, *, now: bool = False) -> bool:
        """Check the ranks, a few times a second at most unless `now`; called in every wait.

        Returns False: this is no sign of life.

        Raises
        ------
        RunFailed
            If a rank has died without which the run cannot continue, or another rank has ended the run.
        """
        if not self.on or (time.monotonic() < self._next and not now):
            return False
        self._next = time.monotonic() + _BETWEEN_POLLS
        common_end.JOB.check(now=True)  # another rank may have reported why
        goes_on = self._hear()
        if len(gone := failures.dead(self._comm)) > len(self.dead):
            self.dead = frozenset(gone)
        if self._notes_only:
            return False
        missed = sorted(self.dead.difference(self._dispensable))
        if goes_on or (missed and (self.replaceable or self.rescues)):
            self.replace(f"{self.name(missed[0])} has died" if missed else "")
        if missed:
            self._give_up(missed)
        return False

    def __enter__(self) -> Watch:
        if self.on:
            self._serving.enter_context(waiting.serving(self.check))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._serving.close()
        try:
            if isinstance(error, RanksMissing):
                raise error
            self.explain(error)
        except RanksMissing:
            self._leave()
            if not isinstance(error, RanksMissing):
                raise

    def _leave(self) -> None:
        """Wait until all ranks leave this attempt, and end the run where no process can be replaced."""
        self._notify()
        late = self._late
        # Some may be about to write a checkpoint of what is left.
        seconds = waiting.LONG_SECONDS if self.rescues else None
        waiting.until(self._all_leave, lambda: f"{late()} to take part in going on with new processes", seconds=seconds)
        while not self.replaceable:
            common_end.JOB.check(now=True)
            self._give_up(sorted(self.dead.difference(self._dispensable) or self.dead))
            time.sleep(_BETWEEN_POLLS)

    def explain(self, error: BaseException | None) -> None:
        """Raise why the run ends, if `error` is a report by MPI that a rank has died, and this becomes known."""
        if isinstance(error, failures.RankLost) or (error is not None and failures.reports_death(error)):
            until = time.monotonic() + 2 * _FIRST_TO_SPEAK
            while time.monotonic() < until:
                self.check()  # raises
                time.sleep(_BETWEEN_POLLS)

    @property
    def replaces(self) -> bool:
        """Whether some ranks have died, and new processes can take the places of all of them."""
        return 0 < len(self.dead) <= self.replaceable

    def end(self, why: str) -> NoReturn:
        """End the run on all ranks because of a death; `why` is a sentence for the user."""
        if self.replaceable and self.dead:
            self.replace(why)
        common_end.JOB.announce(DIED)
        raise EndedByDeath(f"{why}.  {self._advice}")

    def replace(self, why: str) -> NoReturn:
        """Let all ranks leave this attempt, so that new processes can take the places of the dead; `why` is a clause.

        Whether there may be enough of them is decided when all have left.
        """
        if not self.rescues:
            self._notify()
        raise RanksMissing(why)

    @contextmanager
    def only_noting(self) -> Iterator[None]:
        """Let checks in the block note which ranks have died, and raise nothing."""
        self._notes_only = True
        try:
            yield
        finally:
            self._notes_only = False

    def name(self, rank: int) -> str:
        """Return the name of a rank for messages, with its host and its role."""
        return f"rank {rank} on {self.hosts[rank]}{self._shards.get(rank, '')}"

    def _notify(self) -> None:
        """Let all other ranks know that this one leaves, once."""
        if self._notices:
            return
        word = np.zeros(1, np.int64)
        for rank in {*range(self._comm.size)} - self.dead - {self._comm.rank}:
            with failures.survived():
                self._notices.append((self._comm.Isend(word, rank, Tag.REPLACEMENT), word))

    def _hear(self) -> bool:
        """Note which ranks leave this attempt; return whether any does."""
        from mpi4py import MPI

        status, word = MPI.Status(), np.empty(1, np.int64)
        while failures.probe(self._comm, Tag.REPLACEMENT, status):
            with failures.survived():
                self._comm.Recv(word, status.source, Tag.REPLACEMENT)
            self._leaving.add(status.source)
        return bool(self._leaving)

    def _all_leave(self) -> bool:
        """Return whether all ranks that live have left this attempt, so that none waits for another inside MPI."""
        self._hear()
        self.dead |= {*failures.dead(self._comm)}
        return not self._late()

    def _late(self) -> str:
        late = {*range(self._comm.size)} - self._leaving - self.dead - {self._comm.rank}
        return ", ".join(map(self.name, sorted(late)))

    def _give_up(self, missed: list[int]) -> None:
        """Report on one rank which rank has died, and let the others end; MPI's Abort does not where one has died."""
        if self._speaker is None:
            self._speaker = min(set(range(self._comm.size)) - self.dead)
            self._speaks_until = time.monotonic() + _FIRST_TO_SPEAK
        if self._comm.rank != self._speaker and time.monotonic() < self._speaks_until:
            return
        self.end(f"{self.name(missed[0])} has died, and the run cannot go on without it")


def hosts(comm: MPI.Comm) -> list[str]:
    """Return the name of the host of each rank of `comm` (collective)."""
    from mpi4py import MPI

    name = np.zeros(_NAME, np.uint8)
    letters = MPI.Get_processor_name().encode()[:_NAME]
    name[: len(letters)] = np.frombuffer(letters, np.uint8)
    names = np.empty((comm.size, _NAME), np.uint8)
    waiting.complete(comm.Iallgather(name, names), "the names of the other ranks' hosts")
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in names]
