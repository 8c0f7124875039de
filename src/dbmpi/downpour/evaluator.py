"""An evaluator: an instance of the model that evaluates held-out samples while the replicas learn.

It is a client of the shards that only fetches.  So nothing waits for it, and its death costs its evaluations.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dbmpi.downpour.evaluation import outcomes, receive_state
from dbmpi.downpour.orders import Decision
from dbmpi.errors import RunFailed
from dbmpi.kernels.memory import aligned_empty
from dbmpi.mpi import failures
from dbmpi.mpi.mailbox import MessageKind, bits
from dbmpi.objective import Outcome
from dbmpi.replica.team import Team

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.data.source import Source
    from dbmpi.downpour.orders import Orders
    from dbmpi.mpi.watch import Watch
    from dbmpi.objective import Objective
    from dbmpi.paramserver.client import Client
    from dbmpi.replica.own_state import OwnState


class SnapshotEvaluator:
    """One rank of an evaluator.

    Parameters
    ----------
    objective
        Computes evaluations.
    client
        The connection with the shards.
    orders
        The connection with the lead.
    test
        Held-out samples.
    batch_size
        How many are computed at a time.
    partitions
        The ranks of this evaluator; the first one obeys and answers the lead.
    state
        What an objective of the user's own has beside its parameters: the lead sends it with each order.
    """

    def __init__(
        self,
        objective: Objective[Any],
        client: Client,
        orders: Orders,
        test: Source,
        batch_size: int,
        partitions: MPI.Intracomm,
        state: OwnState | None = None,
    ) -> None:
        self._objective, self._client, self._orders = objective, client, orders
        self._test, self._batch_size, self._state = test, batch_size, state
        self._team = Team(partitions, orders.obey)
        # Its own also where workers compute on the shards' memory, which changes during an evaluation.
        self._snapshot = aligned_empty(objective.size)

    def work(self, watch: Watch) -> None:
        """Evaluate whenever the lead asks for it, until training ends.

        Parameters
        ----------
        watch
            Knows which ranks have died.
        """
        try:
            while self._step():
                pass
            for _ in self._orders.tests:  # states that were sent must not be taken for a later one
                receive_state(self._state, self._orders, self._team)
        except Exception as error:  # in whatever step of the exchange the loss of a partition was noticed
            watch.check(now=True)
            if self._orders.lost:
                self._leave()
                return
            if not (isinstance(error, RunFailed) or failures.reports_death(error)):
                self._give_up()
            raise

    def _step(self) -> bool:
        """Do what the lead asks for next; return whether training goes on."""
        decision, *values = self._team.agree(self._decision())
        if decision == Decision.STOP:
            return False
        part, parts = values[:2]
        receive_state(self._state, self._orders, self._team)
        self._client.fetch(self._snapshot, for_gradient=False)
        if not parts:
            self._say(MessageKind.SNAPSHOT)
        outcome = self._outcome(part, parts or 1)
        if outcome is None:
            return False
        for metric, (_, total) in enumerate(outcome.sums):
            self._say(MessageKind.METRIC, metric, bits(total))
        kind = MessageKind.TESTED if parts else MessageKind.EVALUATION
        self._say(kind, part, outcome.samples, outcome.correct, bits(outcome.loss))
        return True

    def _decision(self) -> tuple[int, ...]:
        """Return what this rank would do next; the first partition decides."""
        orders = self._orders
        if self._team.speaks:
            orders.wait(lambda: orders.ended or bool(orders.tests), "the next evaluation", longest_sleep=0.01)
            if not orders.ended:
                return Decision.TEST, *orders.tests.popleft()
        return (Decision.STOP,)

    def _outcome(self, part: int, parts: int) -> Outcome | None:
        """Return the outcome of a part of the held-out samples; None where training ends before."""
        total = Outcome(0, 0.0, 0)
        for one in outcomes(self._objective, self._snapshot, self._test, self._batch_size, part, parts):
            total = total.plus(one)
            self._orders.work()
            if self._team.agree((self._orders.ended,))[0]:
                return None
        return total

    def _say(self, kind: MessageKind, *values: int) -> None:
        """Send the lead a message about the whole evaluator, when all partitions have got here."""
        self._team.gather()
        if self._team.speaks:
            self._orders.send(kind, *values)

    def _leave(self) -> None:
        """Take no further part, because a partition is lost; wait for the end of the run."""
        self._orders.given_up = True
        self._client.leave()
        self._wait_for_end("the end of training")

    def _give_up(self) -> None:
        """Before this rank fails, let the lead write a last checkpoint; return when it has."""
        with suppress(RunFailed):
            self._orders.obey()  # it may be given up
            self._orders.send(MessageKind.FAILED, 0)
            self._wait_for_end("the lead to write a last checkpoint")

    def _wait_for_end(self, what: str) -> None:
        self._orders.wait(lambda: self._orders.ended, what, longest_sleep=0.01)
