"""The values that move between workers: planned once for a placement, without MPI, for any number of workers.

Forward, every worker gets the inputs that its outputs need and that others own; each value reaches each
destination once.  Backward runs the same plan in reverse and adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from dbmpi.index.boxes import Box
from dbmpi.index.lookup import Index
from dbmpi.replica.cut import Reach, needed_box
from dbmpi.replica.placement import Placement, Split, check, needed_inputs

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer

Kind = Literal["none", "gather", "messages"]


class Move(NamedTuple):
    """A box that goes to, or comes from, another worker."""

    worker: int
    box: Box


@dataclass(frozen=True)
class Way:
    """One direction of an exchange, as one worker sees it."""

    source: Box
    """The box of the array that parts are sent from."""
    target: Box
    """The box of the array that is filled or added to."""
    sends: tuple[Move, ...]
    """Parts of `source`, one message for each destination, in the order of the workers."""
    receives: tuple[Move, ...]
    """Parts of `target`, one message for each origin, in the order of the workers."""

    @property
    def reversed(self) -> Way:
        """The other direction: what was sent is received, and the other way round."""
        return Way(self.target, self.source, self.receives, self.sends)


@dataclass(frozen=True)
class ExchangePlan:
    """The plan of one exchange: from the boxes that workers own of an array to those that they need.

    Run forward, it fills the needed boxes; in reverse, it adds parts for the needed boxes up in the owned ones.
    What a worker sends and receives is computed when it is first used, so that a plan for thousands of workers costs
    no more than their boxes and, on each of them, its own messages.
    """

    shape: tuple[int, ...]
    """Of the array, for one sample."""
    owned: tuple[Box, ...]
    needed: tuple[Box, ...]

    @cached_property
    def kind(self) -> Kind:
        """How it can run.

        ``none``: all that is needed is owned.  ``gather``: each of the `members` needs everything, and others neither
        own nor need anything: it can run as Allgatherv, and in reverse as Reduce_scatter.  ``messages``: all else.
        """
        if all(have.holds(need) for have, need in zip(self.owned, self.needed, strict=True)):
            return "none"
        whole = Box.whole(self.shape)
        return "gather" if all(self.needed[worker] == whole for worker in self.members) else "messages"

    @cached_property
    def members(self) -> tuple[int, ...]:
        """The workers that own or need anything."""
        pairs = enumerate(zip(self.owned, self.needed, strict=True))
        return tuple(worker for worker, (have, need) in pairs if not (have.empty and need.empty))

    @cached_property
    def in_order(self) -> bool:
        """Whether owned boxes are runs of the flat array in the order of the workers: a gather needs no unpacking."""
        position = 0
        for box in self.owned:
            if not box.empty:
                first = next(box.runs(self.shape))
                if first.start != position or len(first) != box.size:
                    return False
                position = first.stop
        return True

    def forward(self, worker: int) -> Way:
        """Return what moves from the owned box of a worker, and to its needed one."""
        have, need = self.owned[worker], self.needed[worker]
        if self.kind == "none":
            return Way(have, need, (), ())
        sends = (Move(n, self.needed[n].meet(have)) for n in self._needers.meeting(have) if n != worker)
        receives = (Move(o, self.owned[o].meet(need)) for o in self._owners.meeting(need) if o != worker)
        return Way(have, need, tuple(sends), tuple(receives))

    def offered(self, worker: int) -> dict[Box, int]:
        """Return the parts of the worker's box that others need, each once, and where each begins if all lie in a row.

        Workers with the same needs are treated together: for all workers, this costs no more than the boxes returned.
        """
        have, starts, position = self.owned[worker], dict[Box, int](), 0
        for number in self._distinct_needs.meeting(have):
            need, needers = self._needs[number]
            box = need.meet(have)
            if needers != (worker,) and box not in starts:
                starts[box] = position
                position += box.size
        return starts

    def returned(self, worker: int, owner: int) -> int:
        """Return where the part that a worker returns to an owner begins, if all parts lie in a row by owners."""
        need = self.needed[worker]
        if need not in self._returned:
            position, starts = 0, dict[int, int]()
            for other in self._owners.meeting(need):
                starts[other] = position
                position += self.owned[other].common(need)
            self._returned[need] = starts
        return self._returned[need][owner] - (self.owned[worker].common(need) if worker < owner else 0)

    def received(self, worker: int) -> int:
        """Return the values a sample that the worker receives."""
        return self.needed[worker].size - self.owned[worker].common(self.needed[worker])

    @cached_property
    def values(self) -> int:
        """Values a sample that all workers receive together."""
        return sum(self.received(worker) for worker in range(len(self.owned)))

    @cached_property
    def _owners(self) -> Index:
        return Index(self.owned)

    @cached_property
    def _needers(self) -> Index:
        return Index(self.needed)

    @cached_property
    def _needs(self) -> tuple[tuple[Box, tuple[int, ...]], ...]:
        """Every box that is needed, once, and the first two workers that need it."""
        needs: dict[Box, tuple[int, ...]] = {}
        for worker, need in enumerate(self.needed):
            needs[need] = (*needs.get(need, ()), worker)[:2]
        return tuple(needs.items())

    @cached_property
    def _distinct_needs(self) -> Index:
        return Index([need for need, _ in self._needs])

    @cached_property
    def _returned(self) -> dict[Box, dict[int, int]]:
        return {}


@dataclass(frozen=True)
class LayerPlan:
    """What moves for one layer.

    Split by outputs, `inputs` runs before the layer's forward pass, and in reverse after its backward pass.

    Split by inputs, a worker makes of the inputs that it owns a part of *all* outputs.  `outputs` runs in reverse after
    that: parts are added up in each worker's own units, which then get bias and activation.  Backward, it runs forward
    and gives every worker the whole gradient before the activation; the gradient for the inputs is then complete.
    """

    split: Split
    inputs: ExchangePlan
    outputs: ExchangePlan | None = None

    @property
    def values(self) -> int:
        """Values a sample that move forward, and again backward, all workers together."""
        return self.inputs.values + (0 if self.outputs is None else self.outputs.values)


def plan_exchanges(layers: Sequence[Layer], placement: Placement) -> tuple[LayerPlan, ...]:
    """Plan what moves for each layer.

    Raises
    ------
    UserError
        If the placement does not fit the layers.
    """
    check(layers, placement)
    needed = needed_inputs(layers, placement)
    plans = []
    for number, (layer, split) in enumerate(zip(layers, placement.splits, strict=True)):
        # Every worker reads the network's inputs itself, as if it owned what it needs.
        below = placement.boxes[number - 1] if number > 0 else needed[0]
        outputs = None
        if split == "inputs":
            whole = Box.whole(layer.output_shape)
            nothing = Box(whole.starts, whole.starts)
            parts = tuple(nothing if box.empty else whole for box in below)
            outputs = ExchangePlan(layer.output_shape, placement.boxes[number], parts)
        plans.append(LayerPlan(split, ExchangePlan(layer.input_shape, below, needed[number]), outputs))
    return tuple(plans)


def interior(layer: Layer, output: Box, owned: Box) -> tuple[Box, tuple[Box, ...]]:
    """Divide a box of outputs into what owned inputs are enough for, and the rest, which must wait for others.

    Parameters
    ----------
    layer
        The layer.
    output
        The outputs that a worker computes; not empty.
    owned
        The inputs that it owns.

    Returns
    -------
    interior, rest
        The largest such box, which may be empty, and boxes that hold the other outputs.
    """
    if len(owned.starts) == len(output.starts):
        inside = output.meet(Reach(layer).suffices(owned))
        # Needs along an axis may depend on the other axes in a layer of a user's own.
        if not inside.empty and owned.holds(needed_box(layer, inside)):
            return inside, output.minus(inside)
    return Box(output.starts, output.starts), (output,)
