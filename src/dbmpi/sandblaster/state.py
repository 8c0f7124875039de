"""Where a batch method stands between two iterations: what a checkpoint keeps of it beside the vectors.

With it a run goes on to the last bit as if it had never ended, where portions are added up in order.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dbmpi.config import explain
from dbmpi.errors import Damaged
from dbmpi.methods.descent import GRADIENT, ORIGIN, OTHER_GRADIENT, POINT, Progress, Start
from dbmpi.methods.lbfgs import check_history, names_of

if TYPE_CHECKING:
    from pathlib import Path

    from dbmpi.methods.lbfgs import History

_MOST = 2**62
_POWERS = range(-1100, 1025)
"""Of two, of a bound of float64 numbers."""

Bounds = dict[str, tuple[int | None, float | None]]
"""What is known of the sizes of all vectors: :meth:`dbmpi.methods.local_space.LocalSpace.bounds`."""


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


class MethodState(BaseModel):
    """Numbers of a batch method and of its batches.

    What they mean depends on the settings that stand beside them in the checkpoint; a history of another memory is of
    no use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    memory: int
    """Pairs of the history at most."""
    history: dict[str, list[int] | list[float] | list[list[float]]]
    """The arrays of :meth:`dbmpi.methods.lbfgs.History.state`."""
    pairs: list[str]
    """Names of the history's vectors."""
    gradient: str = ""
    """Name of the gradient's vector, or nothing where the search begins anew."""
    numbers: list[float] = []
    """Loss, square and largest magnitude of the gradient, decrease, number of iterations."""
    position: list[Annotated[int, Field(ge=0, lt=_MOST)]] = []
    """First portion and portions of the batch, iterations on it."""
    batch_loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """See :class:`Position`."""
    bounds: dict[str, tuple[int | None, float | None]] = {}
    """What is known of the sizes of all vectors: :meth:`dbmpi.methods.local_space.LocalSpace.bounds`."""

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
    def batches(self) -> Position:
        """Where the run stands in its batches."""
        first, portions, iterations = self.position or (0, 0, 0)
        return Position(first, portions, iterations, self.batch_loss)


def capture(history: History, position: Position, progress: Progress, bounds: Bounds | None) -> MethodState:
    """Return where a search stands.

    Parameters
    ----------
    history, progress
        Of the method.
    position
        Of the batches.
    bounds
        Of the vectors; None where the search cannot resume from its gradient, but with its history alone.
    """
    here: dict[str, Any] = {}
    if bounds is not None:
        numbers = [progress.loss, progress.square, progress.largest, progress.decrease, float(progress.iteration)]
        here = {"gradient": progress.gradient, "numbers": numbers, "bounds": bounds}
    return MethodState(
        memory=history.memory,
        history={name: array.tolist() for name, array in history.state().items()},
        pairs=[name for pair in history.pairs for name in pair],
        position=list(position[:3]),
        batch_loss=position.loss,
        **here,
    )


def read_state(text: str, vectors: Collection[str], path: Path) -> MethodState | None:
    """Read what :meth:`State.model_dump_json` wrote; None where nothing was written.

    Parameters
    ----------
    text
        The method of a checkpoint.
    vectors
        Names of the vectors that the checkpoint has.
    path
        Its file.

    Raises
    ------
    Damaged
        If it is no state that a search can go on from.
    """
    if not text:
        return None
    try:
        state = MethodState.model_validate_json(text)
        _check(state, vectors)
    except (ValueError, TypeError, OverflowError) as error:
        reason = explain(error, MethodState, "it") if isinstance(error, ValidationError) else str(error)
        reason = "; ".join(reason.splitlines())
        raise Damaged(
            f"{path}: /run/method is not what a batch method can go on from: {reason}; use another checkpoint, or "
            "begin the search anew with another sandblaster.algorithm"
        ) from None
    return state


def _check(state: MethodState, vectors: Collection[str]) -> None:
    """Raise ValueError where the numbers contradict one another or the vectors that are there."""
    missing = [name for name in state.vectors if name not in vectors]
    if missing:
        raise ValueError(f"it needs the vector {missing[0]!r}, which is missing")
    slots = check_history(state.memory, state.arrays)
    if state.pairs != [name for slot in slots for name in names_of(slot)]:
        raise ValueError(f"its pairs are {state.pairs[:6]}, and its history has the slots {slots[:6]}")
    if len(state.position) not in (0, 3):
        raise ValueError(f"its position is {state.position[:6]}, expected three counts")
    _check_bounds(state, vectors)
    if not state.gradient:
        return
    if state.gradient not in (GRADIENT, OTHER_GRADIENT) or len(state.numbers) != 5 or not state.bounds:
        raise ValueError(f"its gradient is {state.gradient!r}, with {len(state.numbers)} numbers, expected 5")
    loss, square, largest, _, iteration = state.numbers
    finite = all(math.isfinite(number) for number in (loss, square, largest, iteration))
    if not finite or min(square, largest) < 0 or not (0 <= iteration < _MOST and iteration == int(iteration)):
        raise ValueError(f"its numbers are {state.numbers}, expected finite ones, and a count at the end")


def _check_bounds(state: MethodState, vectors: Collection[str]) -> None:
    """Raise ValueError where a bound is of no vector of the method, or cannot be one."""
    known = {*vectors, POINT, ORIGIN, GRADIENT, OTHER_GRADIENT}
    known.update(name for slot in range(min(state.memory, len(state.bounds)) + 1) for name in names_of(slot))
    for name, (power, largest) in state.bounds.items():
        if name not in known:
            raise ValueError(f"it has bounds of {name[:40]!r}, which is no vector of the method")
        if (power is not None and power not in _POWERS) or (largest is not None and not largest >= 0):
            raise ValueError(f"the bounds of {name!r} are {power} and {largest}")
