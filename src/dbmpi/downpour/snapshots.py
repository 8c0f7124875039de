"""The evaluations that the lead asks of evaluators while the replicas learn: when, by which, and of which step."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dbmpi.downpour.replica_state import ReplicaState
from dbmpi.mpi.mailbox import Message, MessageKind

if TYPE_CHECKING:
    from dbmpi.downpour.replicas import Replicas
    from dbmpi.downpour.state_keeper import StateKeeper
    from dbmpi.session import Session


class Taken(NamedTuple):
    """When parameters were taken that are evaluated."""

    step: int = 0
    """Steps of this session that are in them, as the lead knows."""
    epoch: float = 0.0
    """Passes through the training samples, over all sessions."""


class Snapshots:
    """What evaluators do, one snapshot each at a time.

    Parameters
    ----------
    session
        How often to evaluate, and how many evaluators there are.
    replicas
        Those of the run, and the evaluators.
    state
        The state of the objective, which an evaluator gets as the first replica has it then.
    """

    def __init__(self, session: Session, replicas: Replicas, state: StateKeeper) -> None:
        self._plan, self._replicas, self._state, self._order = session.plan, replicas, state, session.order
        self._every = session.run.monitor.evaluate_epochs
        self._idle: list[int] = [*range(self._plan.replicas, self._plan.replicas + self._plan.evaluators)]
        self._taken: dict[int, Taken] = {}
        self._next = self._after(session.begin.samples / self._order.samples)
        self._asked: int | None = None
        """The replica whose state the next evaluation waits for."""

    def ask(self) -> None:
        """Let an evaluator take a snapshot if it is time, and one is idle; where there is a state, fetch that first."""
        if not (self._idle and self._every) or self._asked is not None:
            return
        epoch = self._replicas.samples_so_far / self._order.samples
        if epoch < self._next:
            return
        self._next = self._after(epoch)
        if not self._state.packed.size:
            self._begin()
            return
        self._asked = first = self._replicas.first
        if self._replicas.standings[first].state == ReplicaState.RUNNING:
            self._replicas.tell(first, MessageKind.STATE)
        else:  # it has sent its state when it paused or finished
            self.give()

    def give(self) -> None:
        """Let an evaluator begin that waits for a state, which is here now."""
        if self._asked is not None:
            self._asked = None
            if self._idle:
                self._state.send(self._replicas.rank(self._begin()))

    def hear(self, message: Message, now: Taken) -> Taken | None:
        """Return when the parameters were taken whose evaluation a `message` brings; None if it brings none.

        Parameters
        ----------
        message
            Of an evaluator or of a replica.
        now
            How far the run is.
        """
        sender = self._replicas.of(message.source)
        if not self._plan.evaluates(message.source):
            return Taken(now.step, message.values[0] / self._order.batches_per_epoch)
        if message.kind == MessageKind.EVALUATION and sender in self._taken:
            self._idle.append(sender)
            return self._taken.pop(sender)
        if sender in self._taken:
            self._taken[sender] = now
        return None

    def lose(self, replica: int) -> None:
        """Ask nothing more of a `replica`, or evaluator."""
        self._taken.pop(replica, None)
        self._idle = [other for other in self._idle if other != replica]
        if replica == self._asked:
            self._asked = None

    def _begin(self) -> int:
        """Let the evaluator begin that has been idle longest; return it."""
        evaluator = self._idle.pop(0)
        self._taken[evaluator] = Taken()
        self._replicas.tell(evaluator, MessageKind.TEST, 0, 0)
        return evaluator

    def _after(self, epoch: float) -> float:
        """Return when an evaluation is due again after one at that `epoch`."""
        return (epoch // self._every + 1) * self._every if self._every else 0.0
