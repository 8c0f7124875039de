"""The board of a batch: which portions there are, which replica has won which, and which results count.

The board is a few words in the lead's window.  Replicas draw portions from it by atomics of their own: nothing on the
lead's rank has to run for that.  A portion goes through three steps:

1. It is *drawn*.  A replica has a stretch of the batch, the same one in every pass, and draws it in sequence; then it
   takes portions from the end of the largest remaining share.  When all are drawn, those without a result are drawn
   again, as backup copies.  Drawing is a hint, and nothing more: what counts is the next step.
2. The first replica that has its gradient *wins* it, by a compare-and-swap of the portion's word, and only then adds
   the gradient to its bundle, the sum over the portions that it has won lately.
3. Every few portions the bundle is *committed*, by a compare-and-swap of the replica's word, which holds the number of
   its open bundle.  The lead may *revoke* an open bundle by the same operation: then the late commit fails, the bundle
   is thrown away, and its portions are handed out again.  One of both comes first: each portion counts exactly once.
   The bundles of a replica that has died are closed in the same way for ever.

Everything here is integers; what the bundles hold lies in the windows of the replicas (`Bundles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dbmpi.kernels.memory import CACHE_LINE
from dbmpi.paramserver.memory import lines

if TYPE_CHECKING:
    from dbmpi.mpi.window import Window

_WORD = 8
_BATCH_SHIFT, _OWNER_SHIFT = 32, 20
_LOW = (1 << _OWNER_SHIFT) - 1
_CLAIM = (1 << _BATCH_SHIFT) - 1
_TAG_SHIFT, _FRONT_SHIFT = 48, 24
_TAG, _TAKEN = (1 << 15) - 1, (1 << _FRONT_SHIFT) - 1
"""What says of a stretch: the last bits of the batch's number, portions drawn from its front, and from its end."""

MOST_PORTIONS = _TAKEN
MOST_REPLICAS = (1 << (_BATCH_SHIFT - _OWNER_SHIFT)) - 2


class PassKind(IntEnum):
    """What is to be done with the portions of a batch."""

    GRADIENT = 0
    TEST = 1
    """The loss on held-out samples, without a gradient."""


class PostedBatch(NamedTuple):
    """A batch, as the board describes it to the replicas."""

    number: int
    """Counts from 1."""
    kind: PassKind
    portions: int
    first: int
    """Number of the first portion's samples in the stream."""
    samples: int
    """Of the whole batch."""
    reached: int = 0
    """Position in the stream at its end, for reports."""


END = -1
"""Number of the batch after the last one."""
RETIRED = -1
"""Instead of the number of an open bundle: the replica has been given up, and can commit nothing any more."""


@dataclass(frozen=True)
class Board:
    """Reads and writes the words of the board.

    Parameters
    ----------
    words
        This rank's window.
    rank
        The lead's.
    offset
        Where the board begins in its window.
    replicas, capacity
        Numbers of replicas, and of portions of the largest batch.
    ordered
        Whether all replicas draw from one stretch, so that portions are done about in their order.
    """

    words: Window
    rank: int
    offset: int
    replicas: int
    capacity: int
    ordered: bool = False

    @staticmethod
    def nbytes(replicas: int, capacity: int) -> int:
        """Return the bytes of a board for so many `replicas` and, as its `capacity`, portions."""
        return CACHE_LINE + (2 * replicas + capacity) * _WORD

    # What the lead does

    def open(self, batch: PostedBatch) -> None:
        """Offer a batch; all portions of the one before have been won."""
        for portion in range(batch.portions):
            self.words.store(self.rank, self._portion(portion), batch.number << _BATCH_SHIFT)
        for position, word in enumerate(batch[1:], 1):
            self.words.store(self.rank, self.offset + position * _WORD, int(word))
        for stretch in range(self._stretches):
            self.words.store(self.rank, self._drawn(stretch), (batch.number & _TAG) << _TAG_SHIFT)
        self.words.store(self.rank, self.offset, batch.number)

    def end(self) -> None:
        """Offer no further batch."""
        self.words.store(self.rank, self.offset, END)

    def claims(self, batch: PostedBatch, seen: Sequence[int]) -> list[tuple[int, int]]:
        """Return the winner of each portion: replica and bundle, or -1 and 0.

        A claim on a portion of `batch` holds the last bits of the bundle's number; the other bits are those of the
        latest bundles of the replicas, `seen`.
        """
        found = self._words_at(self._portion(0), batch.portions)
        owners = ((found & _CLAIM) >> _OWNER_SHIFT) - 1
        claims = zip(owners.tolist(), (found & _LOW).tolist(), strict=True)
        half = (_LOW + 1) // 2
        return [
            (owner, seen[owner] + ((low - seen[owner] + half) & _LOW) - half) if owner >= 0 else (-1, 0)
            for owner, low in claims
        ]

    def open_bundles(self) -> list[int]:
        """Return for every replica the number of the bundle that it may commit, all read at once."""
        found: list[int] = self._words_at(self._bundle(0), self.replicas).tolist()
        return found

    def reopen(self, batch: PostedBatch, portion: int, replica: int, bundle: int) -> bool:
        """Hand out a portion again; return whether it was still won in the bundle that does not count.

        Parameters
        ----------
        batch, portion
            Which one.
        replica, bundle
            Its winner, and the bundle.
        """
        claimed, unclaimed = _claim(batch.number, replica, bundle), batch.number << _BATCH_SHIFT
        return self.words.compare_and_swap(self.rank, self._portion(portion), claimed, unclaimed) == claimed

    def retire(self, replica: int) -> int:
        """Let a replica commit nothing any more; return the number of the bundle that was open."""
        while True:
            opened = self.open_bundle(replica)
            if opened == RETIRED or self.words.compare_and_swap(self.rank, self._bundle(replica), opened, RETIRED) == (
                opened
            ):
                return opened

    # What a replica does

    def read(self) -> PostedBatch | None:
        """Return the batch that is offered; None before the first one.  At the end its number is `END`."""
        number = self.words.load(self.rank, self.offset)
        if number <= 0:
            return PostedBatch(END, PassKind.GRADIENT, 0, 0, 0) if number == END else None
        words = np.empty(len(PostedBatch._fields), np.int64)
        self.words.get(self.rank, self.offset, words)
        _, kind, *others = words.tolist()
        if self.words.load(self.rank, self.offset) != number:
            return None  # the next one is being put up
        return PostedBatch(number, PassKind(kind), *others)

    def number(self) -> int:
        """Return the number of the batch that is offered."""
        return self.words.load(self.rank, self.offset)

    def draw(self, batch: PostedBatch, replica: int) -> int | None:
        """Return a portion that no replica has drawn; None if all are drawn, or the batch is over.

        Parameters
        ----------
        batch
            The one that is drawn from.
        replica
            Which one draws.
        """
        count, tag = self._stretches, batch.number & _TAG
        bounds = np.arange(count + 1) * batch.portions // count
        own = replica % count
        while True:
            word = self.words.load(self.rank, self._drawn(own))
            front, back = word >> _FRONT_SHIFT & _TAKEN, word & _TAKEN
            if word >> _TAG_SHIFT != tag:
                return None
            if front + back == bounds[own + 1] - bounds[own]:
                break
            if self.words.compare_and_swap(self.rank, self._drawn(own), word, word + (1 << _FRONT_SHIFT)) == word:
                return int(bounds[own]) + front
        while True:
            words = self._words_at(self._drawn(0), count)
            left = np.diff(bounds) - (words >> _FRONT_SHIFT & _TAKEN) - (words & _TAKEN)
            left[words >> _TAG_SHIFT != tag] = 0
            most = int(np.argmax(left))
            if left[most] == 0:
                return None
            word = int(words[most])
            if self.words.compare_and_swap(self.rank, self._drawn(most), word, word + 1) == word:
                return int(bounds[most + 1]) - 1 - (word & _TAKEN)

    def outstanding(self, batch: PostedBatch) -> list[int]:
        """Return the portions of a batch that no replica has won."""
        found = self._words_at(self._portion(0), batch.portions)
        return np.flatnonzero(found == batch.number << _BATCH_SHIFT).tolist()

    def win(self, batch: PostedBatch, portion: int, replica: int, bundle: int) -> bool:
        """Claim a portion for the open bundle of a replica; only the first of several succeeds.

        Parameters
        ----------
        batch, portion
            Which one.
        replica, bundle
            The claimant, and its open bundle.
        """
        unclaimed = batch.number << _BATCH_SHIFT
        claimed = _claim(batch.number, replica, bundle)
        return self.words.compare_and_swap(self.rank, self._portion(portion), unclaimed, claimed) == unclaimed

    # What both do

    def open_bundle(self, replica: int) -> int:
        """Return the number of the bundle that a replica may commit."""
        return self.words.load(self.rank, self._bundle(replica))

    def close_bundle(self, replica: int, bundle: int) -> bool:
        """Commit a bundle, as its replica, or revoke it, as the lead; only the first of both succeeds."""
        return self.words.compare_and_swap(self.rank, self._bundle(replica), bundle, bundle + 1) == bundle

    @property
    def _stretches(self) -> int:
        return 1 if self.ordered else self.replicas

    def _drawn(self, stretch: int) -> int:
        return self.offset + CACHE_LINE + stretch * _WORD

    def _bundle(self, replica: int) -> int:
        return self.offset + CACHE_LINE + (self.replicas + replica) * _WORD

    def _portion(self, portion: int) -> int:
        return self.offset + CACHE_LINE + (2 * self.replicas + portion) * _WORD

    def _words_at(self, offset: int, count: int) -> np.ndarray:
        found = np.empty(count, np.int64)
        self.words.sync()
        self.words.get(self.rank, offset, found)
        return found


def _claim(number: int, replica: int, bundle: int) -> int:
    return number << _BATCH_SHIFT | (replica + 1) << _OWNER_SHIFT | (bundle & _LOW)


class PortionResult(NamedTuple):
    """What a replica writes down of a portion that it has won."""

    portion: int
    samples: int
    correct: int
    loss: float
    """Sum over the samples."""
    sums: tuple[float, ...] = ()
    """Of metrics, over held-out samples."""


_HEAD, _WHOLE, _ROW = 4, 3, 4
"""Words of the head of a list; of each result in it, those that are integers, and all but the sums of metrics."""
SLOTS = 2
"""Bundles of a worker: one is filled while the shards take in the other."""


@dataclass(frozen=True)
class Bundles:
    """Where the bundles of a worker lie in its window.

    A bundle is a list of results, which partition 0 keeps, and the sum of the gradients of these portions, each
    multiplied by its share of the batch's samples.  Behind the bundles lie words in which every shard, and the lead for
    the list, say which bundles they have taken: one more than the last one in that slot.
    """

    rank: int
    """Of the worker."""
    offset: int
    """Where they begin."""
    elements: int
    """Of this worker's parameters."""
    results: int
    """Most portions of a bundle."""
    shards: int
    metrics: int = 0
    """Sums of metrics that a result may have."""
    itemsize: int = 4

    def list_of(self, bundle: int) -> int:
        """Where the list of a bundle lies: batch, length, microseconds, metrics, and some words for each result."""
        return self.offset + bundle % SLOTS * self._slot_bytes

    def gradient_of(self, bundle: int) -> int:
        """Where the gradient of a bundle lies."""
        return self.list_of(bundle) + lines(self.list_words * _WORD)

    def taken(self, taker: int, bundle: int) -> int:
        """Return where a `taker`, a shard or last the lead, writes up to which bundle the slot of `bundle` is free."""
        return self.offset + SLOTS * self._slot_bytes + (taker * SLOTS + bundle % SLOTS) * _WORD

    @property
    def list_words(self) -> int:
        """Words of a list."""
        return _HEAD + (_ROW + self.metrics) * self.results

    @property
    def end(self) -> int:
        """Where the window may end."""
        return self.offset + lines(self.taken(self.shards + 1, 0) - self.offset)

    @property
    def _slot_bytes(self) -> int:
        return lines(self.list_words * _WORD) + lines(self.elements * self.itemsize)


def pack(words: np.ndarray, batch: int, seconds: float, results: list[PortionResult]) -> None:
    """Write the list of a bundle.

    Parameters
    ----------
    words
        int64, `Bundles.list_words` of them.
    batch
        Number of the batch.
    seconds
        Mean time that a portion takes this replica.
    results
        Of the portions in the bundle.
    """
    metrics = len(results[0].sums) if results else 0
    words[:_HEAD] = batch, len(results), round(1e6 * seconds), metrics
    rows = words[_HEAD:][: len(results) * (_ROW + metrics)].reshape(len(results), _ROW + metrics)
    for row, result in zip(rows, results, strict=True):
        row[:_WHOLE] = result[:_WHOLE]
        row[_WHOLE:].view(np.float64)[:] = (result.loss, *result.sums)


def unpack(words: np.ndarray) -> tuple[int, float, list[PortionResult]]:
    """Return batch, seconds and results from the words that :func:`pack` wrote."""
    batch, count, microseconds, metrics = words[:_HEAD].tolist()
    rows = words[_HEAD:][: count * (_ROW + metrics)].reshape(count, _ROW + metrics)
    numbers = rows[:, _WHOLE:].copy().view(np.float64).tolist()
    results = [
        PortionResult(portion, samples, correct, loss, tuple(sums))
        for (portion, samples, correct), (loss, *sums) in zip(rows[:, :_WHOLE].tolist(), numbers, strict=True)
    ]
    return batch, 1e-6 * microseconds, results
