"""Moving values between the partitions of a replica, as an :class:`ExchangePlan` says.

Run forward, an exchange fills the boxes that workers need from those that they own; run in reverse, it adds up what
workers have made for the boxes that they needed.  Every destination gets each value once: from a shelf of its owner
where all workers are on one node, otherwise as a message.  Where all need everything and there are no shelves, it is a
collective: Allgatherv forward, Reduce_scatter in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dbmpi.index.boxes import Box
from dbmpi.mpi import pieces
from dbmpi.mpi.pieces import Operation
from dbmpi.mpi.tags import Tag
from dbmpi.replica.group import Group
from dbmpi.replica.plan import ExchangePlan, Move

_FORWARD, _REVERSE = "activations of the other partitions", "gradients of the other partitions"


class Moving(NamedTuple):
    """A message under way; `box` is what arrives in `buffer`, None if it needs no unpacking or is sent."""

    request: Operation
    box: Box | None
    buffer: np.ndarray


class Exchange:
    """One exchange, for one worker.

    Parameters
    ----------
    group
        The workers of the replica, in the order of the plan's boxes.
    plan
        What is owned and needed by whom.

    Attributes
    ----------
    mine, needed
        This worker's boxes.
    """

    def __init__(self, group: Group, plan: ExchangePlan) -> None:
        rank = group.rank
        self._group = group
        self.mine, self.needed = plan.owned[rank], plan.needed[rank]
        self._sends, self._receives = plan.sends(rank), plan.receives(rank)
        self._own_part = plan.local(rank)
        self._moves = plan.kind != "none"
        everybody = len(plan.members) == len(plan.owned)
        self._counts = [box.size for box in plan.owned] if plan.kind == "gather" and plan.in_order and everybody else []
        self._buffers: dict[tuple[str, int], np.ndarray] = {}
        if group.near and self._moves:
            workers = range(group.size)
            offered = [plan.offered(worker) for worker in workers]
            sizes = [sum(box.size for box in boxes) for boxes in offered]
            wanted = [_Wanted(other, box, offered[other][box], sizes[other]) for other, box in self._receives]
            self._forward = _Shelved(group, max(sizes), offered[rank], [to for to, _ in self._sends], wanted)
            sizes = [plan.received(worker) for worker in workers]
            returned = {box: plan.returned(rank, other) for other, box in self._receives}
            wanted = [_Wanted(other, box, plan.returned(other, rank), sizes[other]) for other, box in self._sends]
            self._reverse = _Shelved(group, max(sizes), returned, [to for to, _ in self._receives], wanted)

    @property
    def in_place(self) -> bool:
        """Whether what is needed is just what is owned, so that one array serves for both."""
        return not self._moves and self.mine == self.needed

    @property
    def within(self) -> bool:
        """Whether what is owned can be a part of the array of what is needed."""
        return self.in_place or (not (self.mine.empty or self._counts) and self.needed.holds(self.mine))

    def fill(self, owned: np.ndarray, needed: np.ndarray) -> None:
        """Fill `needed` from everybody's `owned`; arrays are ``(*box shape, samples)``.

        If `within`, `owned` may be its part of `needed`, and nothing of it is copied.
        """
        self.finish_fill(self.start_fill(owned, needed), needed)

    def start_fill(self, owned: np.ndarray, needed: np.ndarray) -> list[Moving]:
        """Start to fill `needed`: what this worker owns itself is there at once, the rest after `finish_fill`."""
        moving: list[Moving] = []
        if self._moves and self._group.near:
            self._forward.offer(owned, self.mine)
        elif self._counts:
            assert self._group.comm is not None
            needed[self._own_part.slices(self.needed)] = owned
            counts = [count * owned.shape[-1] for count in self._counts]
            return [Moving(pieces.iallgatherv(self._group.comm, owned, needed, counts), None, needed)]
        elif self._moves:
            moving = self._post(owned, self.mine, self._sends, needed, self.needed, self._receives)
        if not self._own_part.empty and not np.may_share_memory(owned, needed):
            needed[self._own_part.slices(self.needed)] = owned[self._own_part.slices(self.mine)]
        return moving

    def finish_fill(self, moving: Sequence[Moving], needed: np.ndarray) -> None:
        """Wait for what `start_fill` has started."""
        if self._moves and self._group.near:
            self._forward.take(needed, self.needed, add=False)
        for request, box, buffer in moving:
            self._group.complete(request, _FORWARD)
            if box is not None:
                needed[box.slices(self.needed)] = buffer

    def add(self, needed: np.ndarray, owned: np.ndarray) -> None:
        """Set `owned` to the sum of everybody's `needed`: this worker's own, then the others' in their order.

        `owned` may be its part of `needed` as in `fill`; the sum then takes its place.
        """
        self.finish_add(self.start_add(needed, owned), owned)

    def start_add(self, needed: np.ndarray, owned: np.ndarray) -> list[Moving]:
        """Start to add; neither array may be touched until `finish_add`."""
        group, moving = self._group, []
        if self._moves and group.near:
            self._reverse.offer(needed, self.needed)
        elif self._counts:
            assert group.comm is not None
            counts = [count * owned.shape[-1] for count in self._counts]
            from mpi4py import MPI

            return [Moving(pieces.ireduce_scatter(group.comm, needed, owned, counts, MPI.SUM), None, owned)]
        elif self._moves:
            moving = self._post(needed, self.needed, self._receives, None, self.mine, self._sends)
        if self._own_part != self.mine:
            owned.fill(0)
        if not self._own_part.empty and not np.may_share_memory(owned, needed):
            owned[self._own_part.slices(self.mine)] = needed[self._own_part.slices(self.needed)]
        return moving

    def finish_add(self, moving: Sequence[Moving], owned: np.ndarray) -> None:
        """Wait for what `start_add` has started."""
        if self._moves and self._group.near:
            self._reverse.take(owned, self.mine, add=True)
        for request, box, buffer in moving:
            self._group.complete(request, _REVERSE)
            if box is not None:
                owned[box.slices(self.mine)] += buffer

    def _post(
        self,
        source: np.ndarray,
        held: Box,
        sends: Sequence[Move],
        target: np.ndarray | None,
        wanted: Box,
        receives: Sequence[Move],
    ) -> list[Moving]:
        """Post all messages, receives first; those that are contiguous in `source` and `target` are not packed."""
        comm = self._group.comm
        assert comm is not None
        moving: list[Moving] = []
        for other, box in receives:
            place = None if target is None else target[box.slices(wanted)]
            if place is not None and place.flags.c_contiguous:
                moving.append(Moving(pieces.irecv(comm, place, other, Tag.EXCHANGE), None, place))
                continue
            buffer = self._buffer("in", other, (*box.shape, source.shape[-1]), source.dtype)
            moving.append(Moving(pieces.irecv(comm, buffer, other, Tag.EXCHANGE), box, buffer))
        for other, box in sends:
            part = source[box.slices(held)]
            if not part.flags.c_contiguous:
                buffer = self._buffer("out", other, part.shape, part.dtype)
                np.copyto(buffer, part)
                part = buffer
            moving.append(Moving(pieces.isend(comm, part, other, Tag.EXCHANGE), None, part))
        return moving

    def _buffer(self, way: str, other: int, shape: tuple[int, ...], dtype: np.dtype[np.floating]) -> np.ndarray:
        """Return room for a message, kept from step to step."""
        size = math.prod(shape)
        kept = self._buffers.get((way, other))
        if kept is None or kept.size < size or kept.dtype != dtype:
            kept = self._buffers[way, other] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


class _Wanted(NamedTuple):
    """A box on another worker's shelf; `start` and `size`, of all that lies there, are elements a sample."""

    worker: int
    box: Box
    start: int
    size: int


class _Shelved:
    """One direction of an exchange over shelves.

    Parameters
    ----------
    largest
        Elements a sample on the fullest shelf of all workers.
    offered
        Where what this worker has for others begins on its shelf; a box that several want lies there once.
    takers
        Who takes from it.
    wanted
        What this worker takes from others.
    """

    def __init__(
        self,
        group: Group,
        largest: int,
        offered: Mapping[Box, int],
        takers: Sequence[int],
        wanted: Sequence[_Wanted],
    ) -> None:
        self._group = group
        self._shelf = group.shelf(each=largest)
        self._offered, self._size = offered, sum(box.size for box in offered)
        self._takers, self._wanted = takers, wanted

    def offer(self, source: np.ndarray, held: Box) -> None:
        """Put this worker's boxes of `source` on its shelf."""
        samples = source.shape[-1]
        room = self._group.room(self._shelf, self._size * samples, source.dtype, self._takers)
        for box, start in self._offered.items():
            _part(room, box, start, samples)[...] = source[box.slices(held)]
        self._group.offer(self._shelf)

    def take(self, target: np.ndarray, held: Box, *, add: bool) -> None:
        """Copy, or add, what others have to `target`."""
        samples = target.shape[-1]
        for other, box, start, size in self._wanted:
            part = _part(self._group.look(self._shelf, other, size * samples, target.dtype), box, start, samples)
            if add:
                target[box.slices(held)] += part
            else:
                target[box.slices(held)] = part
        self._group.taken(self._shelf, [wanted.worker for wanted in self._wanted])


def _part(shelf: np.ndarray, box: Box, start: int, samples: int) -> np.ndarray:
    return shelf[start * samples :][: box.size * samples].reshape(*box.shape, samples)
