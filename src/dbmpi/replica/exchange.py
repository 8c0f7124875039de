"""Moving values between the partitions of a replica, as an :class:`ExchangePlan` says.

Run forward, an exchange fills the boxes that workers need from those that they own; in reverse, it adds up the parts
that workers have computed for the boxes that they needed.  Every destination gets each value once: from a shelf of its
owner where all workers are on one node, otherwise as a message.  Where all need everything and there are no shelves, it
is a collective: Allgatherv forward, Reduce_scatter in reverse.
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
from dbmpi.replica.plan import ExchangePlan, Way


class Exchange:
    """One exchange, for one worker: :attr:`fill` forward, :attr:`add` in reverse.

    Parameters
    ----------
    group
        The workers of the replica, in the order of the plan's boxes.
    plan
        The boxes that each worker owns and needs.

    Attributes
    ----------
    owned, needed
        This worker's boxes.
    """

    def __init__(self, group: Group, plan: ExchangePlan) -> None:
        rank, workers = group.rank, range(group.size)
        forward = plan.forward(rank)
        reverse = forward.reversed
        self._group = group
        self.owned, self.needed = forward.source, forward.target
        self._still = plan.kind == "none"
        self._gathers = plan.kind == "gather" and plan.in_order and len(plan.members) == len(plan.owned)
        self._far = self._near = Transfer(group, forward, add=False), Transfer(group, reverse, add=True)
        if self._gathers:
            sizes = [box.size for box in plan.owned]
            self._far = Gathered(group, forward, sizes, add=False), Gathered(group, reverse, sizes, add=True)
        elif not self._still:
            self._far = Messaged(group, forward, add=False), Messaged(group, reverse, add=True)
        if group.near and not self._still:
            offered = [plan.offered(worker) for worker in workers]
            starts = [offered[other][box] for other, box in forward.receives]
            largest = max(sum(box.size for box in boxes) for boxes in offered)
            fill = Shelved(group, forward, offered[rank], starts, largest, add=False)
            returned = {box: plan.returned(rank, other) for other, box in reverse.sends}
            starts = [plan.returned(other, rank) for other, _ in reverse.receives]
            self._near = fill, Shelved(group, reverse, returned, starts, max(map(plan.received, workers)), add=True)

    @property
    def fill(self) -> Transfer:
        """Fills ``needed`` from every worker's ``owned``: ``fill(owned, needed)``."""
        return (self._near if self._group.near else self._far)[0]

    @property
    def add(self) -> Transfer:
        """Sets ``owned`` to the sum of every worker's ``needed``: ``add(needed, owned)``.

        This worker's part comes first, the others' follow in the order of the workers.
        """
        return (self._near if self._group.near else self._far)[1]

    @property
    def in_place(self) -> bool:
        """Whether the needed box is just the owned one, so that one array serves for both."""
        return self._still and self.owned == self.needed

    @property
    def within(self) -> bool:
        """Whether the array of the owned box can be a part of that of the needed box."""
        return self.in_place or (not (self.owned.empty or self._gathers) and self.needed.holds(self.owned))


class Transfer:
    """One direction of an exchange; by itself, where nothing moves between workers.

    Arrays are ``(*box shape, samples)``.  One may be a part of the other: nothing is copied between them then, and a
    sum replaces the part that it is made of.

    Parameters
    ----------
    group
        The workers of the replica.
    way
        What this worker gives and receives.
    add
        Whether to add what arrives to the target, or to overwrite.
    """

    def __init__(self, group: Group, way: Way, *, add: bool) -> None:
        self._group, self._way, self._add = group, way, add
        self._own = way.source.meet(way.target)
        self._what = f"{'gradients' if add else 'activations'} of the other partitions"

    def __call__(self, source: np.ndarray, target: np.ndarray) -> None:
        """Start from `source` and finish in `target`."""
        self.start(source, target)
        self.finish(target)

    def start(self, source: np.ndarray, target: np.ndarray) -> None:
        """Start to move from `source`: the own part of `target` is there at once, the rest after `finish`.

        Until then neither array may be written.
        """
        way, own = self._way, self._own
        if self._add and own != way.target:
            target.fill(0)
        if not own.empty and not np.may_share_memory(source, target):
            target[own.slices(way.target)] = source[own.slices(way.source)]

    def finish(self, target: np.ndarray) -> None:
        """Wait until everything is in `target`."""

    def _arrived(self, box: Box, values: np.ndarray, target: np.ndarray) -> None:
        """Add or copy what has arrived for a box."""
        part = target[box.slices(self._way.target)]
        if self._add:
            part += values
        else:
            part[...] = values


class Shelved(Transfer):
    """Moves over shelves.

    Parameters
    ----------
    group, way, add
        As for `Transfer`.
    offered
        Where each box for others begins on this worker's shelf, in elements a sample; one that several want lies there
        once.
    starts
        Of ``way.receives``, where each box begins on its owner's shelf.
    largest
        Elements a sample on the fullest shelf of all workers.
    """

    def __init__(
        self,
        group: Group,
        way: Way,
        offered: Mapping[Box, int],
        starts: Sequence[int],
        largest: int,
        *,
        add: bool,
    ) -> None:
        super().__init__(group, way, add=add)
        self._shelf = group.shelf(each=largest)
        self._offered = offered
        self._takers = [move.worker for move in way.sends]
        self._owners = [move.worker for move in way.receives]
        self._starts = starts

    def start(self, source: np.ndarray, target: np.ndarray) -> None:
        """Put the boxes of `source` for others on the shelf; copy the own part to `target`."""
        samples = source.shape[-1]
        self._shelf.clear(self._takers)
        for box, start in self._offered.items():
            part = self._shelf.array(self._group.rank, (*box.shape, samples), source.dtype, start * samples)
            part[...] = source[box.slices(self._way.source)]
        self._shelf.offer()
        super().start(source, target)

    def finish(self, target: np.ndarray) -> None:
        """Take the others' boxes from their shelves."""
        samples = target.shape[-1]
        for (other, box), start in zip(self._way.receives, self._starts, strict=True):
            values = self._shelf.take(other, (*box.shape, samples), target.dtype, start * samples)
            self._arrived(box, values, target)
        self._shelf.release(self._owners)


class _Going(NamedTuple):
    """A message under way; `box` is the one to unpack `values` to when it is complete, or None."""

    request: Operation
    values: np.ndarray
    box: Box | None


class Messaged(Transfer):
    """Moves by messages; what is contiguous in an array is neither packed nor unpacked.

    Parameters
    ----------
    group, way, add
        As for `Transfer`.
    """

    def __init__(self, group: Group, way: Way, *, add: bool) -> None:
        super().__init__(group, way, add=add)
        self._buffers: dict[tuple[str, int], np.ndarray] = {}
        self._going: list[_Going] = []

    def start(self, source: np.ndarray, target: np.ndarray) -> None:
        """Post all messages from `source`, receives first; copy the own part to `target`."""
        comm, way, samples = self._group.comm, self._way, source.shape[-1]
        self._going = []
        for other, box in way.receives:
            into, unpacked = target[box.slices(way.target)], None
            if self._add or not into.flags.c_contiguous:
                into, unpacked = self._buffer("in", other, (*box.shape, samples), source.dtype), box
            self._going.append(_Going(pieces.irecv(comm, into, other, Tag.EXCHANGE), into, unpacked))
        for other, box in way.sends:
            part = source[box.slices(way.source)]
            if not part.flags.c_contiguous:
                packed = self._buffer("out", other, part.shape, part.dtype)
                np.copyto(packed, part)
                part = packed
            self._going.append(_Going(pieces.isend(comm, part, other, Tag.EXCHANGE), part, None))
        super().start(source, target)

    def finish(self, target: np.ndarray) -> None:
        """Wait for all messages, and unpack them."""
        for request, values, box in self._going:
            self._group.complete(request, self._what)
            if box is not None:
                self._arrived(box, values, target)
        self._going = []

    def _buffer(self, way: str, other: int, shape: tuple[int, ...], dtype: np.dtype[np.floating]) -> np.ndarray:
        """Return memory for a message, kept from step to step."""
        size = math.prod(shape)
        kept = self._buffers.get((way, other))
        if kept is None or kept.size < size or kept.dtype != dtype:
            kept = self._buffers[way, other] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


class Gathered(Transfer):
    """Moves by a collective over all workers, each of which needs everything.

    Parameters
    ----------
    group, way, add
        As for `Transfer`.
    sizes
        Elements a sample that each worker owns.
    """

    def __init__(self, group: Group, way: Way, sizes: Sequence[int], *, add: bool) -> None:
        super().__init__(group, way, add=add)
        self._sizes = sizes
        self._request: Operation | None = None

    def start(self, source: np.ndarray, target: np.ndarray) -> None:
        """Begin the collective, from `source` to `target`, which moves the own part as well."""
        comm, counts = self._group.comm, [size * source.shape[-1] for size in self._sizes]
        if self._add:
            self._request = pieces.ireduce_scatter(comm, source, target, counts)
        else:
            self._request = pieces.iallgatherv(comm, source, target, counts)

    def finish(self, target: np.ndarray) -> None:
        """Wait for the collective."""
        assert self._request is not None
        self._group.complete(self._request, self._what)
        self._request = None
