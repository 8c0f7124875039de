"""New processes in the places of ranks that have died: the world is whole again, and every rank keeps its number.

Open MPI 5 can do that if it was started with ``--with-ft ulfm``: the ranks that are left make a communicator without
the dead ones, start as many processes as are missing, and merge with them.  Everything else is then set up anew, as
when a run resumes.  (MPICH 5.0 ends all ranks when one dies, and cannot share memory with processes that were started
later.)
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

import numpy as np

from dbmpi.errors import DIED, EndedByDeath, EndedElsewhere
from dbmpi.mpi import blocking, failures, waiting
from dbmpi.mpi.watch import RESUMING, hosts

if TYPE_CHECKING:
    from mpi4py import MPI

_REPLACES = "DBMPI_REPLACES"
"""Number of the rank whose place a process takes."""
_TO_START = 120.0
"""Seconds in which new processes must have joined: of one that dies before, MPI says nothing (Open MPI 5.0)."""


def joins() -> bool:
    """Return whether this process was started to take the place of a rank that has died."""
    return _REPLACES in os.environ


def join(parents: MPI.Intercomm) -> MPI.Intracomm:
    """Return the communicator of all ranks in a process that `parents` have started for a dead one (collective)."""
    from mpi4py import MPI

    with blocking.blocking("the other ranks to take in this process"):
        whole = cast("MPI.Intracomm", parents.Merge(high=True).Split(0, int(os.environ[_REPLACES])))
    whole.Set_errhandler(MPI.ERRORS_RETURN)
    return whole


class Replacements:
    """The replacements of one job: after a death, another attempt at its run begins with new processes.

    Parameters
    ----------
    comm
        All ranks.

    Attributes
    ----------
    comm
        All ranks of this attempt.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        self._ages = np.zeros(comm.size, np.int64)
        """For each rank, how many processes had been replaced when its present one was started."""
        self._replaced = 0
        self._hosts: list[str] = []
        self._most = 0

    @property
    def first(self) -> bool:
        """Whether no rank has been replaced yet."""
        return not self._replaced

    @property
    def elder(self) -> list[int]:
        """Ranks whose processes were started before this one; of those that `dbmpi launch` has started none."""
        return np.flatnonzero(self._ages < self._ages[self.comm.rank]).tolist()

    def begin(self, most: int) -> int:
        """Begin an attempt (collective); return how many ranks that die in it can be replaced.

        Parameters
        ----------
        most
            Processes that may be started in all.
        """
        from mpi4py import MPI

        if not failures.tolerated():
            return 0
        known = np.append(self._ages, self._replaced)  # not to new processes
        known = waiting.allreduce(self.comm, known, MPI.MAX, "the other ranks to begin")
        self._ages, self._replaced = known[:-1], int(known[-1])
        self._hosts, self._most = hosts(self.comm), most
        return most - self._replaced

    def renew(self, missing: str) -> MPI.Intracomm:
        """Start a process for each rank that has died, and return the communicator of all (collective).

        Parameters
        ----------
        missing
            Why this attempt has ended; empty if another rank knows.

        Raises
        ------
        EndedByDeath
            If more ranks have died than may be replaced, or no process can be started.
        """
        from mpi4py import MPI

        comm = self.comm
        with blocking.blocking("the ranks that are left to do without the dead ones"):
            left = cast("MPI.Intracomm", comm.Shrink())
        left.Set_errhandler(MPI.ERRORS_RETURN)
        numbers = MPI.Group.Translate_ranks(left.Get_group(), None, comm.Get_group())
        places = sorted({*range(comm.size)}.difference(numbers))
        speaks, why = left.rank == 0, missing or _name(places)
        if self._replaced + len(places) > self._most:
            why += f", and topology.replacements = {self._most} allows no further process.  {RESUMING}"
            raise EndedByDeath(why if speaks else "")
        if speaks:
            print(f"dbmpi: {why}: the run goes on with a new process", file=sys.stderr, flush=True)
        late = f"{_name(places)}, and no new process has joined the others: it may have died, too.  {RESUMING}"
        failure = EndedByDeath(late) if speaks else EndedElsewhere(DIED)
        try:
            with blocking.blocking("new processes to start", seconds=_TO_START, failure=failure):
                started = left.Spawn_multiple(*self._commands(places), root=0)
                whole = cast("MPI.Intracomm", started.Merge(high=False).Split(0, comm.rank))
        except MPI.Exception as error:
            raise EndedByDeath(f"no process could be started: {error}.  {RESUMING}" if speaks else "") from None
        whole.Set_errhandler(MPI.ERRORS_RETURN)
        self.comm = whole
        self._replaced += len(places)
        self._ages[places] = self._replaced
        return whole

    def _commands(self, places: list[int]) -> tuple[list[str], list[list[str]], list[int], list[MPI.Info]]:
        """Return what Spawn_multiple starts for these places: this command again, on the hosts of the dead."""
        from mpi4py import MPI

        words, infos = [], []
        for place in places:
            # What mpirun would have set for this rank; what it sets for the new one describes a world of new ones.
            told = {
                _REPLACES: place,
                "OMPI_COMM_WORLD_RANK": place,
                "OMPI_COMM_WORLD_SIZE": self.comm.size,
                "OMPI_COMM_WORLD_LOCAL_SIZE": self._hosts.count(self._hosts[place]),
            }
            words.append([*(f"{name}={value}" for name, value in told.items()), sys.executable, *sys.orig_argv[1:]])
            info = MPI.Info.Create()
            if len(set(self._hosts)) > 1:
                info.Set("host", self._hosts[place])
            infos.append(info)
        return ["/usr/bin/env"] * len(places), words, [1] * len(places), infos


def _name(places: list[int]) -> str:
    ranks = ", ".join(map(str, places))
    return f"rank {ranks} has died" if len(places) == 1 else f"ranks {ranks} have died"
