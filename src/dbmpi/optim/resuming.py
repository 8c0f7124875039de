"""Where a batch method stands between two iterations: what a checkpoint keeps of it beside the vectors.

With it a run goes on to the last bit as if it had never ended, where portions are added up in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from dbmpi.optim.descent import GRADIENT, OTHER_GRADIENT, Progress, Start

if TYPE_CHECKING:
    from dbmpi.optim.lbfgs import History

Bounds = dict[str, tuple[int | None, float | None]]
"""What is known of the sizes of all vectors: :meth:`dbmpi.optim.localspace.LocalSpace.bounds`."""


class Position(NamedTuple):
    """Where a run stands in its batches."""

    first: int = 0
    """The first portion of the batch."""
    portions: int = 0
    """Of the batch."""
    iterations: int = 0
    """Iterations on this batch."""
    loss: float | None = None
    """Mean loss where the batch before began, or this one."""


class State(BaseModel):
    """Numbers of a batch method and of its batches.

    What they mean depends on the settings that stand beside them in the checkpoint; a history of another memory is of
    no use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    memory: int
    """Pairs of the history at most."""
    history: dict[str, list[int] | list[float] | list[list[float]]]
    """The arrays of :meth:`dbmpi.optim.lbfgs.History.state`."""
    pairs: list[str]
    """Names of the history's vectors."""
    gradient: str = ""
    """Name of the gradient's vector, or nothing where the search begins anew."""
    numbers: list[float] = []
    """Loss, square and largest magnitude of the gradient, decrease, number of iterations."""
    position: list[int] = []
    """First portion and portions of the batch, iterations on it."""
    batch_loss: float | None = None
    """See :class:`Position`."""
    bounds: dict[str, tuple[int | None, float | None]] = {}
    """What is known of the sizes of all vectors: :meth:`dbmpi.optim.localspace.LocalSpace.bounds`."""

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the vectors that are kept with it."""
        return (*self.pairs, *([self.gradient] if self.gradient else []))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The history's state as arrays."""
        return {
            name: np.array(values, np.int64 if name == "slots" else np.float64) for name, values in self.history.items()
        }

    @property
    def start(self) -> Start | None:
        """Where the search goes on; None where it begins anew."""
        if not self.gradient:
            return None
        loss, square, largest, decrease, iteration = self.numbers
        return Start(self.gradient, loss, square, largest, decrease, int(iteration))

    @property
    def place(self) -> Position:
        """Where the run stands in its batches."""
        first, portions, iterations = self.position or (0, 0, 0)
        return Position(first, portions, iterations, self.batch_loss)


def capture(history: History, position: Position, progress: Progress, bounds: Bounds | None) -> State:
    """Return where a search stands; without `bounds` it will begin anew from there, with its history."""
    here: dict[str, Any] = {}
    if bounds is not None:
        numbers = [progress.loss, progress.square, progress.largest, progress.decrease, float(progress.iteration)]
        here = {"gradient": progress.gradient, "numbers": numbers, "bounds": bounds}
    return State(
        memory=history.memory,
        history={name: array.tolist() for name, array in history.state().items()},
        pairs=[name for pair in history.pairs for name in pair],
        position=list(position[:3]),
        batch_loss=position.loss,
        **here,
    )


def read_state(text: str) -> State | None:
    """Read what :meth:`State.model_dump_json` wrote; None where it is no state, e.g. of another version."""
    if not text:
        return None
    try:
        state = State.model_validate_json(text)
    except ValidationError:
        return None
    sound = len(state.numbers) == 5 and state.gradient in (GRADIENT, OTHER_GRADIENT) and bool(state.bounds)
    return state if (sound or not state.gradient) and len(state.position) in (0, 3) else None
