"""Turns: which replicas may compute at the same time, so that no push becomes staler than it may.

A turn of a replica begins before a fetch, and ends when all pushes whose staleness is counted from this fetch are
applied on all shards.  A push can only become stale by turns that overlap with its own.  The lead therefore begins a
turn only if neither it nor one that goes on then overlaps with more turns than allowed.  This is the bounded staleness
of Ho et al., "More effective distributed ML via a stale synchronous parallel parameter server", NIPS 2013, where a fast
worker waits for slow ones; but counted in versions and not in clocks of the workers.

A replica that waits has no turn, and the turns that go on end by themselves: nobody waits for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from dbmpi.config import OptimizerSection, ServerSection
from dbmpi.config.staleness import pushes_of_a_fetch


class Turns:
    """The lead's side.

    Parameters
    ----------
    most
        The number of other turns that a turn may overlap with.
    shards
        Number of shards.
    begin
        Tells a replica that its turn of some number begins.

    Examples
    --------
    >>> turns = Turns(1, 1, lambda replica, number: print(f"replica {replica} begins"))
    >>> turns.ask(0, 1), turns.ask(1, 1)
    replica 0 begins
    replica 1 begins
    (None, None)
    >>> turns.over(0)
    >>> turns.ask(0, 2)  # another one beside that of replica 1 would be one too many
    >>> turns.over(1)
    replica 0 begins
    """

    def __init__(self, most: int, shards: int, begin: Callable[[int, int], object]) -> None:
        self._most, self._shards, self._begin = most, shards, begin
        self._going_on: dict[int, int] = {}
        """For each replica that has a turn, with how many it overlaps so far."""
        self._asking: deque[tuple[int, int]] = deque()
        self._settled: dict[int, int] = {}

    def ask(self, replica: int, number: int) -> None:
        """Let a replica begin a turn, now or later, in the order in which they ask.

        Parameters
        ----------
        replica
            Which one; it has no turn.
        number
            Of the turn.
        """
        self._asking.append((replica, number))
        self._proceed()

    def over(self, replica: int) -> None:
        """End the turn of a `replica`, if it has one, and forget what it has asked for."""
        self._going_on.pop(replica, None)
        self._asking = deque(asked for asked in self._asking if asked[0] != replica)
        self._proceed()

    def lose(self, replica: int) -> None:
        """Begin no turn of a `replica` any more; one that goes on ends when all shards have settled its pushes."""
        if replica in self._going_on:
            self._settled[replica] = 0
        else:
            self.over(replica)

    def settled(self, replica: int) -> None:
        """Note that one more shard applies nothing of a lost `replica` any more."""
        if replica in self._settled:
            self._settled[replica] += 1
            if self._settled[replica] == self._shards:
                self.over(replica)

    def leave(self, replica: int) -> tuple[int, int]:
        """Return nothing that shards need not wait for when a `replica` is given up: they wait for no push."""
        return 0, 0

    def awaits(self, replica: int) -> bool:
        """Return whether others cannot end their turns without a `replica`: they can."""
        return False

    def stop(self) -> None:
        """Begin turns as before, though the run ends: replicas that stop ask for none."""

    def begin_with(self, running: Sequence[int]) -> None:
        """Begin nothing for the `running` replicas together: each begins when it has asked."""

    def _proceed(self) -> None:
        """Let those that have asked begin, as long as no turn then overlaps with too many."""
        while self._asking and max(self._overlaps_with_another()) <= self._most:
            replica, number = self._asking.popleft()
            *overlaps, own = self._overlaps_with_another()
            self._going_on = {**dict(zip(self._going_on, overlaps, strict=True)), replica: own}
            self._begin(replica, number)

    def _overlaps_with_another(self) -> list[int]:
        """Return with how many turns each overlaps if another one begins, which comes last."""
        return [*(count + 1 for count in self._going_on.values()), len(self._going_on)]


def most_overlaps(server: ServerSection, optimizer: OptimizerSection) -> int | None:
    """Return with how many other turns a turn may overlap; None where nobody waits.

    With p pushes in each turn, the last one of a turn that overlaps with k others is k p + p - 1 versions stale at
    most.

    Parameters
    ----------
    server, optimizer
        The sections.
    """
    if not server.max_staleness or server.on_stale != "wait":
        return None
    pushes = pushes_of_a_fetch(optimizer)
    return (server.max_staleness - (pushes - 1)) // pushes
