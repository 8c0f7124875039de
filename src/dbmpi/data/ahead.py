"""Batches that are there when they are needed: kept, or read while the ones before them are computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dbmpi.data.numbered_batches import NumberedBatches


class Ahead:
    """Reads one batch in advance, on a thread of its own, where batches come from a file.

    What lies in memory is only gathered: that takes the core from the computation itself, and is done when needed.
    Batches that come again and again may be kept as they are handed out, and must not be changed.  A user's transform
    is called by the thread that asks for a batch, never by the one that reads ahead.

    Parameters
    ----------
    batches
        What is read.
    keep_bytes
        Size of the batches that are kept, at most: those that were asked for first.
    """

    def __init__(self, batches: NumberedBatches, keep_bytes: int = 0) -> None:
        self._batches = batches
        self._kept: dict[int, Any] = {}
        self._keep_bytes = keep_bytes
        self._reader = ThreadPoolExecutor(1, "ahead") if batches.source.storage.in_advance else None
        self._expected: tuple[int, Future[Any]] | None = None

    def batch(self, number: int) -> Any:
        """Return the batch of this `number`: one that was kept, or from the thread if it was expected."""
        if number in self._kept:
            return self._kept[number]
        expected, self._expected = self._expected, None
        if expected is not None:
            if expected[0] == number:
                return self._batches.transformed(number, expected[1].result())
            expected[1].cancel()
        batch = self._batches.batch(number)
        if self._keep_bytes:
            nbytes = sum(array.nbytes for array in batch if array is not None)
            if nbytes <= self._keep_bytes:
                self._kept[number] = batch
                self._keep_bytes -= nbytes
        return batch

    def expect(self, number: int) -> None:
        """Begin to read the batch of this `number`; a wrong guess costs time of the thread alone."""
        if self._reader is not None and 0 <= number < self._batches.order.batches:
            self._expected = number, self._reader.submit(self._batches.stored, number)

    def close(self) -> None:
        """End the thread; may be called again."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
