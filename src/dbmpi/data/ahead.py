"""Batches that are read while the ones before them are computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.objective import Batch


class Ahead:
    """Reads one batch in advance, on a thread of its own, where batches come from a file.

    What lies in memory is only gathered: that takes the core from the computation itself, and is done when needed.

    Parameters
    ----------
    source, order
        The samples, and which of them make up each batch.
    """

    def __init__(self, source: Source, order: Order) -> None:
        self._source, self._order = source, order
        self._reader = None if source.resident else ThreadPoolExecutor(1, "ahead")
        self._expected: tuple[int, Future[Batch]] | None = None

    def batch(self, number: int) -> Batch:
        """Return a batch, from the thread if it was expected."""
        expected, self._expected = self._expected, None
        if expected is not None:
            if expected[0] == number:
                return expected[1].result()
            expected[1].cancel()
        return self._source.batch(self._order.indices(number))

    def expect(self, number: int) -> None:
        """Begin to read a batch; a wrong guess costs time of the thread alone."""
        if self._reader is not None and 0 <= number < self._order.batches:
            self._expected = number, self._reader.submit(self._source.batch, self._order.indices(number))

    def close(self) -> None:
        """End the thread; may be called again."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
