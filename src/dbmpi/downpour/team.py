"""The partitions of one replica act as one: what the first of them decides, all do."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.mpi import waiting

if TYPE_CHECKING:
    from mpi4py import MPI


class Decision(IntEnum):
    """What a replica does next."""

    GO_ON = 0
    REST = 1
    STOP = 2


class Team:
    """The workers of one replica.

    Parameters
    ----------
    comm
        The partitions in order.
    serve
        Called while this worker waits for another one.
    """

    def __init__(self, comm: MPI.Intracomm, serve: Callable[[], bool]) -> None:
        self._comm = comm
        self._serve = serve
        self.partition = comm.rank

    @property
    def speaks(self) -> bool:
        """Whether this worker is the one that hears and answers the lead."""
        return self.partition == 0

    def agree(self, decision: Decision) -> Decision:
        """Return what the first partition says."""
        if self._comm.size == 1:
            return decision
        word = np.array([decision], np.int64)
        # The first partition may be waiting for the lead, which has a limit of its own.
        seconds = 4 * waiting.STALL_SECONDS
        request = self._comm.Ibcast(word, 0)
        waiting.complete(request, "the first partition of this replica", serve=self._serve, seconds=seconds)
        return Decision(int(word[0]))

    def gather(self) -> None:
        """Wait until all partitions have come here."""
        if self._comm.size > 1:
            waiting.barrier(self._comm, "the other partitions of this replica", serve=self._serve)
