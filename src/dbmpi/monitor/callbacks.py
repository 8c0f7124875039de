"""A user's own code that follows a run: what it is called with, and how it may end the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dbmpi.errors import UserError

METHODS = ("on_step", "on_evaluation", "on_checkpoint", "on_end")
"""What may be called of a callback."""


class TrainingEvent(NamedTuple):
    """What a callback is called with."""

    step: int
    """Steps of all replicas in this session; in ``on_step`` of Downpour those of this replica, of Sandblaster
    iterations."""
    epoch: float
    """Passes over the training samples so far."""
    samples: int
    """Samples behind `loss`: of the batch, or held out.  In ``on_checkpoint`` and ``on_end``, training samples of all
    steps of this session."""
    loss: float
    """Mean loss of these samples, in ``on_step`` of Sandblaster with `l1` and `l2`; NaN in ``on_checkpoint``, and in
    ``on_end`` without held-out samples."""
    accuracy: float | None = None
    """Fraction of these samples that is classified correctly; None where that is not known."""
    path: Path | None = None
    """The checkpoint that was written, in ``on_checkpoint`` and ``on_end``."""
    replica: int = 0
    """The replica whose step it was."""
    metrics: Mapping[str, float] | None = None
    """Means of the objective's own metrics over held-out samples, in ``on_evaluation`` and ``on_end``."""


class Callbacks:
    """The callbacks of a run on one rank.

    Parameters
    ----------
    given
        An object with some of the methods in `METHODS`, several of them, or None.

    Raises
    ------
    UserError
        If one has no such method, or one that begins with ``on_`` and is never called.
    """

    def __init__(self, given: Any = None) -> None:
        several = given if isinstance(given, list | tuple) else [] if given is None else [given]
        for one in several:
            names = [name for name in dir(one) if name.startswith("on_")]
            wrong = [name for name in names if name not in METHODS or not callable(getattr(one, name))]
            if wrong or not names:
                what = f"has {wrong[0]!r}, which is never called" if wrong else "has none of the methods"
                raise UserError(
                    f"train: the callback {one!r:.60} {what}; expected an object with some of {', '.join(METHODS)}"
                )
        self._several: Iterable[Any] = tuple(several)

    def call(self, name: str, event: TrainingEvent) -> bool:
        """Call the method of this `name` of all that have it, with the `event`; return whether one asks for the end.

        After an exception, none is called any more.
        """
        several, self._several = self._several, ()
        asked = [bool(getattr(one, name)(event)) for one in several if hasattr(one, name)]
        self._several = several
        return any(asked)
