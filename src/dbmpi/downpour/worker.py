"""A worker's duties around the optimizer's loop: obey the lead, load batches, report, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.retention import kept
from dbmpi.data.deal import numbers
from dbmpi.data.source import Source
from dbmpi.downpour.assignment import Assignment
from dbmpi.downpour.datapath import Push
from dbmpi.downpour.orders import Orders
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


class Decision(IntEnum):
    """What a replica does next."""

    GO_ON = 0
    REST = 1
    STOP = 2
    DEAL = 3
    TEST = 4


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
        self._team = Team(partitions, orders.obey)
        self._layer_seconds = layer_seconds or {}
        self._warm_steps = assignment.warm_steps
        self._batches = numbers(assignment.stream, assignment.share)
        self._first = assignment.replica == 0
        self._batch = 0
        self._learned = self._drawn = 0
        self._in_a_row = 0
        """Pushes that have been withheld since the last one that was not."""
        self._next_evaluation = assignment.evaluate_epochs
        state = assignment.state
        self._packed = state.pack() if self._first and state is not None else np.empty(0, np.uint8)
        """The state of the objective, as it was last when it could be kept."""

    def proceed(self) -> int | None:
        """Obey the lead's orders, and return the number of the next batch in the stream, or None to end."""
        while True:
            decision, *values = self._team.agree(self._next_decision())
            if decision == Decision.GO_ON:
                batch = next(self._batches, None)
                self._drawn += batch is not None
                return batch
            if decision == Decision.STOP:
                return None
            with self.stopwatch("wait"):
                if decision == Decision.DEAL:
                    self._take_share(*values[:3])
                else:
                    self._rest()

    def load(self, number: int) -> Any:
        """Return the batch of that `number` in the stream."""
        self._batch = number
        self._client.samples += self._order.size(number)
        return self._assignment.train.batch(number)

    def stepped(self, outcome: Outcome) -> None:
        """Count a step and its `outcome`, and call callbacks."""
        self.log.count(outcome)
        if not self._team.speaks:
            return
        event = TrainingEvent(
            self.log.steps, self._epoch, outcome.samples, outcome.mean_loss, outcome.accuracy, replica=self._number
        )
        if self._assignment.callbacks.call("on_step", event) and not self._orders.stopping:
            self._orders.stopping = True
            self._orders.send(MessageKind.STOP_ASKED, 0)

    def pushed(self, push: Push) -> None:
        """Count the steps of a `push` as learned, report when it is time, and evaluate when replica 0 reaches an epoch.

        Raises
        ------
        RunFailed
            If more pushes than allowed were withheld in a row.
        """
        assignment = self._assignment
        self._learned += push.steps
        self._in_a_row = self._in_a_row + 1 if push.withheld else 0
        self.log.withheld += push.withheld
        if self._in_a_row > assignment.most_withheld and self._team.speaks:
            if not assignment.rolls_back:
                raise self._not_finite(push)
            if not self._orders.stopping:
                self._orders.stopping = True
                self._orders.send(MessageKind.ROLL_BACK)
        if self._warm_steps and self._learned >= self._warm_steps:
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
        with self._sending_state():
            self._say(MessageKind.FINISHED, self._learned, bits(self.log.waited), bits(self.log.spent))
        while True:
            decision, *values = self._team.agree(self._last_decision())
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

    @property
    def learned(self) -> int:
        """Batches of this session whose gradients are on their way to the shards, or applied."""
        return self._learned

    def give_up(self) -> None:
        """Before this worker fails, let the lead write a last checkpoint; return when it has."""
        with suppress(RunFailed), self._sending_state(failing=True):
            self._orders.obey()  # this replica may be given up
            self._client.abandon()
            self._client.wait()
            self._orders.send(MessageKind.FAILED, self._learned)
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

    def add_up(self, value: float) -> float:
        """Return the sum of the `value` that each partition of the replica passes (collective among them)."""
        return self._team.add_up(value)

    def largest(self, value: int) -> int:
        """Return the largest `value` that a partition of the replica passes (collective among them)."""
        return self._team.largest(value)

    def obey(self) -> bool:
        """Poll this rank's shard and read the lead's orders; return whether there was anything."""
        return self._orders.obey()

    @property
    def _epoch(self) -> float:
        return (self._batch + 1) / self._order.batches_per_epoch

    def _next_decision(self) -> tuple[int, ...]:
        """Return what the replica does next, as this worker sees it; the first partition decides."""
        orders = self._orders

        def ordered() -> bool:
            return orders.released or orders.paused or orders.stopping or orders.deal is not None

        orders.obey()
        if self._team.speaks and not ordered():
            with self.stopwatch("wait"):
                orders.wait(ordered, "the end of the warmstart", longest_sleep=0.02)
        if orders.stopping:
            return (Decision.STOP,)
        if orders.deal is not None:
            return Decision.DEAL, *orders.deal
        return (Decision.REST if orders.paused else Decision.GO_ON,)

    def _last_decision(self) -> tuple[int, ...]:
        """Return what the replica does when it has nothing to learn."""
        orders = self._orders
        if self._team.speaks:
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
        if self._team.speaks:
            self._orders.receive_array(share, Tag.DEAL, "the batches that the lead deals")
        self._team.broadcast(share)
        self._batches = numbers(self._assignment.stream, [range(*words) for words in share.tolist()])
        self._orders.deal = None
        self._first = self._first or bool(first)
        if warm:
            self._orders.released, self._warm_steps = True, self._learned + warm

    def _rest(self) -> None:
        """Pause, tell the lead, and wait until it lets this replica continue."""
        orders = self._orders
        self._client.wait()
        pause = orders.pause
        with self._sending_state():
            self._say(MessageKind.PAUSED, self._learned, self._drawn, pause)
            if self._team.speaks:
                # The next pause may arrive together with the end of this one, and needs an answer of its own.
                orders.wait(
                    lambda: not orders.paused or orders.stopping or orders.deal is not None or orders.pause != pause,
                    "the lead to write a checkpoint",
                )

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
        self._team.gather()
        if self._team.speaks:
            self._orders.send(kind, *values)

    def _evaluate_now(self, test: Source) -> None:
        with self.stopwatch("wait"):
            outcome = self.evaluate(test, 0, 1)
        self._say_outcome(MessageKind.EVALUATION, self._batch + 1, outcome)

    def _evaluate_part(self, part: int, parts: int) -> None:
        """Evaluate a part of the held-out samples at the end, with the state of the last checkpoint."""
        state, test = self._assignment.state, self._assignment.test
        assert test is not None
        if state is not None and state.nbytes:
            packed = np.empty(state.nbytes, np.uint8)
            if self._team.speaks:
                self._orders.receive_array(packed, Tag.OBJECTIVE_STATE, "the state of the objective")
            self._team.broadcast(packed)
            state.restore(state.unpack(packed))
        self._say_outcome(MessageKind.TESTED, part, self.evaluate(test, part, parts))

    def _say_outcome(self, kind: MessageKind, number: int, outcome: Outcome) -> None:
        for metric, (_, total) in enumerate(outcome.sums):
            self._say(MessageKind.METRIC, metric, bits(total))
        self._say(kind, number, outcome.samples, outcome.correct, bits(outcome.loss))

    def _not_finite(self, push: Push) -> RunFailed:
        """Return the error of a push that must not be withheld."""
        task, loss = self._assignment, push.outcome.mean_loss
        gradient = times = ""
        if push.layer is not None:
            join = "but" if push.outcome.are_numbers else "and"
            gradient = f", {join} the gradient of {task.layers[push.layer]!r} is not finite"
        if self._in_a_row > 1:
            times = f", for {self._in_a_row} pushes in a row"
        return RunFailed(
            f"the loss is {loss} at step {self.log.steps} of replica {self._number}, batch {self._batch} of the stream"
            f"{gradient}{times}; {kept(task.directory / 'checkpoints')}; {task.remedy}"
        )

    def _report(self) -> None:
        self.log.report(self._epoch, self._client.moved, self._layer_seconds)


def evaluate(
    objective: Objective[Any],
    parameters: np.ndarray,
    source: Source,
    batch_size: int,
    part: int = 0,
    parts: int = 1,
    serve: Callable[[], bool] | None = None,
) -> Outcome:
    """Return the outcome of every `parts`-th batch of a source, beginning with number `part`.

    Parameters
    ----------
    objective
        Computes it.
    parameters
        Flat vector.
    source
        The samples.
    batch_size
        How many to compute at a time.
    part, parts
        This share, and the number of shares.
    serve
        Called after each batch.
    """
    total = Outcome(0, 0.0, 0)
    for start in range(part * batch_size, source.samples, parts * batch_size):
        indices = np.arange(start, min(start + batch_size, source.samples))
        total = total.plus(objective.evaluate(parameters, source.batch(indices)))
        if serve is not None:
            serve()
    return total
