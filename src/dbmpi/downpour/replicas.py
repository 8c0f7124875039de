"""The replicas of a run, as the lead knows them and orders them about."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dbmpi.data.deal import Deal
from dbmpi.downpour.settling import Settled, Settling
from dbmpi.mpi import failures, pieces
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.mpi.topology import Plan
    from dbmpi.paramserver.protocol import Header
    from dbmpi.session import StartingPoint

_RECENT = 256
"""Reports that are kept one by one: a client never has as many pushes that are not applied everywhere."""
_PATIENCE = 1.0
"""Seconds that a replica is given to pause, at least."""
_STEPS = 5.0
"""How many times as long as a step usually takes a replica is given to pause."""


class ReplicaState(Enum):
    """What a replica does."""

    RUNNING = auto()
    PAUSED = auto()
    FINISHED = auto()
    """It has learned its share, and waits for more or for the end."""
    LOST = auto()
    """It is given up."""


class Reports:
    """The steps and samples behind the pushes of one replica, in this session.

    Attributes
    ----------
    steps, samples
        Of all reports so far.
    usual
        Seconds that a step takes; 0 where that is not known.
    """

    def __init__(self) -> None:
        self.steps = self.samples = 0
        self.usual = 0.0
        self._recent = deque([(0, 0, 0)], _RECENT)
        self._since = 0.0

    def add(self, header: Header) -> None:
        """Count a push by the `header` of its report."""
        now = time.monotonic()
        if self._since:
            seconds = (now - self._since) / max(header.steps, 1)
            # A single long one counts little: the replica may have been halted.
            self.usual = 0.9 * self.usual + 0.1 * min(seconds, 4 * self.usual) if self.usual else seconds
        self._since = now
        self.steps, self.samples = self.steps + header.steps, self.samples + header.samples
        self._recent.append((self._recent[-1][0] + 1, self.steps, self.samples))

    def until(self, pushes: int) -> tuple[int, int]:
        """Return the steps and samples behind the first `pushes`, which are among the last ones."""
        return next((steps, samples) for number, steps, samples in self._recent if number == pushes)


@dataclass
class Standing:
    """How one replica stands."""

    state: ReplicaState = ReplicaState.RUNNING
    learned: int = 0
    """Batches whose pushes are applied everywhere, as of its last pause, or when they were settled."""
    samples: int = 0
    """Samples of these batches."""
    drawn: int = 0
    """Batches that it had begun when it last paused."""
    reports: Reports = field(default_factory=Reports)
    pause: int = 0
    """Number of the pause that it has been asked for; 0 for none."""
    asked: float = 0.0
    """When it was asked to pause."""
    held: bool = False
    """Whether a checkpoint is written without its help, while the shards hold back what it pushes."""

    @property
    def awaited(self) -> bool:
        """Whether a checkpoint waits for it."""
        return self.state == ReplicaState.RUNNING and not self.held


class Loss(NamedTuple):
    """What a replica that is given up had done, and what becomes of its share."""

    replica: int
    pushes: int
    dropped: int
    """Pushes that were posted in part."""
    repeated: int
    """Pushes of which a part was applied, though their batches are learned again."""
    steps: int
    """Steps beyond those that count, which had been reported."""
    samples: int
    """Samples behind them."""
    left: int
    """Batches that others learn."""
    takers: tuple[int, ...]
    """These others."""


class Replicas:
    """The replicas of a run.

    Parameters
    ----------
    comm
        All ranks.
    plan
        Which rank plays which role.
    begin
        Where the session starts.
    mailbox
        Of the lead.
    settling
        Settles what a replica has pushed.
    dead
        Returns the ranks that have died.

    Attributes
    ----------
    deal
        Which batches each of them learns.
    standings
        How each of them stands.
    first
        The replica that evaluates held-out samples, and whose state the objective's is.
    released
        Whether the warmstart is over.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        plan: Plan,
        begin: StartingPoint,
        mailbox: Mailbox,
        settling: Settling,
        dead: Callable[[], frozenset[int]],
    ) -> None:
        self._comm, self._plan, self._mailbox = comm, plan, mailbox
        self._settling, self._dead = settling, dead
        self.deal = Deal(begin.stream, plan.learning, begin.warmstart, plan.spares)
        self.standings = [Standing() for _ in range(plan.replicas)]
        self.first, self.released = 0, not begin.warmstart
        self._heir: int | None = None
        """Is to become the first."""
        self._pauses = 0
        self._leaving: dict[int, tuple[pieces.Operation, np.ndarray]] = {}

    @property
    def learned(self) -> list[int]:
        """Batches of this session that count, by replica."""
        return [one.learned for one in self.standings]

    @property
    def samples(self) -> int:
        """Samples of these batches."""
        return sum(one.samples for one in self.standings)

    @property
    def living(self) -> list[int]:
        """Replicas that are not given up."""
        return self.which(ReplicaState.RUNNING, ReplicaState.PAUSED, ReplicaState.FINISHED)

    @property
    def lost(self) -> list[int]:
        """Replicas that are given up."""
        return self.which(ReplicaState.LOST)

    @property
    def over(self) -> bool:
        """Whether nobody learns any more."""
        return not self.which(ReplicaState.RUNNING, ReplicaState.PAUSED)

    def which(self, *states: ReplicaState) -> list[int]:
        """Return the replicas in one of some `states`."""
        return [replica for replica, one in enumerate(self.standings) if one.state in states]

    def rank(self, replica: int) -> int:
        """Return the rank of the first partition of a `replica`, which speaks for it."""
        return self._plan.worker_ranks[replica * self._plan.partitions]

    def ranks(self, replica: int) -> tuple[int, ...]:
        """Return the ranks of a `replica`."""
        first = replica * self._plan.partitions
        return self._plan.worker_ranks[first : first + self._plan.partitions]

    def of(self, rank: int) -> int:
        """Return the replica of a worker on that `rank`."""
        worker = self._plan.worker_of(rank)
        assert worker is not None
        return worker // self._plan.partitions

    # Orders

    def tell(self, replica: int, kind: MessageKind, *values: int) -> None:
        """Send a replica an order.

        Parameters
        ----------
        replica
            Number of the replica.
        kind, *values
            The message.
        """
        self._mailbox.send(self.rank(replica), Role.WORKER, kind, *values)

    def tell_learners(self, kind: MessageKind) -> None:
        """Send an order of that `kind` to all that have not finished."""
        for replica in self.which(ReplicaState.RUNNING, ReplicaState.PAUSED):
            self.tell(replica, kind)

    def tell_all(self, kind: MessageKind) -> None:
        """Send an order of that `kind` to every living worker, also of replicas that are given up."""
        for rank in self._plan.worker_ranks:
            if rank not in self._dead():
                self._mailbox.send(rank, Role.WORKER, kind)

    def pause(self, replicas: Sequence[int]) -> None:
        """Ask `replicas` to pause, unless they have been asked already."""
        self._pauses += 1
        for replica in replicas:
            one = self.standings[replica]
            if one.state == ReplicaState.RUNNING and not one.pause:
                one.pause, one.asked = self._pauses, time.monotonic()
                self.tell(replica, MessageKind.PAUSE, one.pause)

    def late(self) -> list[int]:
        """Return the replicas that do not come to the pause that they are asked for, in the time that they need."""
        patience = max(_PATIENCE, _STEPS * max(one.reports.usual for one in self.standings))
        now = time.monotonic()
        return [
            replica
            for replica, one in enumerate(self.standings)
            if one.awaited and one.pause and now - one.asked > patience
        ]

    def hold(self, replica: int) -> None:
        """Begin to settle what a `replica` has pushed, for a checkpoint that does without it."""
        self.standings[replica].held = True
        self._settling.begin(replica, gone=False)

    def go(self) -> None:
        """Let all go on after a checkpoint's pause, also those that it has done without."""
        for replica, one in enumerate(self.standings):
            if one.held:
                one.held = False
                self._settling.let_go(replica)
            if one.state == ReplicaState.RUNNING and one.pause:
                one.pause = 0
                self.tell(replica, MessageKind.GO)
        self.deal_out()

    def stop(self) -> None:
        """Let all finish, also those that pause."""
        for replica, one in enumerate(self.standings):
            if one.held:
                one.held = False
                self._settling.let_go(replica)
            one.pause = 0
            if one.state == ReplicaState.PAUSED:
                one.state = ReplicaState.RUNNING
        self.tell_learners(MessageKind.STOP)

    # What they report

    def paused(self, replica: int, learned: int, drawn: int, pause: int) -> bool:
        """Note that a replica pauses; return whether it is still asked to.

        Parameters
        ----------
        replica
            Number of the replica.
        learned, drawn
            How many of its batches are learned, and begun.
        pause
            Number of the pause.
        """
        one = self.standings[replica]
        if one.state != ReplicaState.RUNNING or one.pause != pause:
            return False
        one.state, one.pause, one.drawn = ReplicaState.PAUSED, 0, drawn
        one.learned, one.samples = learned, one.reports.samples
        return True

    def finished(self, replica: int, learned: int) -> None:
        """Note that a `replica` has nothing to learn, after so many batches that it has `learned`."""
        one = self.standings[replica]
        if one.state != ReplicaState.LOST:
            one.state, one.pause, one.drawn = ReplicaState.FINISHED, 0, learned
            one.learned, one.samples = learned, one.reports.samples

    def release(self) -> None:
        """Let all learn, now that the warmstart is over."""
        self.released = True
        for replica in self.living:
            self.tell(replica, MessageKind.RELEASE)

    # Losses

    def give_up(self, replica: int) -> None:
        """Do without a `replica` from now on."""
        one = self.standings[replica]
        one.state, one.held, one.pause = ReplicaState.LOST, False, 0
        for rank in self.ranks(replica):
            if rank not in self._dead():
                self._mailbox.send(rank, Role.WORKER, MessageKind.LEAVE)
        self._settling.begin(replica, gone=True)

    def settled(self, done: Settled, *, ending: bool) -> Loss | None:
        """Note what counts of the pushes of a replica; deal out the rest of its share if it is given up.

        Parameters
        ----------
        done
            What the shards have settled.
        ending
            Whether the run ends, so that nothing more is learned.

        Returns
        -------
        Loss or None
            What is lost; None where the replica is only done without for a while.
        """
        one = self.standings[done.replica]
        one.learned, one.samples = one.reports.until(done.pushes)
        if not done.gone:
            return None
        takers = [] if ending else self._takers()
        left = self.deal.give_up(done.replica, one.learned, takers)
        steps, samples = one.reports.steps - one.learned, one.reports.samples - one.samples
        one.reports.steps, one.reports.samples = one.learned, one.samples
        if done.replica in (self.first, self._heir):
            self._heir = takers[0] if takers else None
        return Loss(
            done.replica, done.pushes, done.dropped, done.partly, steps, samples, left, tuple(takers if left else ())
        )

    def deal_out(self) -> None:
        """Let those that pause go on, and those that have finished, with a new share where one is owed.

        Those that run are asked to pause for it.  To be called often, but not while shards take a checkpoint.
        """
        self.pause([replica for replica in self.which(ReplicaState.RUNNING) if self._is_owed(replica)])
        for replica in self.which(ReplicaState.PAUSED, ReplicaState.FINISHED):
            one = self.standings[replica]
            owed = self._is_owed(replica)
            if owed:
                self._deal_out(replica)
            if owed or one.state == ReplicaState.PAUSED:
                one.state = ReplicaState.RUNNING
                self.tell(replica, MessageKind.GO)

    def _is_owed(self, replica: int) -> bool:
        return self.deal.owes(replica) or replica == self._heir

    def _takers(self) -> list[int]:
        """Return which replicas learn what another one cannot: a spare one, or all."""
        spares = [replica for replica in self.living if replica >= self._plan.learning and self.deal.is_idle(replica)]
        return spares[:1] or self.living

    def _deal_out(self, replica: int) -> None:
        if replica == self._heir:
            self.first, self._heir = replica, None
        share = self.deal.take(replica, self.standings[replica].drawn)
        words = np.array([(part.start, part.stop, part.step) for part in share], np.int64)
        warm = 0 if self.released else self.deal.warm(replica)
        self.tell(replica, MessageKind.DEAL, len(share), warm, replica == self.first)
        with failures.survived():
            self._leaving[replica] = pieces.isend(self._comm, words, self.rank(replica), Tag.DEAL), words
