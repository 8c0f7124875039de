"""The lead's orders to a worker, and the worker's answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dbmpi.mpi import pieces, waiting
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    import numpy as np
    from mpi4py import MPI

    from dbmpi.machine.signals import StopSignal

_FOR_THE_LEAD = 1.25
"""Factor on the stall limit where a worker waits for the lead, which has more to say about the rank that is late."""


class Orders:
    """The connection of one worker with the lead.

    Parameters
    ----------
    comm
        All ranks.
    lead
        Rank of the lead.
    stop
        Collects the signals that end the run, which are reported to the lead.
    serve
        Polls this rank's shard, if it has one; returns whether there was anything to do.
    released
        Whether this worker may begin at once; otherwise it waits for the end of the warmstart.

    Attributes
    ----------
    released, paused, stopping, ended
        The state that the lead's orders have led to.
    asked_to_pause
        Whether the lead has ordered a pause since this was last set to False.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        lead: int,
        stop: StopSignal,
        serve: Callable[[], bool] | None = None,
        *,
        released: bool = True,
    ) -> None:
        self._comm, self._mailbox = comm, Mailbox(comm, Role.WORKER)
        self._lead, self._stop, self._serve = lead, stop, serve
        self._reported_stop = False
        self._alive = time.monotonic()
        self.released = released
        self.paused = self.asked_to_pause = self.stopping = self.ended = False

    def obey(self) -> bool:
        """Poll this rank's shard and read the lead's orders; return whether there was anything."""
        moved = self._serve() if self._serve is not None else False
        if self._stop.number and not self._reported_stop:
            self._reported_stop = True
            self.send(MessageKind.STOP_ASKED, self._stop.number)
        while (message := self._mailbox.receive()) is not None:
            moved = True
            if message.kind == MessageKind.PAUSE:
                self.paused = self.asked_to_pause = True
            elif message.kind == MessageKind.GO:
                self.paused = False
            elif message.kind == MessageKind.RELEASE:
                self.released = True
            elif message.kind == MessageKind.STOP:
                self.stopping = True
            elif message.kind == MessageKind.END:
                self.ended = True
        return moved

    def send(self, kind: MessageKind, *values: int) -> None:
        """Send the lead a message of that `kind` with `values`, which :class:`MessageKind` describes."""
        self._mailbox.send(self._lead, Role.SHARD, kind, *values)

    def send_array(self, values: np.ndarray, tag: Tag) -> pieces.Operation:
        """Begin to send the lead contiguous `values`, which must stay, under a `tag`; return the operation."""
        return pieces.isend(self._comm, values, self._lead, tag)

    def wait(self, condition: Callable[[], bool], what: str, longest_sleep: float = 1e-3) -> None:
        """Obey until an order makes the condition hold.

        Parameters
        ----------
        condition
            Returns whether to stop waiting.
        what
            Names what this waits for, in the message of an error.
        longest_sleep
            Seconds between two polls, at most.
        """
        seconds = _FOR_THE_LEAD * waiting.STALL_SECONDS
        waiting.until(condition, what, serve=self.obey, seconds=seconds, longest_sleep=longest_sleep)

    def work(self) -> bool:
        """Obey, and let the lead know now and then that this rank is at work, though it pushes nothing."""
        if time.monotonic() - self._alive >= waiting.STALL_SECONDS / 4:
            self._alive = time.monotonic()
            self.send(MessageKind.ALIVE)
        return self.obey()
