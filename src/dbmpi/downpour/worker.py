"""A worker's duties around the optimizer's loop: obey the lead, load batches, report, evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.retention import kept
from dbmpi.data.numbered_batches import NumberedBatches
from dbmpi.data.source import Source
from dbmpi.downpour.orders import Orders
from dbmpi.errors import RunFailed
from dbmpi.kernels.memory import aligned_empty
from dbmpi.monitor.callbacks import Callbacks, TrainingEvent
from dbmpi.monitor.worker_log import WorkerLog
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import MessageKind
from dbmpi.mpi.tags import Tag
from dbmpi.objective import Objective, Outcome
from dbmpi.paramserver.client import Client
from dbmpi.replica.own_state import OwnState
from dbmpi.replica.team import Team


class Decision(IntEnum):
    """What a replica does next."""

    GO_ON = 0
    REST = 1
    STOP = 2


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The task of one worker of a run."""

    replica: int
    """Number of this worker's replica."""
    train: NumberedBatches
    """What to learn from."""
    test: Source | None = None
    """Held-out samples."""
    warm_steps: int = 0
    """Steps after which this worker reports to the lead that the warmstart is over; 0 for never."""
    evaluate_epochs: float = 0.0
    """How often replica 0 evaluates the held-out samples; 0 for never."""
    directory: Path
    """That of the run."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    """The user's own, for each step."""
    state: OwnState | None = None
    """What an objective of the user's own has beside its parameters: the lead gets that of replica 0."""
    remedy: str = ""
    """Advice against a loss that is not finite, for the message of the error."""


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
        self._batch = 0
        self._learned = 0
        self._next_evaluation = assignment.evaluate_epochs
        state = assignment.state
        self._packed = state.pack() if self._number == 0 and state is not None else np.empty(0, np.uint8)
        """The state of the objective, as it was last when it could be kept."""

    def proceed(self) -> bool:
        """Obey the lead's orders, and return whether to take another step."""
        while True:
            decision = Decision(self._team.agree(self._next_decision()))
            if decision == Decision.GO_ON:
                return True
            if decision == Decision.STOP:
                return False
            with self.stopwatch("wait"):
                self._rest()

    def load(self, number: int) -> Any:
        """Return the batch of that `number` in the stream."""
        self._batch = number
        self._client.samples += self._order.size(number)
        return self._assignment.train.batch(number)

    def stepped(self, outcome: Outcome) -> None:
        """Count a step and its `outcome`, and call callbacks; a loss that is not finite ends the run."""
        if not math.isfinite(outcome.loss) and self._team.speaks:
            task = self._assignment
            raise RunFailed(
                f"the loss is {outcome.mean_loss} at step {self.log.steps} of replica {self._number}, batch "
                f"{self._batch} of the stream; {kept(task.directory / 'checkpoints')}; {task.remedy}"
            )
        self.log.count(outcome)
        if not self._team.speaks:
            return
        event = TrainingEvent(
            self.log.steps, self._epoch, outcome.samples, outcome.mean_loss, outcome.accuracy, replica=self._number
        )
        if self._assignment.callbacks.call("on_step", event) and not self._orders.stopping:
            self._orders.stopping = True
            self._orders.send(MessageKind.STOP_ASKED, 0)

    def pushed(self, steps: int) -> None:
        """Count `steps` as learned, report when it is time, and evaluate when replica 0 reaches the next epoch."""
        assignment = self._assignment
        self._learned += steps
        if self._warm_steps and self._learned >= self._warm_steps:
            self._warm_steps = 0
            self._client.wait()
            self._say(MessageKind.WARM)
        if self.log.due:
            self._report()
        every = assignment.evaluate_epochs
        epoch = self._epoch
        if self._number == 0 and every and epoch >= self._next_evaluation:
            self._next_evaluation = (epoch // every + 1) * every
            if assignment.test is not None and self._batch + 1 < self._order.batches:
                self._evaluate_now(assignment.test)

    def finish(self) -> int:
        """Report to the lead that all is applied, and wait until it ends training; return the batches learned."""
        self._report()
        with self._sending_state():
            self._say(MessageKind.FINISHED, self._learned)
            self._orders.wait(lambda: self._orders.ended, "the end of training", longest_sleep=0.01)
        return self._learned

    def give_up(self) -> None:
        """Before this worker fails, let the lead write a last checkpoint; return when it has."""
        with suppress(RunFailed), self._sending_state(failing=True):
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

    def obey(self) -> bool:
        """Poll this rank's shard and read the lead's orders; return whether there was anything."""
        return self._orders.obey()

    @property
    def _epoch(self) -> float:
        return (self._batch + 1) / self._order.batches_per_epoch

    def _next_decision(self) -> Decision:
        """Return what the replica does next, as this worker sees it; the first partition decides."""
        orders = self._orders
        orders.obey()
        if self._team.speaks and not (orders.released or orders.paused or orders.stopping):
            with self.stopwatch("wait"):
                orders.wait(
                    lambda: orders.released or orders.paused or orders.stopping,
                    "the end of the warmstart",
                    longest_sleep=0.02,
                )
        if orders.stopping:
            return Decision.STOP
        return Decision.REST if orders.paused else Decision.GO_ON

    def _rest(self) -> None:
        """Pause, tell the lead, and wait until it lets this replica continue."""
        orders = self._orders
        self._client.wait()
        orders.asked_to_pause = False
        with self._sending_state():
            self._say(MessageKind.PAUSED, self._learned)
            if self._team.speaks:
                # The next pause may arrive together with the end of this one, and needs an answer of its own.
                orders.wait(
                    lambda: not orders.paused or orders.stopping or orders.asked_to_pause,
                    "the lead to write a checkpoint",
                )

    @contextmanager
    def _sending_state(self, *, failing: bool = False) -> Iterator[None]:
        """Send the lead the state of the objective, which it takes with the message of this block.

        A worker that is `failing` sends the last one that could be kept, if this one cannot: that may be why it fails.
        """
        state, request = self._assignment.state, None
        if self._number == 0 and state is not None and state.nbytes:
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
        for number, (_, total) in enumerate(outcome.sums):
            self._say(MessageKind.METRIC, number, _bits(total))
        self._say(MessageKind.EVALUATION, self._batch + 1, outcome.samples, outcome.correct, _bits(outcome.loss))

    def _report(self) -> None:
        self.log.report(self._epoch, self._client.moved, self._layer_seconds)


def _bits(value: float) -> int:
    return int(np.array([value]).view(np.int64)[0])


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
