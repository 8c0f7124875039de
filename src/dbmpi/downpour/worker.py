"""A worker's duties around the optimizer's loop: obey the lead, load batches, report, evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from mpi4py import MPI

from dbmpi.data.deal import numbers
from dbmpi.data.source import Source
from dbmpi.downpour.assignment import Assignment
from dbmpi.downpour.datapath import Push
from dbmpi.downpour.evaluation import evaluate, receive_state
from dbmpi.downpour.not_finite import not_finite
from dbmpi.downpour.orders import Decision, Orders
from dbmpi.errors import RunFailed
from dbmpi.kernels.memory import aligned_empty
from dbmpi.monitor.callbacks import TrainingEvent
from dbmpi.monitor.worker_log import WorkerLog
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import MessageKind, bits
from dbmpi.mpi.tags import Tag
from dbmpi.objective import Objective, Outcome
from dbmpi.paramserver.client import Client
from dbmpi.replica.team import Team


class Worker:
    """Accompanies the loop of one worker (the `Watcher` of :func:`dbmpi.downpour.algorithm.downpour`).

    Parameters
    ----------
    assignment
        The worker's task.
    objective
        Computes evaluations.
    client
        The worker's connection with the shards.
    orders
        The worker's connection with the lead.
    log
        Of this worker's steps and time.
    partitions
        The workers of this replica; only the first one obeys and answers the lead.
    layer_seconds
        Time spent so far by phase, for each layer, if the objective measures it.

    Attributes
    ----------
    team
        The workers of this replica, which act as one.
    learned
        Batches of this session whose gradients are on their way to the shards, or applied.
    """

    def __init__(
        self,
        assignment: Assignment,
        objective: Objective[Any],
        client: Client,
        orders: Orders,
        log: WorkerLog,
        partitions: MPI.Intracomm,
        layer_seconds: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.log, self.stopwatch = log, log.stopwatch
        self._assignment = assignment
        self._number = assignment.replica
        self._order = assignment.train.order
        self._objective = objective
        self._client = client
        self._orders = orders
        self.team = Team(partitions, orders.obey)
        self._layer_seconds = layer_seconds or {}
        self._warm_steps = assignment.warm_steps
        self._batches = numbers(assignment.stream, assignment.share)
        self._next_batch = next(self._batches, None)
        self._first = assignment.replica == 0
        self._batch = 0
        self.learned = self._drawn = 0
        self._in_a_row = 0
        """Pushes that have been withheld since the last one that was not."""
        self._in_turn = False
        self._asked = self._taken = 0
        """Numbers of the last turns that the lead was asked for, and that began."""
        self._next_evaluation = assignment.evaluate_epochs
        state = assignment.state
        self._packed = state.pack() if self._first and state is not None else np.empty(0, np.uint8)
        """The state of the objective, as it was last when it could be kept."""

    @property
    def expired(self) -> bool:
        """Whether what is accrued must not be pushed any more, as no turn goes on from which it was fetched."""
        return self._assignment.takes_turns and not self._in_turn

    @property
    def turn_ends(self) -> bool:
        """Whether the batch that was given last must be pushed before another one is given."""
        return False

    def proceed(self, fetches: bool) -> int | None:
        """Obey the lead's orders, and return the number of the next batch in the stream, or None to end.

        Parameters
        ----------
        fetches
            Whether a fetch follows, for which the lead is asked where replicas take turns.
        """
        while True:
            if self._orders.state_wanted:
                self._give_state()
            asks = fetches and self._assignment.takes_turns and self._next_batch is not None
            decision, *values = self.team.agree(self._next_decision(asks))
            if decision == Decision.GO_ON:
                if asks:
                    self._in_turn, self._taken = True, self._asked
                batch, self._next_batch = self._next_batch, next(self._batches, None)
                self._drawn += batch is not None
                return batch
            if decision == Decision.STOP:
                return None
            self._obey_between(decision, *values)

    def load(self, number: int) -> Any:
        """Return the batch of that `number` in the stream."""
        self._batch = number
        self._client.samples += self._order.size(number)
        return self._assignment.train.batch(number)

    def stepped(self, outcome: Outcome) -> None:
        """Count a step and its `outcome`, and call callbacks."""
        self.log.count(outcome)
        if not self.team.speaks:
            return
        event = TrainingEvent(
            self.log.steps, self._epoch, outcome.samples, outcome.mean_loss, outcome.accuracy, replica=self._number
        )
        if self._assignment.callbacks.call("on_step", event) and not self._orders.stopping:
            self._orders.stopping = True
            self._orders.send(MessageKind.STOP_ASKED, 0)

    def pushed(self, push: Push, *, last: bool) -> None:
        """Count the steps of a push as learned, report when it is time, and evaluate when replica 0 reaches an epoch.

        Parameters
        ----------
        push
            What has become of it.
        last
            Whether the next push is computed from another fetch, so that this turn ends.

        Raises
        ------
        RunFailed
            If more pushes than allowed were withheld in a row.
        """
        assignment = self._assignment
        self.learned += push.steps
        self._in_a_row = self._in_a_row + 1 if push.withheld else 0
        self.log.withheld += push.withheld
        if self._in_a_row > assignment.most_withheld and self.team.speaks:
            if not assignment.rolls_back:
                raise not_finite(push, self.log.steps, self._batch, self._in_a_row, assignment)
            if not self._orders.stopping:
                self._orders.stopping = True
                self._orders.send(MessageKind.ROLL_BACK)
        if last and self._in_turn:
            with self.stopwatch("wait"):
                self._end_turn()
        if self._warm_steps and self.learned >= self._warm_steps:
            self._warm_steps = 0
            self._client.wait()
            self._say(MessageKind.WARM)
        if self.log.due:
            self._report()
        every = assignment.evaluate_epochs
        epoch = self._epoch
        if self._first and every and epoch >= self._next_evaluation:
            self._next_evaluation = (epoch // every + 1) * every
            if assignment.test is not None and self._batch + 1 < self._order.batches:
                self._evaluate_now(assignment.test)

    def finish(self) -> bool:
        """Report to the lead that all is applied, and wait; evaluate where it asks for that.

        Returns
        -------
        bool
            Whether there is more to learn now; otherwise training has ended.
        """
        self._report()
        self.log.end_trace()
        self._in_turn, self._taken = False, self._asked  # the lead forgets, too
        with self._sending_state():
            self._say(MessageKind.FINISHED, self.learned, bits(self.log.waited), bits(self.log.spent))
        while True:
            decision, *values = self.team.agree(self._last_decision())
            if decision == Decision.TEST:
                self._evaluate_part(*values[:2])
            elif decision == Decision.DEAL:
                self._take_share(*values[:3])
                return True
            else:
                return False

    def leave(self) -> None:
        """Take no further part, because this replica is given up; wait for the end of the run."""
        self._orders.given_up = True
        self._client.leave()
        self._report()
        self._orders.wait(lambda: self._orders.ended, "the end of training", longest_sleep=0.01)

    def give_up(self) -> None:
        """Before this worker fails, let the lead write a last checkpoint; return when it has."""
        with suppress(RunFailed), self._sending_state(failing=True):
            self._orders.obey()  # this replica may be given up
            self._client.abandon()
            self._client.wait()
            self._orders.send(MessageKind.FAILED, self.learned)
            self._orders.wait(lambda: self._orders.ended, "the lead to write a last checkpoint", longest_sleep=0.01)

    def evaluate(self, source: Source, part: int, parts: int) -> Outcome:
        """Return the outcome of every `parts`-th batch of a `source` from number `part`, at the present parameters.

        All partitions of the replica take part, and get the same outcome.
        """
        # In the shards' memory if the worker computes there: there may be too little left for a second copy.
        parameters = self._client.parameters
        if parameters is None:
            parameters = aligned_empty(self._objective.size)
        self._client.fetch(parameters, for_gradient=False)
        return evaluate(self._objective, parameters, source, self._order.batch_size, part, parts, self._orders.work)

    @property
    def _epoch(self) -> float:
        return (self._batch + 1) / self._order.batches_per_epoch

    def _next_decision(self, asks: bool) -> tuple[int, ...]:
        """Return what the replica does next, as this worker sees it; the first partition decides.

        Parameters
        ----------
        asks
            Whether it needs another turn to go on.
        """
        orders, waits = self._orders, asks and not self._in_turn

        def ordered() -> bool:
            may_begin = orders.released and (not waits or self._has_turn())
            return may_begin or orders.paused or orders.stopping or orders.deal is not None

        orders.obey()
        if self.team.speaks and not ordered():
            what, sleep = "the end of the warmstart", 0.02
            if orders.released:
                what, sleep = "replicas whose pushes could become too stale", 1e-3
            with self.stopwatch("wait"):
                orders.wait(ordered, what, longest_sleep=sleep)
        if orders.stopping:
            return (Decision.STOP,)
        if orders.deal is not None:
            return Decision.DEAL, *orders.deal
        if orders.paused:
            return (Decision.REST,)
        return (Decision.END_TURN if asks and self._in_turn else Decision.GO_ON,)

    def _obey_between(self, decision: int, *values: int) -> None:
        """Do what is decided between two steps, other than to go on or to stop."""
        with self.stopwatch("wait"):
            if decision == Decision.END_TURN:
                self._end_turn()
            elif decision == Decision.DEAL:
                self._take_share(*values[:3])
            else:
                self._rest()

    def _has_turn(self) -> bool:
        """Ask the lead for another turn, once; return whether it has begun."""
        if self._asked == self._taken:
            self._asked += 1
            self._orders.send(MessageKind.TURN_ASKED, self._asked)
        return self._orders.turn == self._asked

    def _end_turn(self) -> None:
        """Tell the lead that all pushes of this turn are applied, when they are."""
        self._client.wait()
        self._in_turn = False
        self._say(MessageKind.TURN_OVER)

    def _last_decision(self) -> tuple[int, ...]:
        """Return what the replica does when it has nothing to learn."""
        orders = self._orders
        if self.team.speaks:
            orders.wait(
                lambda: orders.ended or orders.deal is not None or bool(orders.tests),
                "the end of training",
                longest_sleep=0.01,
            )
        if orders.tests:
            return Decision.TEST, *orders.tests.popleft()
        return (Decision.STOP,) if orders.deal is None else (Decision.DEAL, *orders.deal)

    def _take_share(self, length: int, warm: int, first: int) -> None:
        """Learn from now on what the lead deals.

        Parameters
        ----------
        length
            Number of ranges of positions.
        warm
            Batches of the warmstart among them.
        first
            Whether this is the first replica from now on.
        """
        share = np.empty((length, 3), np.int64)
        if self.team.speaks:
            self._orders.receive_array(share, Tag.DEAL, "the batches that the lead deals")
        self.team.broadcast(share)
        self._batches = numbers(self._assignment.stream, [range(*words) for words in share.tolist()])
        self._next_batch = next(self._batches, None)
        self._orders.deal = None
        self._first = self._first or bool(first)
        if warm:
            self._orders.released, self._warm_steps = True, self.learned + warm

    def _rest(self) -> None:
        """Pause, tell the lead, and wait until it lets this replica continue."""
        orders = self._orders
        self._client.wait()
        self._client.push_kept()
        pause = orders.pause
        with self._sending_state():
            self._say(MessageKind.PAUSED, self.learned, self._drawn, pause)
            if self.team.speaks:
                # The next pause may arrive together with the end of this one, and needs an answer of its own.
                orders.wait(
                    lambda: not orders.paused or orders.stopping or orders.deal is not None or orders.pause != pause,
                    "the lead to write a checkpoint",
                )

    def _give_state(self) -> None:
        """Send the lead the state of the objective, for an evaluator."""
        self._orders.state_wanted = False
        with self.stopwatch("wait"), self._sending_state():
            self._say(MessageKind.STATE)

    @contextmanager
    def _sending_state(self, *, failing: bool = False) -> Iterator[None]:
        """Send the lead the state of the objective, which it takes with the message of this block.

        A worker that is `failing` sends the last one that could be kept, if this one cannot: that may be why it fails.
        """
        state, request = self._assignment.state, None
        if self._first and state is not None and state.nbytes:
            try:
                self._packed = state.pack()
            except Exception:
                if not failing:
                    raise
            request = self._orders.send_array(self._packed, Tag.OBJECTIVE_STATE)
        yield
        if request is not None:
            waiting.complete(request, "the lead to take the state of the objective", serve=self._orders.obey)

    def _say(self, kind: MessageKind, *values: int) -> None:
        """Send the lead a message about the whole replica, when all partitions have got here."""
        self.team.gather()
        if self.team.speaks:
            self._orders.send(kind, *values)

    def _evaluate_now(self, test: Source) -> None:
        with self.stopwatch("wait"):
            outcome = self.evaluate(test, 0, 1)
        self._say_outcome(MessageKind.EVALUATION, self._batch + 1, outcome)

    def _evaluate_part(self, part: int, parts: int) -> None:
        """Evaluate a part of the held-out samples at the end, with the state of the last checkpoint."""
        test = self._assignment.test
        assert test is not None
        receive_state(self._assignment.state, self._orders, self.team)
        self._say_outcome(MessageKind.TESTED, part, self.evaluate(test, part, parts))

    def _say_outcome(self, kind: MessageKind, number: int, outcome: Outcome) -> None:
        for metric, (_, total) in enumerate(outcome.sums):
            self._say(MessageKind.METRIC, metric, bits(total))
        self._say(kind, number, outcome.samples, outcome.correct, bits(outcome.loss))

    def _report(self) -> None:
        self.log.report(self._epoch, self._client.moved, self._layer_seconds)
