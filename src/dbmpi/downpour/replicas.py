"""The replicas of a run, as the lead knows them and orders them about."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.data.deal import Deal
from dbmpi.downpour.losses import LostShare
from dbmpi.downpour.replica_state import ReplicaState
from dbmpi.downpour.rounds import dealing
from dbmpi.downpour.settlement import HeldReplicas, Settled, Settlement
from dbmpi.downpour.standings import Standings
from dbmpi.downpour.warmstart import Joining, Warmstart
from dbmpi.mpi import failures, pieces, waiting
from dbmpi.mpi.mailbox import Mailbox, Message, MessageKind, Role
from dbmpi.mpi.tags import Tag
from dbmpi.paramserver.tally import PushProgress

if TYPE_CHECKING:
    from dbmpi.checkpoint.schema import CheckpointInfo
    from dbmpi.paramserver.protocol import Header
    from dbmpi.session import Session

_PATIENCE = 1.0
"""Seconds that a replica is given to pause, at least."""
_STEPS = 5.0
"""How many times as long as a step usually takes a replica is given to pause."""


class Replicas(Standings):
    """The replicas of a run.

    Parameters
    ----------
    session
        Everything that is known of the run.
    mailbox
        Of the lead.
    held
        Holds back what a replica pushes on the lead's own shard.

    Attributes
    ----------
    settlement
        Settles what a replica has pushed.
    turns
        Which of them may compute at the same time, where that is bounded.
    deal
        Which batches each of them learns.
    first
        The replica that evaluates held-out samples, and whose state the objective's is.
    joining
        Says when replicas begin to learn.
    """

    def __init__(self, session: Session, mailbox: Mailbox, held: HeldReplicas) -> None:
        plan, begin = session.plan, session.begin
        super().__init__(plan, begin.samples)
        self._comm, self._plan, self._mailbox, self._begin = session.comms.world, plan, mailbox, begin
        self._watch = session.watch
        warmstart = Warmstart.of(session)
        self.turns, self.deal = dealing(
            session, warmstart, lambda replica, *turn: self.tell(replica, MessageKind.TURN, *turn)
        )
        self.settlement = Settlement(plan.shards, held, self.tell_shards, self.turns.leave)
        self.joining = Joining(self, warmstart, plan, session.run.optimizer.warmstart_loss)
        self.first = 0
        self._heir: int | None = None
        """Is to become the first."""
        self._pauses, self._reported_alive = 0, time.monotonic()
        self._changed = False
        """Whether a replica pauses, has finished or is given up since shares were dealt out."""
        self._leaving: dict[int, tuple[pieces.Operation, np.ndarray]] = {}

    @property
    def awaited(self) -> bool:
        """Whether a checkpoint waits for any of them."""
        return self.settlement.busy or any(one.awaited for one in self.standings)

    def rank(self, replica: int) -> int:
        """Return the rank of the first partition of a `replica`, which speaks for it."""
        return self._plan.ranks_of(replica)[0]

    def names(self, replicas: Sequence[int]) -> str:
        """Return the names of some `replicas` for messages."""
        return ", ".join(f"{self._plan.name(replica)} on rank {self.rank(replica)}" for replica in replicas)

    def of(self, rank: int) -> int:
        """Return the replica of a worker on that `rank`."""
        replica = self._plan.replica_of(rank)
        assert replica is not None
        return replica

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
            if rank not in self._watch.dead:
                self._mailbox.send(rank, Role.WORKER, kind)

    def tell_shards(self, kind: MessageKind, *values: int) -> None:
        """Send all shards but the lead's own an order.

        Parameters
        ----------
        kind, *values
            The message.
        """
        for rank in self._plan.shard_ranks[1:]:
            self._mailbox.send(rank, Role.SHARD, kind, *values)

    def say_alive(self) -> None:
        """Tell all ranks that the run moves, in time before those that wait give up."""
        if time.monotonic() - self._reported_alive >= waiting.STALL_SECONDS / 4:
            self._reported_alive = time.monotonic()
            self.tell_all(MessageKind.ALIVE)
            self.tell_shards(MessageKind.ALIVE)

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
            if one.awaited and one.pause and now - one.asked > patience and not self.turns.awaits(replica)
        ]

    def hold(self, replica: int) -> None:
        """Begin to settle what a `replica` has pushed, for a checkpoint that does without it."""
        self.standings[replica].held = True
        self.settlement.begin(replica, gone=False)

    def go(self) -> None:
        """Let all go on after a checkpoint's pause, also those that it has done without."""
        self._let_go()
        for replica, one in enumerate(self.standings):
            if one.state == ReplicaState.RUNNING and one.pause:
                one.pause = 0
                self.tell(replica, MessageKind.GO)
        self._changed = True
        self.deal_out()

    def stop(self) -> None:
        """Let all finish, also those that pause."""
        self._let_go()
        self.turns.stop()
        for one in self.standings:
            one.pause = 0
            if one.state == ReplicaState.PAUSED:
                one.state = ReplicaState.RUNNING
        self.tell_learners(MessageKind.STOP)

    # What they report

    def count(self, client: int, header: Header) -> None:
        """Count the steps and samples in the `header` of a report by a `client`."""
        self.standings[client // self._plan.partitions].reports.add(header)
        self.joining.count(header)

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
        self._changed = True
        one.state, one.pause, one.drawn = ReplicaState.PAUSED, 0, drawn
        one.learned, one.samples = learned, one.reports.samples
        return True

    def finished(self, replica: int, learned: int, waited: float = 0.0, spent: float = 0.0) -> None:
        """Note that a replica has nothing to learn.

        Parameters
        ----------
        replica
            Number of the replica.
        learned
            How many of its batches it has learned.
        waited, spent
            Seconds that its first partition has waited for the shards, and spent in all.
        """
        one = self.standings[replica]
        if one.state != ReplicaState.LOST:
            self._changed = True
            self.turns.over(replica)
            one.state, one.pause, one.drawn = ReplicaState.FINISHED, 0, learned
            one.waited, one.spent = waited, spent
            one.learned, one.samples = learned, one.reports.samples

    def hear(self, message: Message) -> None:
        """Act on what a worker or a shard reports in a `message`, unless it is about something else."""
        kind, values = message.kind, message.values
        if kind == MessageKind.HELD:
            self.settlement.answered(values[0], PushProgress(*values[2:5]), gone=bool(values[1]))
        elif kind == MessageKind.SETTLED:
            self.turns.settled(values[0])
        elif kind == MessageKind.WARM:
            self.joining.end()
        elif kind == MessageKind.ALIVE:
            self.say_alive()
        elif kind in (MessageKind.TURN_ASKED, MessageKind.TURN_OVER):
            replica = self.of(message.source)
            if replica in self.lost:
                return
            if kind == MessageKind.TURN_ASKED:
                self.turns.ask(replica, values[0])
            else:
                self.turns.over(replica)

    @property
    def alone(self) -> list[int]:
        """The replica that has the warmstart, if it is known by now."""
        return [replica for replica in self.living if self.deal.warm(replica)]

    def _end_warmstart(self) -> None:
        """Divide the rest of a warmstart whose loss is reached, if its replica pauses."""
        for replica in self.alone:
            if self.standings[replica].state != ReplicaState.RUNNING:
                others = [other for other in self.living if other < self._plan.learning and other != replica]
                phases = self.joining.warmstart.phases
                assert isinstance(self.deal, Deal)  # rounds have no warmstart
                self.deal.end_warmstart(replica, self.standings[replica].drawn, others, phases)
                self.joining.end()

    def describe(self, info: Callable[..., CheckpointInfo]) -> tuple[int, Callable[..., CheckpointInfo]]:
        """Return the step of a checkpoint of what has been learned, and what describes it.

        Parameters
        ----------
        info
            Describes it, given what only the replicas know.
        """
        begin, learned = self._begin, self.learned
        left, steps = self.deal.left(learned), begin.step + sum(learned)
        earlier = begin.done or (0,) * self._plan.replicas
        return steps, partial(
            info,
            step=steps,
            samples=begin.samples + self.samples,
            frontier=left.frontier,
            total=left.total,
            holes=left.holes,
            done=tuple(before + now for before, now in zip(earlier, learned[: len(earlier)], strict=True)),
        )

    # Losses

    def give_up(self, replica: int) -> None:
        """Do without a `replica` from now on."""
        one = self.standings[replica]
        one.state, one.held, one.pause = ReplicaState.LOST, False, 0
        for rank in self._plan.ranks_of(replica):
            if rank not in self._watch.dead:
                self._mailbox.send(rank, Role.WORKER, MessageKind.LEAVE)
        self.turns.lose(replica)
        self.settlement.begin(replica, gone=True)

    def settled(self, done: Settled, *, ending: bool) -> LostShare | None:
        """Note what counts of the pushes of a replica; deal out the rest of its share if it is given up.

        Parameters
        ----------
        done
            What the shards have settled.
        ending
            Whether the run ends, so that nothing more is learned.

        Returns
        -------
        LostShare or None
            What is lost; None where the replica is only done without for a while.
        """
        one = self.standings[done.replica]
        one.learned, one.samples = one.reports.until(done.pushes)
        if not done.gone:
            return None
        self._changed = True
        takers = [] if ending else self._takers()
        left = self.deal.give_up(done.replica, one.learned, takers)
        steps, samples = one.reports.steps - one.learned, one.reports.samples - one.samples
        one.reports.steps, one.reports.samples = one.learned, one.samples
        if done.replica in (self.first, self._heir):
            self._heir = takers[0] if takers else None
        return LostShare(
            done.replica, done.pushes, done.dropped, done.partly, steps, samples, left, tuple(takers if left else ())
        )

    def deal_out(self) -> None:
        """Let those that pause go on, and those that have finished, with a new share where one is owed.

        Those that run are asked to pause for it; the warmstart is over where nobody is left to learn it.  To be called
        often, but not while shards take a checkpoint.
        """
        pauses = any(one.pause or one.state == ReplicaState.PAUSED for one in self.standings)
        self.turns.begin_with([] if pauses else self.which(ReplicaState.RUNNING))
        if not self._changed:
            return
        self._changed = False
        if self.joining.reached and not self.joining.over:
            self._end_warmstart()
        self.pause([replica for replica in self.which(ReplicaState.RUNNING) if self._is_owed(replica)])
        for replica in self.which(ReplicaState.PAUSED, ReplicaState.FINISHED):
            one = self.standings[replica]
            owed = self._is_owed(replica)
            if owed:
                self._deal_out(replica)
            if owed or one.state == ReplicaState.PAUSED:
                one.state = ReplicaState.RUNNING
                self.tell(replica, MessageKind.GO)
        learn = self.which(ReplicaState.RUNNING)
        if not any(self.deal.warm(replica) or self._is_owed(replica) for replica in learn):
            self.joining.end()
        self.joining.go_on(learn)

    def _let_go(self) -> None:
        for replica, one in enumerate(self.standings):
            if one.held:
                one.held = False
                self.settlement.let_go(replica)

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
        warm = 0 if self.joining.over else self.deal.warm(replica)
        self.tell(replica, MessageKind.DEAL, len(share), warm, replica == self.first)
        with failures.survived():
            self._leaving[replica] = pieces.isend(self._comm, words, self.rank(replica), Tag.DEAL), words
