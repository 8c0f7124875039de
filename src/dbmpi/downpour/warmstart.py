"""The warmstart: one replica learns alone at first, and then the others join it, at once or one after the other."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbmpi.data.deal import DealPhase
from dbmpi.mpi.mailbox import MessageKind

if TYPE_CHECKING:
    from dbmpi.checkpoint.account import Account
    from dbmpi.downpour.replicas import Replicas
    from dbmpi.mpi.topology import Plan
    from dbmpi.paramserver.protocol import Header
    from dbmpi.session import Session

_RECENT = 100
"""Pushes of the replica that learns alone whose mean loss counts."""


@dataclass(frozen=True)
class Warmstart:
    """What of the warmstart is before a session, as all ranks know it; samples are counted over all sessions."""

    batches: int = 0
    """Batches that the first replica learns alone: all that are left, where the loss says when it ends."""
    joined: int = 1
    """Replicas that learn from the beginning of the session."""
    phases: tuple[DealPhase, ...] = ()
    """What follows, before all of them learn."""
    ends: int | None = 0
    """Samples after which the first replica is not alone any more; None where the loss says when that is."""
    release: int = 0
    """Samples between two replicas that join; 0 where all join at once."""

    @classmethod
    def of(cls, session: Session) -> Warmstart:
        """Return that of a `session`."""
        optimizer, order, begin = session.run.optimizer, session.order, session.begin
        learning, left = session.plan.learning, len(begin.stream)
        release, phased = optimizer.release_samples, session.plan.learning > 1

        def after(samples: int) -> int:
            """Return how many batches have so many samples, from where the session begins."""
            first = begin.stream.frontier
            most = range(begin.stream.total - first)
            return bisect_left(most, samples, key=lambda batches: order.before(first + batches) - order.before(first))

        def phases(first: int, active: int) -> tuple[DealPhase, ...]:
            """Return the phases from one of so many samples, with so many active replicas."""
            lengths = [first, *[release] * (learning - 1 - active)] if release and active < learning else []
            return tuple(
                DealPhase(-(-length // order.batch_size), active + turn) for turn, length in enumerate(lengths)
            )

        if optimizer.warmstart_loss is not None and phased:
            ends = begin.earlier.warm_samples if begin.earlier is not None else 0
            if not ends:
                return cls(left, 1, phases(release, 2), None, release)
            batches = 0
        elif optimizer.warmstart_samples:
            ends = optimizer.warmstart_samples
            batches = after(ends - begin.samples)
        else:
            ends = order.before(min(optimizer.warmstart, order.batches))
            batches = max(0, optimizer.warmstart - begin.step)
        if batches or not (optimizer.warms and phased):
            return cls(batches, 1 if batches else learning, phases(release, 2), ends, release)
        passed = max(begin.samples - ends, 0)
        joined = min(2 + passed // release, learning) if release else learning
        return cls(0, joined, phases(release - passed % release, joined) if release else (), ends, release)


class Joining:
    """When replicas begin to learn, as the lead says it.

    Parameters
    ----------
    replicas
        Those of the run.
    warmstart
        What is planned.
    plan
        How many replicas there are.
    loss
        The mean loss at which a warmstart ends that has no fixed end.

    Attributes
    ----------
    warmstart
        As given.
    over
        Whether the warmstart is.
    reached
        Whether the loss says that it should be.
    waiting
        Replicas that may not begin yet, in the order in which they will.
    """

    def __init__(self, replicas: Replicas, warmstart: Warmstart, plan: Plan, loss: float | None) -> None:
        self._replicas, self.warmstart, self._loss = replicas, warmstart, loss
        self._ends = warmstart.ends
        self.over = not warmstart.batches
        self.reached = self._told = False
        self._recent = 0.0
        self._pushes: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self.waiting = [*range(warmstart.joined, plan.learning)]
        self._spares = [] if self.over else [*range(plan.learning, plan.replicas)]

    def count(self, header: Header) -> None:
        """Note the loss of the steps behind a push, by the `header` of its report."""
        if self._loss is None or self.over or header.withheld or not header.samples:
            return
        self._pushes.append((header.loss, header.samples))
        if len(self._pushes) == _RECENT:
            self._recent = sum(loss for loss, _ in self._pushes) / sum(samples for _, samples in self._pushes)
            self.reached = self.reached or self._recent <= self._loss

    def poll(self, account: Account, say: Callable[[str], None]) -> None:
        """Let replicas begin whose time has come, and the one that is alone pause when its loss is reached.

        Parameters
        ----------
        account
            Keeps for checkpoints when the warmstart was over, where its loss has said so.
        say
            Shows a line to the user.
        """
        if self.over:
            self.go_on()
        elif self.reached:
            self._replicas.pause(self._replicas.alone)
        if self.over and self.reached and not self._told:
            self._told = True
            account.warmed(self._ends or 0)
            say(f"the loss is {self._recent:.4g}: the warmstart is over after {self._ends or 0:,} samples")

    def end(self) -> None:
        """End the warmstart, if it is not over."""
        if self.over:
            return
        self.over, samples = True, self._replicas.samples_so_far
        self._ends = samples if self._ends is None else min(self._ends, samples)
        for spare in self._spares:
            self._release(spare)
        self.go_on()

    def go_on(self, learn: Collection[int] = ()) -> None:
        """Let those join whose time has come, once the warmstart is over.

        Parameters
        ----------
        learn
            Replicas that learn, or wait for their beginning; if there are any, and all of them wait, one joins anyway.
        """
        alone = bool(learn) and all(one in self.waiting for one in learn)
        while self.over and self.waiting:
            due = (self._ends or 0) + (self.waiting[0] - 1) * self.warmstart.release
            if self._replicas.samples_so_far < due and not alone:
                return
            self._release(self.waiting.pop(0))
            alone = False

    def _release(self, replica: int) -> None:
        if replica not in self._replicas.lost:
            self._replicas.tell(replica, MessageKind.RELEASE)
