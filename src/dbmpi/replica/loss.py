"""The loss over outputs that are cut by units: every worker takes all outputs of its share of the samples.

Turning the cut from units to samples moves each output once and leaves no work to be done twice; a sample's loss is
computed just as in one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.index.layout import cut
from dbmpi.mpi import pieces
from dbmpi.mpi.tags import Tag
from dbmpi.network.losses import Loss
from dbmpi.replica.group import Group


class LossExchange:
    """Turns the cut of the last layer's outputs, from units to samples and back, over the workers of a replica.

    Parameters
    ----------
    group
        The workers.
    owned
        The units of the last layer that each of them owns.
    """

    def __init__(self, group: Group, owned: Sequence[Box]) -> None:
        self._group = group
        self._owned = [range(box.starts[0], box.stops[0]) for box in owned]
        self._units = sum(map(len, self._owned))
        if group.near:
            self._values = group.shelf(each=max(map(len, self._owned)))
            self._gradients = group.shelf(fixed=self._units, each=-(-self._units // group.size))
        self._sums = group.shelf(fixed=6)  # three of float64, in elements that may be float32

    def apply(
        self, loss: Loss, values: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None
    ) -> tuple[float, int]:
        """Return loss and correct samples of all samples, the same on every worker.

        Parameters
        ----------
        loss
            Computed over all units of some samples.
        values
            This worker's outputs (units, samples); they become its part of the gradient of the mean loss.
        targets, weights
            Of all samples, as for ``loss.apply``.
        """
        group, samples = self._group, values.shape[1]
        shares = cut(samples, group.size)
        mine = shares[group.rank]
        whole = self._turn_on_shelves(values, mine) if group.near else self._turn_by_messages(values, shares)
        sums = np.zeros(3)
        if len(mine):
            part = np.ascontiguousarray(targets[..., mine.start : mine.stop])
            of_part = None if weights is None else np.ascontiguousarray(weights[mine.start : mine.stop])
            value, correct = loss.apply(whole, part, of_part)
            sums[:] = (value, max(correct, 0), correct < 0)
            # The kernel divides by the samples it sees.
            whole *= whole.dtype.type(len(mine) / samples)
        turn_back = self._turn_back_on_shelves if group.near else self._turn_back_by_messages
        turn_back(whole, values, shares)
        total = group.sum(self._sums, sums, range(group.size), "the loss of the other partitions")
        return float(total[0]), -1 if total[2] else int(total[1])

    def _turn_on_shelves(self, values: np.ndarray, mine: range) -> np.ndarray:
        """Return all units (units, share) of this worker's share of the samples."""
        dtype, samples = values.dtype, values.shape[1]
        self._values.fill(values.shape, dtype)[...] = values
        self._values.offer()
        # The loss turns it into the gradient, which is then on the shelf where the others read it.
        whole = self._gradients.fill((self._units, len(mine)), dtype)
        for worker, units in enumerate(self._owned):
            theirs = self._values.take(worker, (len(units), samples), dtype)
            whole[units.start : units.stop] = theirs[:, mine.start : mine.stop]
        self._values.release()
        return whole

    def _turn_back_on_shelves(self, whole: np.ndarray, values: np.ndarray, shares: Sequence[range]) -> None:
        """Take the rows of this worker's units from every worker's share."""
        units = self._owned[self._group.rank]
        self._gradients.offer()
        for worker, share in enumerate(shares):
            theirs = self._gradients.take(worker, (self._units, len(share)), whole.dtype)
            values[:, share.start : share.stop] = theirs[units.start : units.stop]
        self._gradients.release()

    def _turn_by_messages(self, values: np.ndarray, shares: Sequence[range]) -> np.ndarray:
        out = np.concatenate([values[:, share.start : share.stop].reshape(-1) for share in shares])
        (units, samples), mine = values.shape, len(shares[self._group.rank])
        whole = np.empty((self._units, mine), values.dtype)
        sends, receives = _times(shares, units), _times(self._owned, mine)
        self._all_to_all((out, sends), (whole, receives), samples, "the outputs of the other partitions")
        return whole

    def _turn_back_by_messages(self, whole: np.ndarray, values: np.ndarray, shares: Sequence[range]) -> None:
        (units, samples), mine = values.shape, len(shares[self._group.rank])
        back = np.empty(values.size, values.dtype)
        sends, receives = _times(self._owned, mine), _times(shares, units)
        self._all_to_all((whole, sends), (back, receives), samples, "the gradient of the other partitions")
        for share, part in zip(shares, receives, strict=True):
            values[:, share.start : share.stop] = back[part.start : part.stop].reshape(units, len(share))

    def _all_to_all(self, source: pieces.Parts, target: pieces.Parts, samples: int, what: str) -> None:
        everything = self._units * samples
        self._group.complete(pieces.ialltoallv(self._group.comm, source, target, everything, Tag.LOSS), what)


def _times(ranges: Sequence[range], factor: int) -> list[range]:
    """Return the ranges of values where each number of the given ones stands for so many."""
    return [range(numbers.start * factor, numbers.stop * factor) for numbers in ranges]
