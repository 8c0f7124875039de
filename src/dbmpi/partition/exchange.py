"""Moving activations between the partitions of a replica: forward fills needed boxes, backward is the mirror and adds.

Which box goes to whom follows from what every worker owns of a layer's outputs and what it needs as inputs of the
next layer.  It is worked out once; every destination gets each value once.  Where everybody needs everything and owns
whole rows, the exchange is a collective: Allgatherv forward, Reduce_scatter backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.partition.boxes import Box
from dbmpi.runtime import waiting

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 7


class Exchange:
    """The exchange over one boundary, for one worker.

    Parameters
    ----------
    comm
        The workers of the replica, in the order of the boxes.
    owned
        The box of the outputs below the boundary that each worker computes; together they cover each output once.
    needed
        The box of these outputs that each worker needs.
    shape
        Shape of all outputs of one sample.

    Attributes
    ----------
    kind
        ``"none"``, ``"gather"`` or ``"messages"``.
    serve
        Called while this rank waits for others, so that its other duties go on.
    """

    def __init__(self, comm: MPI.Intracomm | None, owned: Sequence[Box], needed: Sequence[Box], shape: tuple[int, ...]):
        rank = 0 if comm is None else comm.rank
        self._comm = comm
        self.serve: Callable[[], bool] | None = None
        self.mine, self.needed = owned[rank], needed[rank]
        others = [other for other in range(len(owned)) if other != rank]
        self.sends = _parts([(other, self.mine.meet(needed[other])) for other in others])
        self.receives = _parts([(other, owned[other].meet(self.needed)) for other in others])
        self._own_part = self.mine.meet(self.needed)
        anything = any(
            not owned[a].meet(needed[b]).empty for a in range(len(owned)) for b in range(len(owned)) if a != b
        )
        whole = Box.whole(shape)
        rows = all(box.starts[1:] == whole.starts[1:] and box.stops[1:] == whole.stops[1:] for box in owned)
        in_order = all(a.stops[0] == b.starts[0] for a, b in pairwise(owned))
        if not anything:
            self.kind = "none"
        elif rows and in_order and all(box == whole for box in needed):
            self.kind = "gather"
        else:
            self.kind = "messages"
        self._counts = [box.size for box in owned]
        self._buffers: dict[tuple[str, int], np.ndarray] = {}

    @property
    def in_place(self) -> bool:
        """Whether what is needed is just what is owned, so that one array serves for both."""
        return self.kind == "none" and self.mine == self.needed

    def elements(self) -> int:
        """Values that this worker receives for one sample, forward and backward together."""
        return sum(box.size for _, box in self.receives) + sum(box.size for _, box in self.sends)

    def fill(self, outputs: np.ndarray, inputs: np.ndarray) -> None:
        """Fill the needed box `inputs` from everybody's `outputs`; arrays are ``(*box shape, samples)``."""
        if self.kind == "gather":
            assert self._comm is not None
            counts = [count * outputs.shape[-1] for count in self._counts]
            waiting.complete(
                self._comm.Iallgatherv(outputs, [inputs, counts]),
                "activations of the other partitions",
                serve=self.serve,
            )
            return
        arriving = self._start(outputs, self.mine, self.sends, self.receives)
        if not self._own_part.empty:
            inputs[self._own_part.slices(self.needed)] = outputs[self._own_part.slices(self.mine)]
        for request, box, buffer in arriving:
            waiting.complete(request, "activations of the other partitions", serve=self.serve)
            if box is not None:
                inputs[box.slices(self.needed)] = buffer

    def add(self, input_gradient: np.ndarray, gradient: np.ndarray) -> None:
        """Set `gradient`, of the owned box, to the sum of everybody's `input_gradient`, in the order of the workers."""
        if self.kind == "gather":
            assert self._comm is not None
            counts = [count * gradient.shape[-1] for count in self._counts]
            request = self._comm.Ireduce_scatter(input_gradient, gradient, counts)
            waiting.complete(request, "gradients of the other partitions", serve=self.serve)
            return
        arriving = self._start(input_gradient, self.needed, self.receives, self.sends)
        gradient.fill(0)
        if not self._own_part.empty:
            gradient[self._own_part.slices(self.mine)] = input_gradient[self._own_part.slices(self.needed)]
        for request, box, buffer in arriving:
            waiting.complete(request, "gradients of the other partitions", serve=self.serve)
            if box is not None:
                gradient[box.slices(self.mine)] += buffer

    def _start(
        self, source: np.ndarray, held: Box, sends: list[tuple[int, Box]], receives: list[tuple[int, Box]]
    ) -> list[tuple[MPI.Request, Box | None, np.ndarray]]:
        """Post all messages; return the requests, with the boxes that arrive."""
        if self._comm is None:
            return []
        pending: list[tuple[MPI.Request, Box | None, np.ndarray]] = []
        samples, dtype = source.shape[-1], source.dtype
        for other, box in receives:
            buffer = self._buffer("in", other, (*box.shape, samples), dtype)
            pending.append((self._comm.Irecv(buffer, other, _TAG), box, buffer))
        for other, box in sends:
            buffer = self._buffer("out", other, (*box.shape, samples), dtype)
            np.copyto(buffer, source[box.slices(held)])
            pending.append((self._comm.Isend(buffer, other, _TAG), None, buffer))
        return pending

    def _buffer(self, way: str, other: int, shape: tuple[int, ...], dtype: np.dtype[np.floating]) -> np.ndarray:
        """Return room for a message, kept from step to step."""
        size = int(np.prod(shape))
        kept = self._buffers.get((way, other))
        if kept is None or kept.size < size or kept.dtype != dtype:
            kept = self._buffers[way, other] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


def _parts(parts: list[tuple[int, Box]]) -> list[tuple[int, Box]]:
    return [(other, box) for other, box in parts if not box.empty]
