"""One end for all ranks where MPI lets them outlive each other.

With Open MPI's fault tolerance a rank that fails, and leaves with an exit code, ends no other rank; neither does its
Abort.  The others do not even hear of it, only of ranks that are killed (seen with Open MPI 5.0).  So that rank first
sends the exit code to all others, which look for it in every wait, and then end with the same one, silently.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import EndedElsewhere
from dbmpi.mpi import blocking, failures, waiting
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_BETWEEN_POLLS = 0.1
_TO_LEAVE = 3.0
"""Seconds that messages may take to leave this rank."""
_LEAST = 0.2
"""Seconds for which MPI is given time even if they seem to have left, to send what it has only copied."""


class CommonEnd:
    """The end that all ranks of some communicators have in common.

    Parameters
    ----------
    always
        Whether ranks join also where MPI would end them all: they are a part of the job, of which the rest goes on.
    """

    def __init__(self, *, always: bool = False) -> None:
        self._always = always
        self._joined: list[MPI.Intracomm] = []
        self._mark: int | None = None
        """MPI's key for a mark on communicators whose ranks have joined."""
        self._polling = ExitStack()
        self._next = 0.0
        self._announced = False
        self._heard: int | None = None
        self._leaving: list[MPI.Request] = []

    def join(self, comm: MPI.Intracomm, what: str) -> None:
        """Let the ranks of `comm` end together from now on, where MPI does not see to it (collective).

        Parameters
        ----------
        comm
            The ranks; nothing happens the second time.
        what
            What is waited for, if a rank does not arrive.
        """
        if not (self._always or failures.tolerated()) or comm.size == 1:
            return
        from mpi4py import MPI

        if self._mark is None:
            self._mark = MPI.Comm.Create_keyval()
            self._polling.enter_context(waiting.serving(self.check))
        if comm.Get_attr(self._mark) is None:
            self._joined.append(blocking.duplicate(comm, what))
            comm.Set_attr(self._mark, True)

    def close(self) -> None:
        """Look for notices no more."""
        self._polling.close()

    def free(self) -> None:
        """Give back the communicators of this object (collective), where nothing was announced on them."""
        for comm in self._joined:
            blocking.free(comm)
        self._joined.clear()

    def forget(self) -> None:
        """Leave the communicators that were joined so far, of which ranks have died and are replaced."""
        self._joined.clear()

    def part(self) -> None:
        """Meet the other ranks before MPI ends: in its end, nothing is heard of one that fails meanwhile."""
        from mpi4py import MPI

        for comm in () if MPI.Is_finalized() else self._joined:
            if not failures.dead(comm):
                with failures.survived():
                    waiting.complete(comm.Ibarrier(), "the other ranks to end", seconds=waiting.LONG_SECONDS)

    def check(self, *, now: bool = False) -> bool:
        """Look for the notice of another rank that all end, a few times a second at most unless `now`.

        Returns False: this is no sign of life.

        Raises
        ------
        EndedElsewhere
            If there is one; then in every further call, too.
        """
        if not self._announced and (now or time.monotonic() >= self._next):
            self._next = time.monotonic() + _BETWEEN_POLLS
            code = np.zeros(1, np.int64)
            for comm in self._joined:
                if self._heard is None and failures.probe(comm, Tag.END):
                    comm.Recv(code, tag=Tag.END)
                    self._heard = int(code[0])
        if self._heard is not None:
            raise EndedElsewhere(self._heard)
        return False

    def announce(self, code: int) -> bool:
        """Let all ranks that have joined end with an exit code, as this one is about to; once.

        Returns whether there are such ranks, and the messages have left.
        """
        if not self._announced and self._joined:
            self._announced = True
            word = np.array([code], np.int64)
            for comm in self._joined:
                for rank in {*range(comm.size)}.difference(failures.dead(comm), {comm.rank}):
                    with failures.survived():
                        self._leaving.append(comm.Isend(word, rank, Tag.END))
            began = time.monotonic()
            while (passed := time.monotonic() - began) < _LEAST or (self._leaving and passed < _TO_LEAVE):
                self._leaving = [request for request in self._leaving if not _has_left(request)]
                time.sleep(1e-3)
        return self._announced and not self._leaving


def _has_left(request: MPI.Request) -> bool:
    with failures.survived():
        return request.Test()
    return True  # to a rank that has died


JOB = CommonEnd()
"""That of this job, or of the part of it that this rank belongs to (:func:`of_a_part`)."""


@contextmanager
def of_a_part(comm: MPI.Intracomm) -> Iterator[CommonEnd]:
    """Let failures in the block end the work of the ranks of `comm`, and not the job (collective).

    A rank that fails announces that; the others leave their waits by EndedElsewhere.

    Parameters
    ----------
    comm
        The ranks.
    """
    global JOB  # noqa: PLW0603 - a process belongs to one job, and to one part of it at a time
    whole, JOB = JOB, CommonEnd(always=True)
    try:
        JOB.join(comm, "the ranks of the next run")
        yield JOB
    finally:
        JOB.close()
        JOB = whole
