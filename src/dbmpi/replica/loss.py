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
    """Turns the cut of the last layer's outputs, from units to samples and back, over the workers of a replica."""

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

        `values`, this worker's outputs (units, samples), become its part of the gradient of the mean loss.
        """
        samples = values.shape[1]
        shares = cut(samples, self._group.size)
        mine = shares[self._group.rank]
        near = self._group.near
        whole = self._turned_on_shelves(values, mine) if near else self._turned_by_messages(values, shares)
        sums = np.zeros(3)
        if len(mine):
            part = np.ascontiguousarray(targets[..., mine.start : mine.stop])
            of_part = None if weights is None else np.ascontiguousarray(weights[mine.start : mine.stop])
            value, correct = loss.apply(whole, part, of_part)
            sums[:] = (value, max(correct, 0), correct < 0)
            # The kernel divides by the samples it sees.
            whole *= whole.dtype.type(len(mine) / samples)
        if near:
            self._turn_back_on_shelves(whole, values, shares)
        else:
            self._turn_back_by_messages(whole, values, shares)
        total = self._group.sum(self._sums, sums, range(self._group.size), "the loss of the other partitions")
        return float(total[0]), -1 if total[2] else int(total[1])

    def _turned_on_shelves(self, values: np.ndarray, mine: range) -> np.ndarray:
        """Return all units (units, share) of this worker's share of the samples."""
        group, samples = self._group, values.shape[1]
        group.room(self._values, values.size, values.dtype)[:] = values.reshape(-1)
        group.offer(self._values)
        # The gradient takes its place, and is then on the shelf where all look for it.
        whole = group.room(self._gradients, self._units * len(mine), values.dtype).reshape(self._units, len(mine))
        for worker, units in enumerate(self._owned):
            theirs = group.look(self._values, worker, len(units) * samples, values.dtype)
            whole[units.start : units.stop] = theirs.reshape(len(units), samples)[:, mine.start : mine.stop]
        group.taken(self._values)
        return whole

    def _turn_back_on_shelves(self, whole: np.ndarray, values: np.ndarray, shares: Sequence[range]) -> None:
        """Take the rows of this worker's units from everybody's share."""
        group, units = self._group, self._owned[self._group.rank]
        group.offer(self._gradients)
        for worker, share in enumerate(shares):
            theirs = group.look(self._gradients, worker, self._units * len(share), whole.dtype)
            values[:, share.start : share.stop] = theirs.reshape(self._units, len(share))[units.start : units.stop]
        group.taken(self._gradients)

    def _turned_by_messages(self, values: np.ndarray, shares: Sequence[range]) -> np.ndarray:
        out = np.concatenate([values[:, share.start : share.stop].reshape(-1) for share in shares])
        mine, samples = len(shares[self._group.rank]), values.shape[1]
        whole = np.empty((self._units, mine), values.dtype)
        sends = _times(shares, values.shape[0])
        receives = _times(self._owned, mine)
        self._all_to_all(out, sends, whole, receives, samples, "the outputs of the other partitions")
        return whole

    def _turn_back_by_messages(self, whole: np.ndarray, values: np.ndarray, shares: Sequence[range]) -> None:
        back = np.empty(values.size, values.dtype)
        sends, receives = _times(self._owned, len(shares[self._group.rank])), _times(shares, values.shape[0])
        self._all_to_all(whole, sends, back, receives, values.shape[1], "the gradient of the other partitions")
        for share, its in zip(shares, receives, strict=True):
            values[:, share.start : share.stop] = back[its.start : its.stop].reshape(values.shape[0], len(share))

    def _all_to_all(
        self,
        source: np.ndarray,
        sends: Sequence[range],
        target: np.ndarray,
        receives: Sequence[range],
        samples: int,
        what: str,
    ) -> None:
        comm, everything = self._group.comm, self._units * samples
        assert comm is not None
        self._group.complete(pieces.ialltoallv(comm, source, sends, target, receives, everything, Tag.LOSS), what)


def _times(ranges: Sequence[range], factor: int) -> list[range]:
    """Return the ranges of values where each number of the given ones stands for so many."""
    return [range(its.start * factor, its.stop * factor) for its in ranges]
