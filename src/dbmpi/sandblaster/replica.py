"""A replica's part in a batch: draw portions, compute, and deliver the sum of those that it has won (section 4.2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.kernels import vectors
from dbmpi.objective import Outcome
from dbmpi.sandblaster.board import END, SLOTS, Board, Bundles, PassKind, PortionResult, PostedBatch, pack

if TYPE_CHECKING:
    from dbmpi.mpi.window import Window
    from dbmpi.replica.team import Team
    from dbmpi.sandblaster.work import PortionWork


class _Action(IntEnum):
    """What partition 0 decides for all partitions, itself included."""

    FETCH = 0
    """A batch begins: its words, and the number of the open bundle."""
    COMPUTE = 1
    KEEP = 2
    """The portion is won: add its gradient to the bundle."""
    COMMIT = 3
    BUNDLE = 4
    """Begin with a bundle of this number; whether the one before is on its way to the shards."""
    END = 5


class Portions:
    """The life of one worker, in small steps: :meth:`poll` does the next one, and never waits for another replica.

    Parameters
    ----------
    board
        The lead's board.
    window
        This worker's.
    team
        The partitions of the replica.
    work
        What to compute.
    replica
        Which one this is.
    bundles
        Where this worker's bundles lie.
    takers
        Shards that take something of them.
    clock
        Seconds; for tests.

    Attributes
    ----------
    ended
        Whether the run is over.
    given_up
        Whether this replica takes no further part, because one of its partitions has died.
    computed, copies, lost
        Portions computed so far, those of them that were backup copies, and those that another replica had won.
    """

    def __init__(
        self,
        board: Board,
        window: Window,
        team: Team,
        work: PortionWork,
        *,
        replica: int,
        bundles: Bundles,
        takers: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board, self._window, self._team, self._work = board, window, team, work
        self._replica, self._bundles, self._clock = replica, bundles, clock
        self._taken = [_words(window, bundles, taker) for taker in takers]
        self._read = _words(window, bundles, bundles.shards) if team.speaks else None
        self._gradient = np.zeros(bundles.elements, np.float32)
        self._batch = PostedBatch(0, PassKind.GRADIENT, 0, 0, 0)
        self._bundle, self._sums = 0, 0
        self._committed, self._delivered = [-1] * SLOTS, [-1] * SLOTS
        """The bundle in each slot that was committed last, or -1: of all, and of those with a gradient."""
        self._results: list[PortionResult] = []
        self._portion, self._outcome = 0, Outcome(0, 0.0, 0)
        self._undecided = False
        """Whether a portion has been computed that is neither won nor lost."""
        self._all_drawn = False
        """Whether nothing of the batch is left to be drawn, as the board has shown."""
        self._closed: list[int] | None = None
        """The decision after a commit."""
        self._idle_since: float | None = None
        self._seconds = 0.0
        self.ended = self.given_up = False
        self.computed = self.copies = self.lost = 0

    def poll(self) -> bool:
        """Do the next step; return whether there was any."""
        if self.ended:
            return False
        if self.given_up:
            return self._watch_others()
        decision = self._team.poll(self._decide() if self._team.speaks else None)
        if decision is None:
            return False
        action, *numbers = decision
        if action == _Action.FETCH:
            number, kind, *others = numbers[:6]
            self._batch, self._bundle = PostedBatch(number, PassKind(kind), *others), numbers[6]
            self._sums, self._results = 0, []
            self._work.begin(self._batch)
        elif action == _Action.COMPUTE:
            self._compute(numbers[0])
        elif action == _Action.KEEP:
            self._keep()
        elif action == _Action.COMMIT:
            self._commit()
        elif action == _Action.BUNDLE:
            if numbers[1]:
                self._committed[self._bundle % SLOTS] = self._bundle
                if self._batch.kind == PassKind.GRADIENT:
                    self._delivered[self._bundle % SLOTS] = self._bundle
            self._bundle, self._sums, self._results = numbers[0], 0, []
        else:
            self.ended = True
            self._work.end()
        return True

    def give_up(self) -> None:
        """Do nothing more but wait for the end: what this replica has won is handed out again."""
        self.given_up = True
        self._work.end()

    def _watch_others(self) -> bool:
        """Look how far the others are; return whether they have begun another batch."""
        before, number = self._batch.number, self._board.number()
        self._batch = self._batch._replace(number=number)
        self.ended = number == END
        return number != before

    def _decide(self) -> list[int] | None:  # noqa: PLR0911
        """Return what this replica does next."""
        board, batch = self._board, self._batch
        if self._closed is not None:
            closed, self._closed = self._closed, None
            return closed
        number = board.number()
        if number == END:
            return [_Action.END]
        if number != batch.number:
            self._undecided, self._idle_since, self._all_drawn = False, None, False
            new = board.read()
            return None if new is None else [_Action.FETCH, *new, board.open_bundle(self._replica)]
        if self._sums and board.open_bundle(self._replica) != self._bundle:
            return [_Action.BUNDLE, board.open_bundle(self._replica), 0]  # it was revoked
        if self._undecided:
            self._undecided = False
            if board.win(batch, self._portion, self._replica, self._bundle):
                self._results.append(self._result())
                return [_Action.KEEP]
            self.lost += 1
        if self._sums >= self._bundles.results:
            return [_Action.COMMIT]
        if not (self._sums or self._slot_free()):
            return None
        portion = None if self._all_drawn else board.draw(batch, self._replica)
        if portion is None:
            self._all_drawn = True
            if self._sums:
                return [_Action.COMMIT]
            portion = self._copy()
        else:
            self._idle_since = None
        return None if portion is None else [_Action.COMPUTE, portion]

    def _result(self) -> PortionResult:
        outcome = self._outcome
        sums = tuple(total for _, total in outcome.sums)
        return PortionResult(self._portion, outcome.samples, outcome.correct, outcome.loss, sums)

    def _copy(self) -> int | None:
        """Return an outstanding portion to compute as a backup copy, once it has taken longer than one takes here."""
        now = self._clock()
        if self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since < self._seconds / max(self.computed, 1):
            return None
        outstanding = self._board.outstanding(self._batch)
        if not outstanding:
            return None
        self.copies += 1
        # Those that were drawn first are the latest; two that copy at a time had better not copy the same, unless the
        # first one is what all others wait for.
        return outstanding[0 if self._board.ordered else self._replica % len(outstanding)]

    def _compute(self, portion: int) -> None:
        began = self._clock()
        self._portion, self._undecided = portion, True
        self._outcome = self._work.compute(self._batch, portion, self._gradient)
        self._seconds += self._clock() - began
        self.computed += 1

    def _keep(self) -> None:
        """Add the gradient of the portion to the bundle, by its share of the batch."""
        self._undecided = False
        if self._sums == 0:
            self._team.wait(self._slot_free, "the shards to take a gradient")
        self._sums += 1
        if self._batch.kind == PassKind.TEST:
            return
        offset = self._bundles.gradient_of(self._bundle)
        target = self._window.local[offset : offset + self._gradient.nbytes].view(np.float32)
        share = self._outcome.samples / self._batch.samples
        if self._sums == 1:
            vectors.combine(target, [share], [self._gradient])
        else:
            vectors.accrue(target, share, self._gradient)

    def _commit(self) -> None:
        """Let the bundle count, unless it has been revoked."""
        self._team.gather()
        if self._team.speaks:
            offset = self._bundles.list_of(self._bundle)
            words = self._window.local[offset : offset + 8 * self._bundles.list_words].view(np.int64)
            pack(words, self._batch.number, self._seconds / self.computed, self._results)
            self._window.sync()
            committed = self._board.close_bundle(self._replica, self._bundle)
            self._closed = [_Action.BUNDLE, self._bundle + 1, int(committed)]

    def _slot_free(self) -> bool:
        """Whether what was last committed in the slot of the open bundle has been taken by all takers."""
        self._window.sync()
        slot = self._bundle % SLOTS
        read = self._read is None or int(self._read[slot]) > self._committed[slot]
        return read and all(int(taken[slot]) > self._delivered[slot] for taken in self._taken)


def _words(window: Window, bundles: Bundles, taker: int) -> np.ndarray:
    """Return what a taker says of each slot."""
    return window.local[bundles.taken(taker, 0) :][: 8 * SLOTS].view(np.int64)
