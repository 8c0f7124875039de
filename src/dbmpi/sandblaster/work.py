"""What a worker computes of a portion, and what it reports of that."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.data.ahead import Ahead
from dbmpi.monitor.measures import LayerTimes, set_exchange_apart
from dbmpi.monitor.records import Recorder, Stopwatch, WorkerReport
from dbmpi.objective import Batch as Samples
from dbmpi.objective import Objective, Outcome
from dbmpi.sandblaster.board import PassKind, PostedBatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dbmpi.data.source import Source
    from dbmpi.data.stream import Order
    from dbmpi.paramserver.client import Client

_ACTIVITIES = ("compute", "fetch", "push", "wait", "data")


class PortionWork:
    """Loss and gradient of portions on one worker (the `Work` of :class:`dbmpi.sandblaster.replica.Portions`).

    Parameters
    ----------
    objective
        Computes them, together with the other partitions of the replica.
    client
        Fetches the parameters.
    order
        Which samples make up each portion of the stream.
    stride
        How far apart a replica's portions in succession usually are, to read the next one in advance.
    train, test
        The samples, and the held-out ones.
    keep_bytes
        Room for portions that are kept as they are computed with, because they will come again.
    partitions
        The number of partitions of the replica.
    layer_seconds
        Time spent so far by phase, for each layer, if the objective measures it.
    """

    def __init__(
        self,
        objective: Objective,
        client: Client,
        order: Order,
        train: Source,
        test: Source | None,
        *,
        recorder: Recorder,
        report_seconds: float,
        replica: int,
        stride: int,
        partition: int,
        keep_bytes: int,
        partitions: int = 1,
        layer_seconds: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self._objective, self._client, self._order = objective, client, order
        self._train, self._test = Ahead(train, order, keep_bytes), test
        self._recorder, self._report_seconds = recorder, report_seconds
        self._replica, self._stride, self._partition = replica, stride, partition
        self._partitions, self._layer_seconds = partitions, layer_seconds or {}
        self._parameters = np.zeros(objective.size, np.float32)
        self._stopwatch, self._layer_times = Stopwatch(), LayerTimes()
        self._steps = self._samples = 0
        self._place = 0
        self._recent = Outcome(0, 0.0, 0)
        self._reported, self._fetched = time.monotonic(), 0

    def begin(self, batch: PostedBatch) -> None:
        """Fetch the parameters, once for all portions of a batch."""
        if time.monotonic() - self._reported >= self._report_seconds:
            self._report()
        self._place = batch.place
        with self._stopwatch("fetch"):
            self._client.fetch(self._parameters)

    def end(self) -> None:
        """Report what has not been reported."""
        self._train.close()
        self._report()

    def compute(self, batch: PostedBatch, portion: int, gradient: np.ndarray) -> Outcome:
        """Return the outcome of a portion; of training samples also write the gradient."""
        if batch.kind == PassKind.TEST:
            assert self._test is not None
            start = portion * self._order.batch_size
            indices = np.arange(start, min(start + self._order.batch_size, self._test.samples))
            return self._objective.evaluate(self._parameters, self._test.batch(indices))
        number = batch.first + portion
        with self._stopwatch("data"):
            samples: Samples = self._train.batch(number)
            if portion + self._stride < batch.portions:
                self._train.expect(number + self._stride)
        with self._stopwatch("compute"):
            outcome = self._objective.loss_and_gradient(self._parameters, samples, gradient, step=number)
        self._steps, self._samples = self._steps + 1, self._samples + outcome.samples
        self._recent = self._recent.plus(outcome)
        return outcome

    def _report(self) -> None:
        now, recent = time.monotonic(), self._recent
        if recent.samples:
            seconds, layers = self._stopwatch.take(_ACTIVITIES), self._layer_times.take(self._layer_seconds)
            if self._partitions > 1:
                set_exchange_apart(seconds, layers)
            self._recorder.write(
                WorkerReport(
                    step=self._steps,
                    epoch=self._place / self._order.batches_per_epoch,
                    samples=self._samples,
                    loss=recent.mean_loss,
                    accuracy=recent.accuracy,
                    samples_per_second=recent.samples / max(now - self._reported, 1e-9),
                    pushed_bytes=0,
                    fetched_bytes=self._client.fetched_bytes - self._fetched,
                    seconds=seconds,
                    layers=layers,
                    replica=self._replica,
                    partition=self._partition,
                )
            )
        self._reported, self._recent, self._fetched = now, Outcome(0, 0.0, 0), self._client.fetched_bytes
