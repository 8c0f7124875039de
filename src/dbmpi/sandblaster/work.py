"""What a worker computes of a portion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.data.ahead import Ahead
from dbmpi.kernels.memory import aligned_empty
from dbmpi.objective import Objective, Outcome
from dbmpi.sandblaster.board import PassKind, PostedBatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dbmpi.data.numbered_batches import NumberedBatches
    from dbmpi.data.source import Source
    from dbmpi.monitor.worker_log import WorkerLog
    from dbmpi.paramserver.client import Client


class PortionWork:
    """Loss and gradient of portions on one worker, at the parameters that the shards hold.

    Parameters
    ----------
    objective
        Computes them, together with the other partitions of the replica.
    client
        Fetches the parameters.
    train, test
        The portions of the stream, and the held-out samples.
    log
        Of the worker.
    stride
        How far apart a replica's portions in succession usually are, to read the next one in advance.
    keep_bytes
        For portions that are kept as they are computed with, because they will come again.
    layer_seconds
        Time spent so far by phase, for each layer, if the objective measures it.
    """

    def __init__(
        self,
        objective: Objective[Any],
        client: Client,
        train: NumberedBatches,
        test: Source | None,
        *,
        log: WorkerLog,
        stride: int,
        keep_bytes: int,
        layer_seconds: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self._objective, self._client, self._order = objective, client, train.order
        self._train, self._test = Ahead(train, keep_bytes), test
        self._log, self._stride, self._layer_seconds = log, stride, layer_seconds or {}
        self._parameters = aligned_empty(objective.size)
        self._reached = 0
        self._fetched = True
        """Whether the parameters have been fetched since they were last used."""

    def begin(self, batch: PostedBatch) -> None:
        """Fetch the parameters, once for all portions of a batch."""
        if self._log.due:
            self._report()
        self._reached = batch.reached
        with self._log.stopwatch("fetch"):
            self._client.fetch(self._parameters, for_gradient=False)
        self._fetched = True

    def end(self) -> None:
        """Report what has not been reported."""
        self._train.close()
        self._report()
        self._log.end_trace()

    def compute(self, batch: PostedBatch, portion: int, gradient: np.ndarray) -> Outcome:
        """Return the outcome of a portion; of training samples also write the gradient.

        Parameters
        ----------
        batch, portion
            Which one.
        gradient
            float32, of this worker's parameters; not written for held-out samples.
        """
        changed, self._fetched = self._fetched, False
        if batch.kind == PassKind.TEST:
            assert self._test is not None
            start = portion * self._order.batch_size
            indices = np.arange(start, min(start + self._order.batch_size, self._test.samples))
            return self._objective.evaluate(self._parameters, self._test.batch(indices), changed=changed)
        number = batch.first + portion
        with self._log.stopwatch("data"):
            samples = self._train.batch(number)
            if portion + self._stride < batch.portions:
                self._train.expect(number + self._stride)
        with self._log.stopwatch("compute"):
            outcome = self._objective.loss_and_gradient(
                self._parameters, samples, gradient, step=number, changed=changed
            )
        self._log.count(outcome)
        return outcome

    def _report(self) -> None:
        epoch = self._reached / self._order.batches_per_epoch
        self._log.report(epoch, self._client.moved, self._layer_seconds)
