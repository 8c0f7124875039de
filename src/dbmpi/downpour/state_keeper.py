"""The state of a user's own objective on its way between the replicas and the lead."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.mpi import failures, pieces
from dbmpi.mpi.failures import RankLost
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.replica.own_state import OwnState


class StateKeeper:
    """The lead's copy, as it was when the first replica last paused.

    Parameters
    ----------
    comm
        All ranks.
    state
        That of the objective on this rank; None for an objective without, or a network.

    Attributes
    ----------
    packed
        Its bytes, uint8; empty without any.
    """

    def __init__(self, comm: MPI.Intracomm, state: OwnState | None) -> None:
        self._comm = comm
        self._sent: list[pieces.Operation] = []
        self.packed = np.empty(0, np.uint8) if state is None else state.pack()

    def take(self, rank: int) -> None:
        """Receive it from a `rank` that sends it now; if it dies meanwhile, the last one stays."""
        if not self.packed.size:
            return
        into = np.empty_like(self.packed)
        request = pieces.irecv(self._comm, into, rank, Tag.OBJECTIVE_STATE)
        with suppress(RankLost):
            failures.complete(request, self._comm, rank, f"the state of the objective on rank {rank}", memory=into)
            self.packed = into

    def send(self, rank: int) -> None:
        """Begin to send it to a `rank`."""
        if self.packed.size:
            with failures.survived():
                self._sent.append(pieces.isend(self._comm, self.packed, rank, Tag.OBJECTIVE_STATE))
