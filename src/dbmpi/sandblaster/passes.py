"""The lead's part in a batch: take what the replicas commit, and hand out again what they do not deliver."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dbmpi.errors import RunFailed
from dbmpi.mpi.failures import RankLost
from dbmpi.objective import Outcome
from dbmpi.sandblaster.board import Board, Bundles, PassKind, PortionResult, PostedBatch, unpack

SHORTEST_PATIENCE = 0.05
"""Seconds without any commit before a bundle is revoked, at least."""
_MOST_DOUBLINGS = 7
"""Of that time, where nothing has come of it."""


class Entry(NamedTuple):
    """A line of the ledger: how a portion of the last batch came to count."""

    portion: int
    replica: int
    bundle: int


class Passes:
    """Leads replicas through batches, one after the other.

    Parameters
    ----------
    board
        The board.  Where it is ordered, bundles are of one portion, and count in the order of the portions, so that
        sums do not depend on timing.
    bundles
        Where the workers keep their bundles: for each replica, partition 0 first.
    clock
        Seconds; for tests.
    metrics
        Names of what is measured of held-out samples beside the loss.

    Attributes
    ----------
    ledger
        How each portion of the last batch came to count; one entry each.
    revoked
        Bundles that were revoked or dropped in the last batch.
    lost
        Replicas that have been given up.
    """

    def __init__(
        self,
        board: Board,
        bundles: Sequence[Sequence[Bundles]],
        clock: Callable[[], float] = time.monotonic,
        metrics: Sequence[str] = (),
    ) -> None:
        self._board, self._bundles, self._clock, self._metrics = board, bundles, clock, metrics
        self._words, self._ordered = board.words, board.ordered
        self._batch = PostedBatch(0, PassKind.GRADIENT, 0, 0, 0)
        self._seen = [0] * len(bundles)
        """For every replica, the first bundle that has not been looked at."""
        self._revoked: set[tuple[int, int]] = set()
        self._results: dict[int, PortionResult] = {}
        self._queue: dict[int, tuple[int, int]] = {}
        """By portion, bundles that wait for their turn."""
        self._counting: list[tuple[int, int]] = []
        """Replica and number of bundles of gradients that count, and have not been returned."""
        self._turn = 0
        self._moved, self._tries = 0.0, 0
        self._slowest = 0.0
        """Seconds that a portion takes the slowest replica that has delivered any."""
        self.ledger: list[Entry] = []
        self.revoked = 0
        self.lost: set[int] = set()

    def begin(self, kind: PassKind, portions: int, first: int, samples: int, reached: int = 0) -> None:
        """Offer a batch to the replicas.

        Parameters
        ----------
        kind, portions, first, samples, reached
            Fields of :class:`~dbmpi.sandblaster.board.PostedBatch`.
        """
        self._batch = PostedBatch(self._batch.number + 1, kind, portions, first, samples, reached)
        self._results, self._queue, self._turn = {}, {}, 0
        self.ledger, self.revoked = [], 0
        self._moved, self._tries = self._clock(), 0
        self._board.open(self._batch)

    def end(self) -> None:
        """Offer no further batch."""
        self._board.end()

    @property
    def finished(self) -> bool:
        """Whether every portion counts, and `poll` has returned all bundles."""
        return len(self._results) == self._batch.portions and not (self._queue or self._counting)

    @property
    def outcome(self) -> Outcome:
        """Sums over the portions, in their order."""
        total = Outcome(0, 0.0, 0)
        for portion in range(self._batch.portions):
            _, samples, correct, loss, sums = self._results[portion]
            named = tuple(zip(self._metrics, sums, strict=True)) if sums else ()
            total = total.plus(Outcome(samples, loss, correct, named))
        return total

    @property
    def shares(self) -> dict[int, int]:
        """Portions of the last batch by replica."""
        return dict(sorted(Counter(self.contributors).items()))

    @property
    def contributors(self) -> list[int]:
        """For each portion of the last batch the replica whose result counts."""
        return [entry.replica for entry in sorted(self.ledger)]

    def poll(self) -> list[tuple[int, int]] | None:
        """Take what has been committed; None if there was nothing.

        Returns
        -------
        list of (replica, bundle)
            Bundles of gradients that count from now on, each of them once: the shards are to add them up.
        """
        moved = False
        for replica, opened in enumerate(self._board.open_bundles()):
            moved = self._take_until(replica, opened) or moved
        if moved:
            self._moved = self._clock()
        elif not self.finished and self._clock() - self._moved > self._patience:
            self._hand_out_again()
            self._moved = self._clock()
            self._tries += 1
        counting, self._counting = self._counting, []
        return counting if moved or counting else None

    @property
    def _patience(self) -> float:
        """Seconds without any commit before bundles are revoked: more after each time that nothing came of it.

        Where messages are slow, a commit may be further from its claim than portions are long.
        """
        return max(SHORTEST_PATIENCE * 2.0 ** min(self._tries, _MOST_DOUBLINGS), 2 * self._slowest)

    def give_up(self, replica: int) -> None:
        """Expect nothing more of a replica, which has died: what it has not committed is handed out again at once."""
        if replica in self.lost:
            return
        self.lost.add(replica)
        opened = self._board.retire(replica)
        self._take_until(replica, opened)
        self._seen[replica] = opened + 1
        claims = self._board.claims(self._batch, self._seen)
        won = [portion for portion, claim in enumerate(claims) if claim == (replica, opened)]
        self.revoked += bool(won)
        for portion in won:
            self._board.reopen(self._batch, portion, replica, opened)

    def awaited(self) -> str:
        """Say what is missing."""
        missing = self._batch.portions - len(self._results)
        claims = self._board.claims(self._batch, self._seen)
        holders = sorted({r for portion, (r, _) in enumerate(claims) if portion not in self._results and r >= 0})
        held = f", some of them held by the replicas {holders}" if holders else ""
        return f"{missing} of {self._batch.portions} portions of batch {self._batch.number}{held}"

    def _take_until(self, replica: int, opened: int) -> bool:
        """Take the bundles of a replica before the open one; return whether there were any."""
        moved = False
        while self._seen[replica] < opened:
            bundle, self._seen[replica] = self._seen[replica], self._seen[replica] + 1
            if (replica, bundle) not in self._revoked:
                self._take(replica, bundle)
            self._revoked.discard((replica, bundle))
            moved = True
        return moved

    def _take(self, replica: int, bundle: int) -> None:
        bundles = self._bundles[replica][0]
        words = np.empty(bundles.list_words, np.int64)
        self._words.sync()
        try:
            self._words.get(bundles.rank, bundles.list_of(bundle), words)
        except RankLost:
            self.revoked += 1  # it does not count; its portions are soon found to be missing, and handed out again
            return
        number, seconds, results = unpack(words)
        self._slowest = max(self._slowest, seconds)
        if number != self._batch.number or not results:
            self._free(replica, bundle)  # of a batch that was given up
            return
        for result in results:
            if result.portion in self._results:
                raise RunFailed(f"portion {result.portion} of batch {number} was delivered twice: a bug in dbmpi")
            self._results[result.portion] = result
            self.ledger.append(Entry(result.portion, replica, bundle))
        self._tries = 0
        if not self._ordered:
            self._accept(replica, bundle)
            return
        self._queue[results[0].portion] = replica, bundle
        while self._turn in self._queue:
            self._accept(*self._queue.pop(self._turn))
            self._turn += 1

    def _accept(self, replica: int, bundle: int) -> None:
        """Let a bundle count; its list is needed no more."""
        if self._batch.kind == PassKind.GRADIENT:
            self._counting.append((replica, bundle))
        bundles = self._bundles[replica][0]
        self._words.store(bundles.rank, bundles.taken(bundles.shards, bundle), bundle + 1)

    def _free(self, replica: int, bundle: int) -> None:
        """Give a bundle back that will not be taken."""
        for bundles in self._bundles[replica]:
            for taker in range(bundles.shards + 1):
                self._words.store(bundles.rank, bundles.taken(taker, bundle), bundle + 1)

    def _hand_out_again(self) -> None:
        """Revoke bundles that are not committed and that all others wait for, and reopen what they hold."""
        claims = self._board.claims(self._batch, self._seen)
        missing = [portion for portion in range(self._batch.portions) if portion not in self._results]
        held = [portion for portion in missing if claims[portion][0] >= 0]
        awaited: list[int] = []
        if self._ordered and self._turn in held:
            awaited = [self._turn]  # slots may be full of what comes after it, and more not be drawn
        elif len(held) == len(missing):
            awaited = held
        if awaited:
            for replica, bundle in sorted({claims[portion] for portion in awaited}):
                if bundle >= self._seen[replica] and self._board.close_bundle(replica, bundle):
                    self._revoked.add((replica, bundle))
                    self.revoked += 1
        elif self._queue:
            # All that could compute what the others wait for may have their slots full.
            portion = max(self._queue)
            replica, bundle = self._queue.pop(portion)
            self._board.reopen(self._batch, portion, replica, bundle)
            del self._results[portion]
            self.ledger = [entry for entry in self.ledger if entry.portion != portion]
            self._free(replica, bundle)
            self.revoked += 1
        for portion in missing:
            replica, bundle = claims[portion]
            # Not where a commit may just have been made, and still waits to be looked at.
            if replica >= 0 and ((replica, bundle) in self._revoked or bundle < self._seen[replica]):
                self._board.reopen(self._batch, portion, replica, bundle)
