"""Small orders between ranks, as messages of a kind and a few integers.

A rank has two mailboxes: one for its role as a shard, one for its role as a worker.  Receiving never waits; a message
is kept until it has left.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dbmpi.mpi import failures, waiting
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_WORDS = 8


class Role(IntEnum):
    """The role that a message is for; its number is the message's tag."""

    SHARD = Tag.SHARD
    WORKER = Tag.WORKER


class MessageKind(IntEnum):
    """The meaning of a message."""

    PAUSE = 1
    """Lead to worker: pause before the next step and reply PAUSED; the number of the pause."""
    GO = 2
    """Lead to worker: continue after a pause."""
    STOP = 3
    """Lead to worker: take no further step and reply FINISHED."""
    END = 4
    """Lead to all: training is over."""
    CHECKPOINT = 5
    """Lead to shard: take your vectors for a checkpoint: its step, its identity, and whether it is the last one.

    A worker of a user's own loop to a shard: send me your vectors.
    """
    PAUSED = 6
    """Worker to lead: paused; how many of my batches are learned, and begun, and the number of the pause."""
    FINISHED = 7
    """Worker to lead: my last step is taken and applied; how many of my batches are learned, and the bits of the
    seconds that I have waited and spent."""
    WARM = 8
    """Worker to lead: the warmstart is over, release the others."""
    STOP_ASKED = 9
    """Any rank to lead: a signal of this number asks for the end; 0 for a callback of the user's."""
    RELEASE = 10
    """Lead to worker: the warmstart is over, begin."""
    EVALUATION = 11
    """Worker to lead: batches of the stream passed (0 from an evaluator), samples tested, correct, and the bits of the
    loss."""
    METRIC = 14
    """Worker to lead, before EVALUATION: number of a metric, and the bits of its sum."""
    ALIVE = 12
    """Worker to lead: at work, though nothing is pushed.  Lead to all: the run moves, keep waiting."""
    FAILED = 13
    """Worker to lead: I cannot take another step; in Downpour, how many of my batches are learned.

    Then as after a STOP_ASKED, and the lead sends END when a checkpoint is written.
    """
    HOLD = 15
    """Lead to shard: apply nothing more of this replica, and reply HELD; whether it is given up."""
    HELD = 16
    """Shard to lead: the replica, whether it is given up, and the numbers of
    :class:`dbmpi.paramserver.tally.PushProgress`."""
    SETTLE = 17
    """Lead to shard: apply of this replica so many pushes of all; whether it is given up, and the number of a round
    that is complete without it, or 0."""
    LET_GO = 18
    """Lead to shard: apply what this replica pushes as before."""
    DEAL = 19
    """Lead to worker: this is your share from now on, so many ranges, which come as an array; how many batches of the
    warmstart are in it, and whether you speak for the objective's state, and evaluate."""
    LEAVE = 20
    """Lead to worker: your replica is given up, take no further part."""
    TEST = 21
    """Lead to worker: evaluate this part of the held-out samples, of so many, and reply TESTED.

    Of 0 parts, to an evaluator: evaluate all samples while others learn, and reply SNAPSHOT, and then EVALUATION.
    """
    TESTED = 22
    """Worker to lead: the part, samples, correct, and the bits of the loss."""
    BEAT = 24
    """Any rank to lead: it makes progress, or waits; no sign that data moves."""
    CLOSED = 23
    """Shard to lead, after END: the bits of the fraction of time spent in the rule's kernel, and how many stale pushes
    were dropped."""
    ROLL_BACK = 25
    """Worker to lead: I have withheld more pushes in a row than I may; go back to the last checkpoint."""
    SETTLED = 27
    """Shard to lead: of this replica, which is given up, nothing more is applied."""
    TURN_ASKED = 28
    """Worker to lead: let my turn of this number begin."""
    TURN = 29
    """Lead to worker: your turn of this number begins; in a round: its number, how many pushes it needs, the replica
    after whose push yours is added, the position of your first batch in the stream, and how many there are."""
    TURN_OVER = 30
    """Worker to lead: all pushes of my turn are applied."""
    STATE = 41
    """Lead to worker: send me the state of the objective.  Worker to lead: here it comes, as an array."""
    SNAPSHOT = 40
    """Evaluator to lead: the parameters are here that I evaluate now."""
    RESCUE = 26
    """Lead to shard: the shard of this number has died; get ready for a checkpoint with its mirror in its place."""


def bits(number: float) -> int:
    """Return the bits of a float64 `number`, to travel in a message."""
    return int(np.array([number]).view(np.int64)[0])


def number(word: int) -> float:
    """Return the float64 whose bits a `word` of a message has."""
    return float(np.array([word], np.int64).view(np.float64)[0])


class Message(NamedTuple):
    """A message as it arrived."""

    kind: MessageKind
    source: int
    values: tuple[int, ...]


class Mailbox:
    """One role's messages on a communicator of dbmpi's own.

    Parameters
    ----------
    comm
        The ranks.
    role
        The role whose messages are received.
    """

    def __init__(self, comm: MPI.Intracomm, role: Role) -> None:
        self._comm = comm
        self._role = role
        self._leaving: deque[tuple[MPI.Request, np.ndarray]] = deque()

    def send(self, rank: int, role: Role, kind: MessageKind, *values: int) -> None:
        """Send a message; returns at once, also where the destination has died.

        Parameters
        ----------
        rank, role
            The destination.
        kind
            Of the message.
        *values
            Up to seven integers of 64 bits.
        """
        words = np.zeros(_WORDS, np.int64)
        words[: 1 + len(values)] = (kind, *values)
        # Two tests for each message: the list gets shorter, and an order to all ranks does not test all for each.
        for _ in range(min(2, len(self._leaving))):
            earlier = self._leaving.popleft()
            with failures.survived():
                if not earlier[0].Test():
                    self._leaving.append(earlier)
        with failures.survived():
            self._leaving.append((self._comm.Isend(words, rank, role), words))

    def receive(self) -> Message | None:
        """Return the next message for this role, if one has arrived."""
        from mpi4py import MPI

        status = MPI.Status()
        if not failures.probe(self._comm, self._role, status):
            return None
        words = np.empty(_WORDS, np.int64)
        with failures.survived():
            self._comm.Recv(words, status.source, self._role)
            return Message(MessageKind(int(words[0])), status.source, tuple(int(word) for word in words[1:]))
        return None

    def close(self) -> None:
        """Wait until all messages have left."""
        for request, _ in self._leaving:
            waiting.complete(request, "a message to leave")
        self._leaving.clear()
