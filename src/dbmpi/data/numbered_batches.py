"""The batches of a run by their numbers in the stream, as a user's transform leaves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dbmpi.data.in_place import InPlace
from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.errors import UserError
from dbmpi.objective import Batch, Samples

Transform = Callable[[Samples, np.random.Generator], Samples]
"""``transform(batch, random)`` returns other samples to learn from, as many as there are in the batch."""
_STREAM = 0x64617461
"""Sets the random numbers of transforms apart from others that are made of the same seed."""


class NumberedBatches:
    """Batches to learn from.

    Parameters
    ----------
    source, order
        The samples, and which of them make up each batch.
    transform
        The user's function, if there is one.  What it draws at random follows from the seed of the run and the number
        of the batch, whichever rank computes it, and whenever.

    Attributes
    ----------
    source
        The samples.
    order
        Which of them make up each batch.
    """

    def __init__(self, source: Source, order: Order, transform: Transform | None = None) -> None:
        self.source, self.order, self._transform = source, order, transform
        unpacked = source.storage.unpacked
        self._unpacked = None if unpacked is None or unpacked.length != order.block else unpacked
        self._in_place = source.storage.in_place if order.block else None
        self._expected = -1
        """The last window that the system was asked to read ahead."""

    def batch(self, number: int) -> Any:
        """Return the batch of that `number`: a `Batch`, or `Samples` for an objective of the user's own.

        Raises
        ------
        UserError
            If the transform returns something else than as many samples, which the network can take.
        """
        return self.transformed(number, self.stored(number))

    def stored(self, number: int) -> Any:
        """Return the batch of that `number` as it is stored, and unpack a part of what comes after it."""
        if self._unpacked is not None:
            self._unpacked.prepare(*self.order.window(number), self.order.blocks)
        elif self._in_place is not None:
            self._read_ahead(self._in_place, self.order.window(number)[0] + 1)
        return self.source.batch(self.order.indices(number))

    def _read_ahead(self, rows: InPlace, window: int) -> None:
        """Let the system read the blocks of a `window`, once."""
        if window > self._expected:
            self._expected, length = window, self.order.block
            for block in self.order.blocks(window).tolist():
                rows.expect(block * length, min((block + 1) * length, self.order.samples))

    def transformed(self, number: int, batch: Any) -> Any:
        """Return a stored `batch`, of that `number`, as the transform leaves it."""
        if self._transform is None:
            return batch
        random = np.random.default_rng([self.order.seed, number, _STREAM])
        before = batch if isinstance(batch, Samples) else _samples_first(batch)
        after = self._transform(before, random)
        if not isinstance(after, Samples):
            raise UserError(
                f"the transform returned {type(after).__name__} {after!r:.60}; expected dbmpi.objective.Samples, e.g. "
                "batch._replace(inputs=...)"
            )
        if after.samples != batch.samples:
            raise UserError(
                f"the transform made {after.samples} targets of a batch of {batch.samples}; expected as many"
            )
        return after if isinstance(batch, Samples) else self._innermost(after)

    def _innermost(self, samples: Samples) -> Batch:
        """Return samples for a network, after comparing them with those of the data."""
        source, count = self.source, samples.samples
        inputs = np.asarray(samples.inputs)
        given = [("inputs", inputs, (count, *source.input_shape))]
        if source.target_size is not None:
            given.append(("targets", samples.targets, (count, source.target_size)))
        else:
            given.append(("targets", samples.targets, (count,)))
        if samples.weights is not None:
            given.append(("weights", samples.weights, (count,)))
        for name, array, shape in given:
            kinds = "iu" if name == "targets" and source.classes else "iufb"
            if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind not in kinds:
                shown = (
                    f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                )
                raise UserError(
                    f"the transform returned {name} that are {shown}; a network expects {shape}"
                    + (" of whole numbers" if kinds == "iu" else "")
                )
        if source.classes and count and not 0 <= samples.targets.min() <= samples.targets.max() < source.classes:
            raise UserError(
                f"the transform returned targets from {samples.targets.min()} to {samples.targets.max()}; expected "
                f"classes, 0 ... {source.classes - 1}"
            )
        targets = np.int32 if source.target_size is None else np.float32
        return Batch(
            np.ascontiguousarray(np.moveaxis(inputs, 0, -1), np.float32),
            np.ascontiguousarray(samples.targets.T, targets),
            None if samples.weights is None else np.ascontiguousarray(samples.weights, np.float32),
        )


def _samples_first(batch: Batch) -> Samples:
    inputs = np.ascontiguousarray(np.moveaxis(batch.inputs, -1, 0))
    return Samples(inputs, np.ascontiguousarray(batch.targets.T), batch.weights)
