"""The partitions of one replica act as one: the first of them decides, and all do the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.mpi import pieces, waiting

if TYPE_CHECKING:
    from mpi4py import MPI

WORDS = 8
"""Numbers of a decision, at most."""
_OTHERS = "the other partitions of this replica"


class Team:
    """The workers of one replica.

    Parameters
    ----------
    comm
        The partitions in order.
    serve
        Called while this worker waits for another one; returns whether it did anything.
    """

    def __init__(self, comm: MPI.Intracomm, serve: Callable[[], bool]) -> None:
        self._comm, self._serve = comm, serve
        self._words = np.zeros(WORDS, np.int64)
        self._request: MPI.Request | None = None
        self.partition = comm.rank

    @property
    def speaks(self) -> bool:
        """Whether this worker is the one that decides, and that talks with the lead."""
        return self.partition == 0

    def poll(self, decision: Sequence[int] | None) -> Sequence[int] | None:
        """Return the next decision of the first partition, or None as long as there is none.

        Parameters
        ----------
        decision
            On the first partition: at most `WORDS` numbers, or None where nothing is decided yet.  Others come back
            with zeros behind them.
        """
        if self._comm.size == 1:
            return decision
        if self.speaks:
            if decision is None:
                return None
            self._words[:] = 0
            self._words[: len(decision)] = decision
            waiting.complete(self._comm.Ibcast(self._words, 0), _OTHERS, serve=self._serve)
        else:
            if self._request is None:
                self._request = self._comm.Ibcast(self._words, 0)
            if not self._request.Test():
                return None
            self._request = None
        numbers: list[int] = self._words.tolist()
        return numbers

    def agree(self, decision: Sequence[int]) -> Sequence[int]:
        """Return the `decision` of the first partition, as in :meth:`poll`, whatever the others pass; wait for it."""
        agreed: Sequence[int] | None = None

        def heard() -> bool:
            nonlocal agreed
            agreed = self.poll(decision)
            return agreed is not None

        # The first partition may be waiting for the lead, which has a limit of its own.
        seconds = 4 * waiting.STALL_SECONDS
        waiting.until(heard, "the first partition of this replica", serve=self._serve, seconds=seconds)
        assert agreed is not None
        return agreed

    def add_up(self, value: float) -> float:
        """Return the sum of the `value` that each partition passes, the same on all of them; wait for it."""
        if self._comm.size == 1:
            return value
        from mpi4py import MPI

        return float(waiting.allreduce(self._comm, np.array([value]), MPI.SUM, _OTHERS, serve=self._serve)[0])

    def largest(self, value: int) -> int:
        """Return the largest `value` that a partition passes, the same on all of them; wait for it."""
        if self._comm.size == 1:
            return value
        from mpi4py import MPI

        return int(waiting.allreduce(self._comm, np.array([value]), MPI.MAX, _OTHERS, serve=self._serve)[0])

    def broadcast(self, values: np.ndarray) -> None:
        """Fill contiguous `values` on all partitions with those of the first; wait for it."""
        if self._comm.size > 1:
            waiting.complete(pieces.ibcast(self._comm, values, 0), _OTHERS, serve=self._serve)

    def gather(self) -> None:
        """Wait for all partitions."""
        if self._comm.size > 1:
            waiting.barrier(self._comm, _OTHERS, serve=self._serve)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition.

        Parameters
        ----------
        condition
            Must not block.
        what
            Is waited for, for the message if it never comes.
        """
        waiting.until(condition, what, serve=self._serve)
