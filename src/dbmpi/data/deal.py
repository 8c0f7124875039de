"""Which batches each replica learns, and which others learn instead where a replica is given up.

Batches are counted by their position among those that are left of the stream, and a replica's share is a few strided
ranges of positions, which it learns in increasing order.  Pure numbers, as the stream.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dbmpi.data.stream import Stream


class DealPhase(NamedTuple):
    """A part of the stream that some of the replicas learn, the first ones."""

    batches: int
    """Of the part."""
    replicas: int
    """These replicas get the batches in turn."""


@dataclass(slots=True)
class _Leg:
    """A stretch of a replica's way: positions that it learns after its first `begin` batches."""

    begin: int
    ranges: tuple[range, ...]

    @property
    def end(self) -> int:
        return self.begin + sum(map(len, self.ranges))


class Deal:
    """The share of each replica.

    At first the replicas get the batches in turn, after those of the warmstart, which all go to the first one, and
    those of phases in which not all replicas learn.  A share changes only between two batches of its replica.

    Parameters
    ----------
    stream
        The batches that are left when the session begins.
    replicas
        Number of replicas that get a share.
    warmstart
        Batches that replica 0 learns before the others begin.
    spares
        Number of replicas beyond these that get one only where another one is given up.
    phases
        What follows the warmstart, before all of them learn.

    Examples
    --------
    >>> deal = Deal(Stream(total=9), replicas=3)
    >>> deal.give_up(1, learned=1, takers=[0, 2])  # of 1, 4 and 7, it has learned 1
    2
    >>> list(numbers(deal.stream, deal.take(0, drawn=2)))  # of 0, 3 and 6, it has begun two
    [4, 6]
    >>> list(numbers(deal.stream, deal.take(2, drawn=1)))
    [5, 7, 8]
    >>> deal.left([2, 1, 1])
    Stream(total=9, frontier=4, holes=())
    """

    def __init__(
        self, stream: Stream, replicas: int, warmstart: int = 0, spares: int = 0, phases: Sequence[DealPhase] = ()
    ) -> None:
        self.stream = stream
        self._warm = min(warmstart, len(stream))
        self._legs = [
            [_Leg(0, first_share(stream, replica, replicas, warmstart, phases))] for replica in range(replicas + spares)
        ]
        self._owed: list[list[range]] = [[] for _ in self._legs]
        self._given_up: dict[int, int] = {}
        self._for_nobody: list[range] = []

    def share(self, replica: int) -> tuple[range, ...]:
        """Return the positions that a `replica` learns from its last change on."""
        return self._legs[replica][-1].ranges

    def owes(self, replica: int) -> bool:
        """Return whether there are batches for a `replica` to take."""
        return bool(self._owed[replica])

    def is_idle(self, replica: int) -> bool:
        """Return whether a `replica` has never had a share."""
        return not (self._owed[replica] or any(leg.ranges for leg in self._legs[replica]))

    def give_up(self, replica: int, learned: int, takers: Sequence[int]) -> int:
        """Divide what is left of a share among others; return how many batches that is.

        Parameters
        ----------
        replica
            Whose share it is.
        learned
            Batches of it that count.
        takers
            Other replicas, which are to call :meth:`take`.  The first of them gets all of what is left of the
            warmstart.  Without any, it stays for a later session.
        """
        left, self._owed[replica] = self._left(replica, learned) + self._owed[replica], []
        self._given_up[replica] = learned
        for number, positions in enumerate(left):
            alone, in_turn = _below(positions, self._warm), _from(positions, self._warm)
            (self._owed[takers[0]] if takers else self._for_nobody).extend(_kept(alone))
            if not takers:
                self._for_nobody += _kept(in_turn)
            for turn, taker in enumerate(takers):
                self._owed[taker] += _kept(in_turn[(turn + number) % len(takers) :: len(takers)])
        return sum(map(len, left))

    def end_warmstart(self, replica: int, drawn: int, others: Sequence[int], phases: Sequence[DealPhase]) -> None:
        """Divide what is left of a warmstart that was to take all batches.

        Parameters
        ----------
        replica
            The one that has the warmstart; it and the others are to call :meth:`take`.
        drawn
            Batches that it has begun to learn.
        others
            Those that begin, in this order.
        phases
            Before all of them learn.
        """
        left, self._owed[replica] = self._left(replica, drawn) + self._owed[replica], []
        legs = self._legs[replica]
        legs[-1].ranges = tuple(_taken(legs[-1].ranges, drawn - legs[-1].begin))
        legs.append(_Leg(drawn, ()))
        self._warm = 0
        all_of_them = (replica, *others)
        for turn, one in enumerate(all_of_them):
            self._owed[one] += _in_phases(left, turn, len(all_of_them), phases)

    def take(self, replica: int, drawn: int) -> tuple[range, ...]:
        """Return the new share of a replica: the rest of its own, and what is owed to it.

        Parameters
        ----------
        replica
            Number of the replica.
        drawn
            Batches that it has begun to learn.
        """
        share = (*self._left(replica, drawn), *self._owed[replica])
        self._owed[replica] = []
        legs = self._legs[replica]
        legs[-1].ranges = tuple(_taken(legs[-1].ranges, drawn - legs[-1].begin))
        legs.append(_Leg(drawn, share))
        return share

    def warm(self, replica: int) -> int:
        """Return how many batches of the warmstart a `replica` has from its last change on."""
        return sum(len(_below(positions, self._warm)) for positions in self.share(replica))

    def left(self, learned: Sequence[int]) -> Stream:
        """Return the batches that are left.

        Parameters
        ----------
        learned
            For each replica how many of its batches count; of one that is given up, that stays as it was.

        Raises
        ------
        ValueError
            If a replica has learned more batches than were dealt to it, or fewer than none.
        """
        left = [positions for owed in (*self._owed, self._for_nobody) for positions in owed]
        end = 0
        for replica, legs in enumerate(self._legs):
            count = self._given_up.get(replica, learned[replica])
            if not 0 <= count <= legs[-1].end:
                raise ValueError(f"replica {replica} has learned {count} batches, but {legs[-1].end} were dealt to it")
            if replica not in self._given_up:
                left += self._left(replica, count)
            for leg in legs:
                end = max(end, _stop(leg.ranges, min(count, leg.end) - leg.begin))
        return self.stream.leaving(left, end)

    def _left(self, replica: int, learned: int) -> list[range]:
        """Return the positions of a replica's share beyond the first `learned`."""
        left: list[range] = []
        for leg in self._legs[replica]:
            gone = _counts(leg.ranges, max(learned - leg.begin, 0))
            left += _kept(*(positions[count:] for positions, count in zip(leg.ranges, gone, strict=True)))
        return left


def first_share(
    stream: Stream, replica: int, replicas: int, warmstart: int = 0, phases: Sequence[DealPhase] = ()
) -> tuple[range, ...]:
    """Return the positions that one replica learns as long as none is given up.

    Parameters
    ----------
    stream
        The batches that are left when the session begins.
    replica
        Number of the replica; `replicas` or more for a spare one.
    replicas, warmstart, phases
        As for :class:`Deal`.
    """
    if replica >= replicas:
        return ()
    return tuple(_in_phases([range(len(stream))], replica, replicas, (DealPhase(warmstart, 1), *phases)))


def _in_phases(positions: Sequence[range], turn: int, replicas: int, phases: Sequence[DealPhase]) -> Iterator[range]:
    """Yield what a replica gets of some positions, which go to the first ones in turn in each phase, and then to all.

    Parameters
    ----------
    positions
        Ranges, one after the other.
    turn, replicas
        Number of the replica among those that get something, and how many there are.
    phases
        As for :class:`Deal`.
    """
    rest = list(positions)
    for batches, planned in (*phases, DealPhase(sum(map(len, rest)), replicas)):
        dealt, active = 0, min(planned, replicas)  # some of them may be given up by now
        while rest and dealt < batches:
            part = rest[0][: batches - dealt]
            # The turns go on from one range to the next.
            if turn < active and (own := part[(turn - dealt) % active :: active]):
                yield own
            dealt += len(part)
            rest[0] = rest[0][len(part) :]
            if not rest[0]:
                del rest[0]


def numbers(stream: Stream, share: Sequence[range]) -> Iterator[int]:
    """Return the numbers of the batches at the positions of a `share` of a `stream`, in their order."""
    return map(stream.item, heapq.merge(*share))


def _kept(*ranges: range) -> tuple[range, ...]:
    return tuple(positions for positions in ranges if positions)


def _below(positions: range, end: int) -> range:
    return positions[: bisect_left(positions, end)]


def _from(positions: range, begin: int) -> range:
    return positions[bisect_left(positions, begin) :]


def _stop(ranges: Sequence[range], count: int) -> int:
    """Return the smallest number with `count` positions of disjoint ranges below it."""
    if count <= 0:
        return 0
    highest = max(positions.stop for positions in ranges)
    return bisect_left(
        range(highest), count, key=lambda stop: sum(len(_below(positions, stop)) for positions in ranges)
    )


def _counts(ranges: Sequence[range], count: int) -> list[int]:
    """Return for each of some disjoint ranges how many of the lowest `count` positions of all are its own."""
    if count >= sum(map(len, ranges)):
        return list(map(len, ranges))
    stop = _stop(ranges, count)
    return [len(_below(positions, stop)) for positions in ranges]


def _taken(ranges: Sequence[range], count: int) -> Iterator[range]:
    """Yield of each range what belongs to the lowest `count` positions of all."""
    for positions, own in zip(ranges, _counts(ranges, count), strict=True):
        yield positions[:own]
