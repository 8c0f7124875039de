"""The lead's orders to a worker, and the worker's answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from enum import IntEnum
from typing import TYPE_CHECKING

from dbmpi.mpi import failures, pieces, waiting
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    import numpy as np
    from mpi4py import MPI

    from dbmpi.machine.signals import StopSignal

_FOR_THE_LEAD = 1.25
"""Factor on the stall limit where a worker waits for the lead, which has more to say about the rank that is late."""


_SWITCHES = {
    MessageKind.GO: ("paused", False),
    MessageKind.RELEASE: ("released", True),
    MessageKind.STOP: ("stopping", True),
    MessageKind.STATE: ("state_wanted", True),
    MessageKind.LEAVE: ("_left", True),
    MessageKind.END: ("ended", True),
}
"""What orders without numbers change."""


class Decision(IntEnum):
    """What a replica does next."""

    GO_ON = 0
    REST = 1
    STOP = 2
    DEAL = 3
    TEST = 4
    END_TURN = 5


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
    partners
        Ranks without which this worker cannot take another step.
    dead
        Returns the ranks that have died.
    released
        Whether this worker may begin at once; otherwise it waits for the end of the warmstart.

    Attributes
    ----------
    released, paused, stopping, ended
        The state that the lead's orders have led to.
    pause
        Number of the last pause that the lead has ordered.
    deal
        A new share that the lead has dealt: its length, batches of the warmstart in it, and whether this replica is the
        first one from now on; None without.
    turn, given
        Number of the last turn that the lead has let this replica begin, and what else it has said of it.
    tests
        Parts of the held-out samples to be evaluated, and the number of all parts, as in the messages.
    state_wanted
        Whether the lead has asked for the state of the objective.
    given_up
        Whether this replica takes no further part.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        lead: int,
        stop: StopSignal,
        serve: Callable[[], bool] | None = None,
        *,
        partners: Collection[int] = (),
        dead: Callable[[], frozenset[int]] = frozenset,
        released: bool = True,
    ) -> None:
        self._comm, self._mailbox = comm, Mailbox(comm, Role.WORKER)
        self._lead, self._stop, self._serve = lead, stop, serve
        self._reported_stop = self._left = False
        self._alive = time.monotonic()
        self._partners, self._dead = partners, dead
        self.released = released
        self.paused = self.stopping = self.ended = self.given_up = self.state_wanted = False
        self.pause = self.turn = 0
        self.given: tuple[int, ...] = ()
        self.deal: tuple[int, int, bool] | None = None
        self.tests: deque[tuple[int, int]] = deque()

    def obey(self) -> bool:
        """Poll this rank's shard and read the lead's orders; return whether there was anything.

        Raises
        ------
        RankLost
            If this replica can take no further step: a partner has died, or the lead has given it up.  Not again after
            :attr:`given_up` is set.
        """
        moved = self._serve() if self._serve is not None else False
        if self._stop.number and not self._reported_stop:
            self._reported_stop = True
            self.send(MessageKind.STOP_ASKED, self._stop.number)
        while (message := self._mailbox.receive()) is not None:
            moved = True
            if message.kind in _SWITCHES:
                setattr(self, *_SWITCHES[message.kind])
            elif message.kind == MessageKind.PAUSE:
                self.paused, self.pause = True, message.values[0]
            elif message.kind == MessageKind.DEAL:
                length, warm, first, *_ = message.values
                self.deal = length, warm, bool(first)
            elif message.kind == MessageKind.TEST:
                self.tests.append((message.values[0], message.values[1]))
            elif message.kind == MessageKind.TURN:
                self.turn, *given = message.values
                self.given = tuple(given)
        if self.lost and not self.given_up:
            raise failures.RankLost("this replica is given up")
        return moved

    @property
    def lost(self) -> bool:
        """Whether a partner has died, or the lead has given this replica up."""
        return self._left or not self._dead().isdisjoint(self._partners)

    def receive_array(self, values: np.ndarray, tag: Tag, what: str) -> None:
        """Receive contiguous `values` from the lead under a `tag`; `what` they are, for messages."""
        request = pieces.irecv(self._comm, values, self._lead, tag)
        waiting.complete(request, what, serve=self.obey)

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
