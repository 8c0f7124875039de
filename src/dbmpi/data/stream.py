"""The stream of batches: their order, and which are left after an interruption.

All batches of all epochs are numbered.  The samples of a batch follow from (seed, epoch) alone, and what has been
learned is a frontier and a list of holes, so that a run resumes under any number of replicas and sees every
batch exactly once.  Pure numbers: nothing here knows MPI or reads samples.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

EPOCHS_KEPT = 2
"""Permutations kept: around the end of an epoch, replicas still work on the one before."""


class Order:
    """Which samples make up each batch of a run.

    An epoch is a permutation of all samples, cut into batches of `batch_size`; its last batch may be smaller.  Of a
    fractional last epoch, the first batches are taken, rounded up.

    Where samples are read in blocks, an epoch is a permutation of the blocks; so many in a row make a window, and the
    samples of a window are permuted.  So a reader needs the blocks of one window, and then those of the next.

    Parameters
    ----------
    samples
        Number of samples of the data.
    batch_size
        Samples of a batch.
    epochs
        Passes over the data; taken as the decimal number it is written as, so that 1.1 epochs of ten batches are
        eleven batches.
    seed
        Seed of the run, 0 ... 2**63 - 1.
    block
        Samples of a block; 0: any sample may follow any other.
    window
        Blocks of a window.

    Raises
    ------
    ValueError
        If a number is not positive and finite.
    """

    def __init__(
        self, samples: int, batch_size: int, epochs: float, seed: int, block: int = 0, window: int = 1
    ) -> None:
        if samples < 1 or batch_size < 1 or not (math.isfinite(epochs) and epochs > 0):
            raise ValueError(
                f"{samples} samples in batches of {batch_size} for {epochs} epochs make no stream; "
                f"expected positive, finite numbers"
            )
        if not 0 <= seed < 2**63:
            raise ValueError(f"the seed {seed} is not in 0 ... 2**63 - 1")
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.block, self._window = block, window
        self._blocks = -(-samples // block) if block else 0
        self._permuted_blocks: OrderedDict[int, np.ndarray] = OrderedDict()
        self.batches_per_epoch = -(-samples // batch_size)
        self.batches = math.ceil(Fraction(repr(float(epochs))) * self.batches_per_epoch)
        self._permutations: OrderedDict[int, np.ndarray] = OrderedDict()

    def indices(self, batch_number: int) -> np.ndarray:
        """Return the samples of the batch `batch_number`, int64 ``(samples of the batch,)``; all different."""
        if not 0 <= batch_number < self.batches:
            raise IndexError(f"batch {batch_number} is not one of the {self.batches} batches of the run")
        epoch, index = divmod(batch_number, self.batches_per_epoch)
        start = index * self.batch_size
        return self._permutation(epoch)[start : start + self.batch_size].astype(np.int64)

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows of an epoch; 0 where samples are not read in blocks."""
        return -(-self._blocks // self._window) if self.block else 0

    def window(self, batch_number: int) -> tuple[int, float]:
        """Return the window that the batch `batch_number` begins in, over all epochs, and how far into it, 0 to 1."""
        epoch, index = divmod(batch_number, self.batches_per_epoch)
        passed = index * self.batch_size / (self._window * self.block)
        # The last block of the data, which may be smaller, lies anywhere: so this is right but for a block.
        inside = min(int(passed), self.windows_per_epoch - 1)
        return epoch * self.windows_per_epoch + inside, min(passed - inside, 1.0)

    def blocks(self, window: int) -> np.ndarray:
        """Return the blocks of a `window`, counted over all epochs, int64; none behind the last epoch."""
        epoch, inside = divmod(window, self.windows_per_epoch)
        if epoch * self.batches_per_epoch >= self.batches:
            return np.empty(0, np.int64)
        return self._block_order(epoch)[inside * self._window : (inside + 1) * self._window]

    def size(self, batch_number: int) -> int:
        """Return the number of samples of the batch `batch_number`."""
        index = batch_number % self.batches_per_epoch
        return min(self.batch_size, self.samples - index * self.batch_size)

    def before(self, batch_number: int) -> int:
        """Return the number of samples of all batches before `batch_number`."""
        epoch, index = divmod(batch_number, self.batches_per_epoch)
        return epoch * self.samples + index * self.batch_size

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # Sorting raw bits, rather than Generator.permutation: NumPy promises that the bits of a bit generator stay
            # the same in all versions, and an order that changed in a resumed run would repeat some samples.
            bits = _bits(self.seed, epoch, self.samples)
            if self.block:
                place = np.empty(self._blocks, np.int64)
                place[self._block_order(epoch)] = np.arange(self._blocks) // self._window
                order = np.lexsort((bits, np.repeat(place, min(self.block, self.samples))[: self.samples]))
            else:
                order = np.argsort(bits, kind="stable")
            self._permutations[epoch] = order.astype(np.int32) if self.samples <= 2**31 else order
        self._permutations.move_to_end(epoch)
        while len(self._permutations) > EPOCHS_KEPT:
            self._permutations.popitem(last=False)
        return self._permutations[epoch]

    def _block_order(self, epoch: int) -> np.ndarray:
        if epoch not in self._permuted_blocks:
            self._permuted_blocks[epoch] = np.argsort(_bits(self.seed, epoch, self._blocks), kind="stable")
        self._permuted_blocks.move_to_end(epoch)
        while len(self._permuted_blocks) > EPOCHS_KEPT:
            self._permuted_blocks.popitem(last=False)
        return self._permuted_blocks[epoch]


def _bits(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return random bits, uint64 ``(count,)``, that follow from a seed and an epoch."""
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)


@dataclass(frozen=True)
class Stream:
    """The batches that are still to be learned: `holes`, then `frontier` ... `total` - 1.

    Raises
    ------
    ValueError
        If the holes do not increase or do not lie below the frontier, or the frontier lies beyond the total.
    """

    total: int
    """Batches of the whole run."""
    frontier: int = 0
    """No batch from here on has been learned."""
    holes: tuple[int, ...] = ()
    """Batches below the frontier that have not been learned, increasing."""

    def __post_init__(self) -> None:
        edges = (-1, *self.holes, self.frontier)
        if self.frontier > self.total or any(left >= right for left, right in pairwise(edges)):
            raise ValueError(
                f"holes {self.holes[:8]} below the frontier {self.frontier} of {self.total} batches do not "
                f"increase from 0 up to the frontier"
            )

    def __len__(self) -> int:
        return len(self.holes) + self.total - self.frontier

    def item(self, position: int) -> int:
        """Return the number of the batch at a position, 0 ... len - 1, among those that are left."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is not one of the {len(self)} that are left")
        if position < len(self.holes):
            return self.holes[position]
        return self.frontier + position - len(self.holes)

    def leaving(self, positions: Sequence[range], end: int) -> Stream:
        """Return the stream in which only some of these batches are left.

        Parameters
        ----------
        positions
            Disjoint ranges of those that are left, with everything from `end` on in them.
        end
            One beyond the last position that has been learned.
        """
        # Holes at or beyond `end` were not reached: they stay holes, and the frontier stays where it is.
        end = max(end, len(self.holes))
        skipped = sorted(position for part in positions for position in part[: bisect_left(part, end)])
        holes = tuple(self.item(position) for position in skipped)
        return Stream(self.total, self.frontier + end - len(self.holes), holes)

    def recut(self, before: Order, now: Order) -> Stream:
        """Return the rest in batches of another size: all that hold a sample that has not been learned.

        Samples of a batch that was learned in part are seen again: at most one batch for each hole and the frontier.
        The orders `before` and `now` have the same samples and seed.
        """

        def start(batch: int) -> int:
            epoch, index = divmod(batch, before.batches_per_epoch)
            return epoch * before.samples + index * before.batch_size

        def holds(position: int) -> int:
            epoch, offset = divmod(position, now.samples)
            return epoch * now.batches_per_epoch + offset // now.batch_size

        frontier = min(holds(start(self.frontier)), now.batches)
        holes = {
            batch
            for hole in self.holes
            for batch in range(holds(start(hole)), holds(start(hole) + before.size(hole) - 1) + 1)
        }
        return Stream(now.batches, frontier, tuple(sorted(batch for batch in holes if batch < frontier)))
