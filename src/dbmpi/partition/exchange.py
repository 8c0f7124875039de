"""Moving values between the partitions of a replica, as an :class:`ExchangePlan` says.

Run forward, an exchange fills the boxes that workers need from those that they own; run in reverse, it adds up what
workers have made for the boxes that they needed.  Every destination gets each value once.  Where all need everything,
it is a collective: Allgatherv forward, Reduce_scatter in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dbmpi.partition.boxes import Box
from dbmpi.partition.plan import ExchangePlan, Message
from dbmpi.runtime import waiting

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 7


class Moving(NamedTuple):
    """A message under way; `box` is what arrives in `buffer`, None if it needs no unpacking or is sent."""

    request: MPI.Request
    box: Box | None
    buffer: np.ndarray


class Exchange:
    """One exchange, for one worker.

    Parameters
    ----------
    comm
        The workers of the replica, in the order of the plan's boxes; None for one alone.
    plan
        What is owned and needed by whom.

    Attributes
    ----------
    mine, needed
        This worker's boxes.
    serve
        Called while this worker waits for others, so that its other duties go on.
    """

    def __init__(self, comm: MPI.Intracomm | None, plan: ExchangePlan) -> None:
        rank = 0 if comm is None else comm.rank
        self._comm = comm
        self.serve: Callable[[], bool] | None = None
        self.mine, self.needed = plan.owned[rank], plan.needed[rank]
        self._sends, self._receives = plan.sends(rank), plan.receives(rank)
        self._own_part = plan.local(rank)
        self._moves = plan.kind != "none"
        everybody = len(plan.members) == len(plan.owned)
        self._counts = [box.size for box in plan.owned] if plan.kind == "gather" and plan.in_order and everybody else []
        self._buffers: dict[tuple[str, int], np.ndarray] = {}

    @property
    def in_place(self) -> bool:
        """Whether what is needed is just what is owned, so that one array serves for both."""
        return not self._moves and self.mine == self.needed

    def fill(self, owned: np.ndarray, needed: np.ndarray) -> None:
        """Fill `needed` from everybody's `owned`; arrays are ``(*box shape, samples)``."""
        self.finish_fill(self.start_fill(owned, needed), needed)

    def start_fill(self, owned: np.ndarray, needed: np.ndarray) -> list[Moving]:
        """Start to fill `needed`; what this worker owns itself is there at once, the rest after `finish_fill`."""
        if self._counts:
            assert self._comm is not None
            counts = [count * owned.shape[-1] for count in self._counts]
            needed[self._own_part.slices(self.needed)] = owned
            return [Moving(self._comm.Iallgatherv(owned, [needed, counts]), None, needed)]
        moving = self._post(owned, self.mine, self._sends, needed, self.needed, self._receives)
        if not self._own_part.empty:
            needed[self._own_part.slices(self.needed)] = owned[self._own_part.slices(self.mine)]
        return moving

    def finish_fill(self, moving: Sequence[Moving], needed: np.ndarray) -> None:
        """Wait for what `start_fill` has started."""
        for request, box, buffer in moving:
            waiting.complete(request, "activations of the other partitions", serve=self.serve)
            if box is not None:
                needed[box.slices(self.needed)] = buffer

    def add(self, needed: np.ndarray, owned: np.ndarray) -> None:
        """Set `owned` to the sum of everybody's `needed`, added in the order of the workers."""
        if self._counts:
            assert self._comm is not None
            counts = [count * owned.shape[-1] for count in self._counts]
            request = self._comm.Ireduce_scatter(needed, owned, counts)
            waiting.complete(request, "gradients of the other partitions", serve=self.serve)
            return
        moving = self._post(needed, self.needed, self._receives, None, self.mine, self._sends)
        owned.fill(0)
        if not self._own_part.empty:
            owned[self._own_part.slices(self.mine)] = needed[self._own_part.slices(self.needed)]
        for request, box, buffer in moving:
            waiting.complete(request, "gradients of the other partitions", serve=self.serve)
            if box is not None:
                owned[box.slices(self.mine)] += buffer

    def _post(
        self,
        source: np.ndarray,
        held: Box,
        sends: Sequence[Message],
        target: np.ndarray | None,
        wanted: Box,
        receives: Sequence[Message],
    ) -> list[Moving]:
        """Post all messages, receives first; those that are contiguous in `source` and `target` are not packed."""
        if self._comm is None:
            return []
        moving: list[Moving] = []
        for other, box in receives:
            place = None if target is None else target[box.slices(wanted)]
            if place is not None and place.flags.c_contiguous:
                moving.append(Moving(self._comm.Irecv(place, other, _TAG), None, place))
                continue
            buffer = self._buffer("in", other, (*box.shape, source.shape[-1]), source.dtype)
            moving.append(Moving(self._comm.Irecv(buffer, other, _TAG), box, buffer))
        for other, box in sends:
            part = source[box.slices(held)]
            if not part.flags.c_contiguous:
                buffer = self._buffer("out", other, part.shape, part.dtype)
                np.copyto(buffer, part)
                part = buffer
            moving.append(Moving(self._comm.Isend(part, other, _TAG), None, part))
        return moving

    def _buffer(self, way: str, other: int, shape: tuple[int, ...], dtype: np.dtype[np.floating]) -> np.ndarray:
        """Return room for a message, kept from step to step."""
        size = int(np.prod(shape))
        kept = self._buffers.get((way, other))
        if kept is None or kept.size < size or kept.dtype != dtype:
            kept = self._buffers[way, other] = np.empty(size, dtype)
        return kept[:size].reshape(shape)
