"""A worker's duties around the optimizer's loop: obey the lead, load batches, report, evaluate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.retention import kept
from dbmpi.config import Run
from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.errors import RunFailed
from dbmpi.machine.signals import StopSignal
from dbmpi.monitor.worker_log import WorkerLog
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.objective import Batch, Objective, Outcome
from dbmpi.paramserver.client import Client
from dbmpi.replica.replica import Replica
from dbmpi.replica.team import Team

_FOR_THE_LEAD = 1.25
"""Factor on the stall limit where a worker waits for the lead, which knows better which rank is late."""


class Decision(IntEnum):
    """What a replica does next."""

    GO_ON = 0
    REST = 1
    STOP = 2


class Worker:
    """Accompanies the loop of one worker (the `Watcher` of :func:`dbmpi.downpour.algorithm.downpour`).

    Parameters
    ----------
    run
        The description of the run.
    number
        Number of this worker's replica.
    released
        Whether this worker may begin at once; otherwise it waits for the end of the warmstart.
    warm_steps
        Steps after which this worker tells the lead that the warmstart is over; 0 for never.
    partitions
        The workers of this replica; the first one hears and answers the lead.

    Attributes
    ----------
    log
        Of its steps and its time.
    """

    def __init__(
        self,
        run: Run,
        number: int,
        *,
        objective: Replica,
        client: Client,
        mailbox: Mailbox,
        lead: int,
        order: Order,
        train: Source,
        test: Source | None,
        log: WorkerLog,
        stop: StopSignal,
        serve: Callable[[], bool] | None,
        released: bool,
        warm_steps: int,
        partitions: MPI.Intracomm,
    ) -> None:
        self._run = run
        self._number = number
        self._objective = objective
        self._client = client
        self._mailbox = mailbox
        self._lead = lead
        self._order = order
        self._train = train
        self._test = test
        self._stop = stop
        self._serve = serve
        self._team = Team(partitions, self.obey)
        self.log, self.stopwatch = log, log.stopwatch
        self._released = released
        self._warm_steps = warm_steps
        self._stopping = False
        self._stop_told = False
        self._ended = False
        self._paused = False
        self._asked_to_pause = False
        self._alive = time.monotonic()
        self._batch = 0
        self._learned = 0
        self._next_evaluation = run.monitor.evaluate_epochs

    # What the loop asks for

    def proceed(self) -> bool:
        """Serve this rank's shard, obey the lead's orders, and return whether to take another step."""
        while True:
            decision = Decision(self._team.agree(self._next_decision()))
            if decision == Decision.GO_ON:
                return True
            if decision == Decision.STOP:
                return False
            with self.stopwatch("wait"):
                self._rest()

    def load(self, number: int) -> Batch:
        """Return a batch of the stream."""
        self._batch = number
        return self._train.batch(self._order.indices(number))

    def stepped(self, outcome: Outcome) -> None:
        """Count a step; a loss that is not finite ends the run before its gradient is pushed."""
        if not math.isfinite(outcome.loss) and self._team.speaks:
            raise RunFailed(
                f"the loss is {outcome.mean_loss} at step {self.log.steps} of replica {self._number}, "
                f"batch {self._batch} of the stream; {kept(self._run.run.directory / 'checkpoints')}; lower "
                f"optimizer.learning_rate ({self._run.optimizer.learning_rate:g}), or look for extreme values in "
                f"{self._run.data.train}"
            )
        self.log.count(outcome)

    def pushed(self, steps: int) -> None:
        """Count what is learned, report when it is time, and evaluate when replica 0 comes to the next epoch."""
        self._learned += steps
        if self._warm_steps and self._learned >= self._warm_steps:
            self._warm_steps = 0
            self._client.settle()
            self._say(MessageKind.WARM)
        if self.log.due:
            self._report()
        every = self._run.monitor.evaluate_epochs
        epoch = self._epoch
        if self._number == 0 and every and epoch >= self._next_evaluation:
            self._next_evaluation = (epoch // every + 1) * every
            if self._test is not None and self._batch + 1 < self._order.batches:
                self._evaluate_now()

    # The end

    def finish(self) -> int:
        """Say that all is pushed and applied, and stay until the lead ends training; return the batches learned."""
        self._report()
        self._say(MessageKind.FINISHED, self._learned)
        self._wait_for_lead(lambda: self._ended, "the end of training", longest_sleep=0.01)
        return self._learned

    def give_up(self) -> None:
        """Before this worker fails, let the lead write a checkpoint of what has been learned; return when it has."""
        with suppress(RunFailed):
            self._client.settle()
            self._mailbox.send(self._lead, Role.SHARD, MessageKind.FAILED, self._learned)
            self._wait_for_lead(lambda: self._ended, "the lead to write a last checkpoint", longest_sleep=0.01)

    def evaluate(self, source: Source, part: int, parts: int) -> Outcome:
        """Return the outcome of one of `parts` shares of a source at the shards' present parameters.

        All partitions of the replica take part, and get the same.
        """
        # Where they lie, if they are computed on there: no room for a second copy may be left.
        parameters = self._client.parameters
        if parameters is None:
            parameters = np.empty(self._objective.size, np.float32)
        self._client.peek(parameters)
        batch_size = self._run.optimizer.batch_size
        return evaluate(self._objective, parameters, source, batch_size, part, parts, self._at_work)

    def obey(self) -> bool:
        """Serve this rank's shard and take in the lead's orders; return whether there was anything."""
        moved = self._serve() if self._serve is not None else False
        if self._stop.number and not self._stop_told:
            self._stop_told = True
            self._mailbox.send(self._lead, Role.SHARD, MessageKind.STOP_ASKED, self._stop.number)
        while (message := self._mailbox.receive()) is not None:
            moved = True
            if message.kind == MessageKind.PAUSE:
                self._paused = self._asked_to_pause = True
            elif message.kind == MessageKind.GO:
                self._paused = False
            elif message.kind == MessageKind.RELEASE:
                self._released = True
            elif message.kind == MessageKind.STOP:
                self._stopping = True
            elif message.kind == MessageKind.END:
                self._ended = True
        return moved

    # Helpers

    @property
    def _epoch(self) -> float:
        return (self._batch + 1) / self._order.batches_per_epoch

    def _next_decision(self) -> Decision:
        """Return what the replica is to do next, when this worker may say so; the first partition decides."""
        self.obey()
        if self._team.speaks and not (self._released or self._paused or self._stopping):
            with self.stopwatch("wait"):
                self._wait_for_lead(
                    lambda: self._released or self._paused or self._stopping,
                    "the end of the warmstart",
                    longest_sleep=0.02,
                )
        if self._stopping:
            return Decision.STOP
        return Decision.REST if self._paused else Decision.GO_ON

    def _rest(self) -> None:
        """Come to rest, say so, and wait until the lead lets this replica go on."""
        self._client.settle()
        self._asked_to_pause = False
        self._say(MessageKind.PAUSED, self._learned)
        if self._team.speaks:
            # The next pause may come at one look with the end of this one, and wants an answer of its own.
            self._wait_for_lead(
                lambda: not self._paused or self._stopping or self._asked_to_pause, "the lead to write a checkpoint"
            )

    def _say(self, kind: MessageKind, *values: int) -> None:
        """Tell the lead something that holds for all partitions of the replica, when it does."""
        self._team.gather()
        if self._team.speaks:
            self._mailbox.send(self._lead, Role.SHARD, kind, *values)

    def _wait_for_lead(self, condition: Callable[[], bool], what: str, longest_sleep: float = 1e-3) -> None:
        seconds = _FOR_THE_LEAD * waiting.STALL_SECONDS
        waiting.until(condition, what, serve=self.obey, seconds=seconds, longest_sleep=longest_sleep)

    def _at_work(self) -> bool:
        """Obey, and let the others know now and then that this rank is at work though it pushes nothing."""
        if time.monotonic() - self._alive >= waiting.STALL_SECONDS / 4:
            self._alive = time.monotonic()
            self._mailbox.send(self._lead, Role.SHARD, MessageKind.ALIVE)
        return self.obey()

    def _evaluate_now(self) -> None:
        assert self._test is not None
        with self.stopwatch("wait"):
            outcome = self.evaluate(self._test, 0, 1)
        bits = int(np.array([outcome.loss]).view(np.int64)[0])
        self._say(MessageKind.EVALUATION, self._batch + 1, outcome.samples, outcome.correct, bits)

    def _report(self) -> None:
        self.log.report(self._epoch, self._client.moved, self._objective.seconds)


def evaluate(
    objective: Objective,
    parameters: np.ndarray,
    source: Source,
    batch_size: int,
    part: int = 0,
    parts: int = 1,
    serve: Callable[[], bool] | None = None,
) -> Outcome:
    """Return the outcome of every `parts`-th batch of a source, beginning with number `part`."""
    total = Outcome(0, 0.0, 0)
    for start in range(part * batch_size, source.samples, parts * batch_size):
        indices = np.arange(start, min(start + batch_size, source.samples))
        total = total.plus(objective.evaluate(parameters, source.batch(indices)))
        if serve is not None:
            serve()
    return total
