"""Rounds: replicas learn together, each a batch of the same epoch, and the shards apply the mean of their gradients.

The lead deals out batches round by round, and not a share to each replica.  Whoever gets a turn in a round pushes,
whatever is ordered meanwhile, so that no other replica waits in vain; replicas pause and stop between two rounds.

Without backups a round begins when all replicas have asked for it: this is synchronous SGD.  With backups it begins,
and ends on the shards, with fewer than there are; the others join it when they ask, and where they are too late their
pushes are dropped: Chen, Pan, Monga, Bengio, Jozefowicz, "Revisiting distributed synchronous SGD", ICLR workshop 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from dbmpi.data.deal import Deal
from dbmpi.downpour.turns import Turns, most_overlaps

if TYPE_CHECKING:
    from dbmpi.data.stream import Stream
    from dbmpi.downpour.warmstart import Warmstart
    from dbmpi.session import Session


class _Given(NamedTuple):
    """The last batches that were dealt to a replica."""

    round: int
    positions: range
    dealt: int
    """How many there were with them."""


class Rounds:
    """The lead's side, which takes the place of both `Turns` and `Deal`.

    Parameters
    ----------
    stream
        The batches that are left when the session begins.
    batches_per_epoch
        How many an epoch has: a round takes batches of one epoch alone, and its last round may be smaller.
    learning
        Replicas of a round, at most; others replace those that are given up.
    spared
        Pushes of a round that the shards do not wait for.
    steps
        Batches that a replica learns in a round, at most.
    begin
        Tells a replica that its turn of some number begins: the number of the round, how many pushes it needs, the
        replica after whose push its own is added, and the position of the first batch in the stream, and how many there
        are; none where nothing is left.

    Examples
    --------
    >>> from dbmpi.data.stream import Stream
    >>> rounds = Rounds(Stream(5), 3, 2, 0, 1, lambda *turn: print(turn))
    >>> rounds.ask(0, 1), rounds.begin_with([0, 1])
    (None, None)
    >>> rounds.ask(1, 1), rounds.begin_with([0, 1])
    (0, 1, 1, 2, -1, 0, 1)
    (1, 1, 1, 2, 0, 1, 1)
    (None, None)
    """

    def __init__(
        self,
        stream: Stream,
        batches_per_epoch: int,
        learning: int,
        spared: int,
        steps: int,
        begin: Callable[..., object],
    ) -> None:
        self.stream, self._per_epoch, self._steps = stream, batches_per_epoch, steps
        self._learning, self._spared, self._begin = learning, spared, begin
        self._asking: dict[int, int] = {}
        self._given: dict[int, _Given] = {}
        self._going_on: set[int] = set()
        """Replicas that have a turn, of any round."""
        self._dying: set[int] = set()
        """Replicas that are given up, and whose pushes are not settled."""
        self._next, self._back = 0, list[int]()
        """Position from which on nothing is dealt out, and those below that are to be dealt out again."""
        self._round = self._needed = 0
        self._members: set[int] = set()
        """Replicas of the last round that are not given up."""
        self._over, self._stopped = True, False
        self._ended = False
        """Whether replicas have heard that nothing is left."""
        self._bequeathed = list[int]()
        """Positions of this round whose replicas have died when they had pushed."""

    # In place of turns

    def ask(self, replica: int, number: int) -> None:
        """Note that a `replica` waits for its turn of that `number`."""
        self._asking[replica] = number

    def over(self, replica: int) -> None:
        """End the turn of a `replica`, if it has one: its push and those of its round are applied or dropped."""
        self._asking.pop(replica, None)
        if replica in self._going_on:
            self._going_on.discard(replica)
            self._over = self._over or self._given[replica].round == self._round

    def lose(self, replica: int) -> None:
        """Begin no turn of a `replica` any more."""
        self._asking.pop(replica, None)
        self._dying.add(replica)

    def settled(self, replica: int) -> None:
        """Note that one more shard applies nothing of a lost `replica` any more: what counts is known before."""

    def leave(self, replica: int) -> tuple[int, int]:
        """Return the round that goes on, and whether shards need one push less for it without a lost `replica`."""
        if self._over or replica not in self._members:
            return self._round, 0
        self._members.discard(replica)
        less = len(self._members) < self._needed
        self._needed -= less
        return self._round, int(less)

    def awaits(self, replica: int) -> bool:
        """Return whether others cannot end their turns without a `replica`."""
        return not self._over and replica in self._members and replica in self._going_on

    def stop(self) -> None:
        """Begin no further round, as the run ends."""
        self._stopped = True

    def begin_with(self, running: Sequence[int]) -> None:
        """Begin a round if it is time, or let others join the one that goes on.

        Parameters
        ----------
        running
            Replicas that learn, and are not asked to pause; empty while any is.
        """
        if self._stopped or self._dying or not self._asking or not running:
            return
        members = sorted(running)[: self._learning]
        ready = [replica for replica in members if replica in self._asking]
        if not self._over:
            for replica in ready if self._spared else ():
                for positions in self._left_of_epoch(1):
                    self._deal(replica, positions, -1)
            return
        batches = self._left_of_epoch(len(members))
        if not batches:
            for replica, number in self._asking.items():
                self._begin(replica, number, self._round, 0, -1, 0, 0)
            self._asking.clear()
            self._ended = True
            return
        needed = min(self._learning - self._spared, len(members), len(batches))
        if len(ready) < (needed if self._spared else len(members)):
            return
        self._round, self._needed, self._over = self._round + 1, needed, False
        self._members.clear()
        self._bequeathed.clear()
        after = -1
        for replica, positions in zip(ready, batches, strict=False):
            self._deal(replica, positions, after)
            after = -1 if self._spared else replica

    # In place of a deal

    def left(self, learned: Sequence[int]) -> Stream:
        """Return the batches that are left, if so many are `learned` by each replica."""
        left = {*self._back, *(() if self._over else self._bequeathed)}
        for replica, given in self._given.items():
            unknown = replica in self._going_on and given.round == self._round and not self._over
            if unknown or learned[replica] < given.dealt:
                left.update(given.positions)
        ranges = [range(position, position + 1) for position in left]
        return self.stream.leaving([*ranges, range(self._next, len(self.stream))], self._next)

    def give_up(self, replica: int, learned: int, takers: Sequence[int]) -> int:
        """Deal the batches of a lost replica to others, unless these have ended; return how many that is.

        Parameters
        ----------
        replica
            Which one.
        learned
            How many of its batches count.
        takers
            The others.
        """
        self._dying.discard(replica)
        self._going_on.discard(replica)
        given = self._given.pop(replica, None)
        if given is None or self._ended:
            return 0
        returns, open_round = learned < given.dealt, given.round == self._round and not self._over
        if returns:
            self._back += given.positions
        elif open_round:
            self._bequeathed += given.positions
        if open_round and not any(self._given[other].round == self._round for other in self._going_on):
            self._over = True  # no replica is left that could complete it, and the shards forget what has come
            self._back += self._bequeathed
        self._back.sort()
        return len(given.positions) * returns

    def owes(self, replica: int) -> bool:
        """Return whether there are batches for a `replica` beside those of its turns: never."""
        return False

    def take(self, replica: int, drawn: int) -> tuple[range, ...]:
        """Return the new share of a `replica` that has begun `drawn` batches: none, as its turns bring it all."""
        return ()

    def is_idle(self, replica: int) -> bool:
        """Return whether a `replica` has never had a batch."""
        return replica not in self._given

    def warm(self, replica: int) -> int:
        """Return how many batches a `replica` learns alone: none."""
        return 0

    def _left_of_epoch(self, replicas: int) -> list[range]:
        """Return the next positions for so many replicas, of one epoch; fewer where too little is left."""
        left = len(self._back) + len(self.stream) - self._next
        steps, found = min(self._steps, -(-left // replicas)), list[range]()
        for position in chain(self._back, range(self._next, len(self.stream))):
            if found and self._epoch(position) != self._epoch(found[0].start):
                break
            if found and len(found[-1]) < steps and found[-1].stop == position:
                found[-1] = range(found[-1].start, position + 1)
            elif len(found) < replicas:
                found.append(range(position, position + 1))
            else:
                break
        return found

    def _epoch(self, position: int) -> int:
        return self.stream.item(position) // self._per_epoch

    def _deal(self, replica: int, positions: range, after: int) -> None:
        """Begin a turn of a replica that has asked for it."""
        self._back = [position for position in self._back if position not in positions]
        self._next = max(self._next, positions.stop)
        dealt = self._given[replica].dealt if replica in self._given else 0
        self._given[replica] = _Given(self._round, positions, dealt + len(positions))
        self._going_on.add(replica)
        self._members.add(replica)
        number, first = self._asking.pop(replica), positions.start
        self._begin(replica, number, self._round, self._needed, after, first, len(positions))


def dealing(
    session: Session, warmstart: Warmstart, begin: Callable[..., object]
) -> tuple[Turns | Rounds, Deal | Rounds]:
    """Return what decides which replicas may compute, and what they learn.

    Parameters
    ----------
    session
        Everything that is known of the run.
    warmstart
        What of it is left.
    begin
        Tells a replica that its turn of some number begins, with further numbers where it is a turn in a round.
    """
    run, plan, starting, optimizer = session.run, session.plan, session.begin, session.run.optimizer
    if run.in_rounds:
        # The order of gradients is that of the serial loop; walks of many steps may cross the end of an epoch.
        local = optimizer.exchange == "local"
        per_epoch = session.order.batches if local else session.order.batches_per_epoch
        steps = run.local.steps if local else 1
        rounds = Rounds(starting.stream, max(per_epoch, 1), plan.learning, optimizer.spared, steps, begin)
        return rounds, rounds
    turns = Turns(most_overlaps(run.server, optimizer) or 0, plan.shards, begin)
    others = plan.spares + plan.evaluators
    return turns, Deal(starting.stream, plan.learning, warmstart.batches, others, warmstart.phases)
