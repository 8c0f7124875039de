"""What a run came to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dbmpi.errors import UserError
from dbmpi.objective import Outcome

FilePath: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class Result:
    """The outcome of a run; the same on every rank, except for `seconds`."""

    steps: int
    """Steps of all replicas in this session."""
    samples: int
    """Training samples of these steps; a sample counts once for each time it was used."""
    seconds: float
    """Time from the first step to the last, in seconds."""
    test: Outcome | None
    """Outcome on the test data, with `mean_loss` and `accuracy`; None without test data or after a signal."""
    stopped_by: int
    """Number of the signal that ended the run early; 0 if it ran to its end."""
    checkpoint: Path
    """The last checkpoint."""
    staleness: float = 0.0
    """Mean staleness of the pushes in this session: versions between fetch and application."""
    advice: str = ""
    """How to make such a run faster, if the shards were the bottleneck; otherwise empty."""
    warning: str = ""
    """What is wrong with the losses that the run ended with, if they make no sense (:mod:`dbmpi.monitor.verdict`)."""
    lost: tuple[int, ...] = ()
    """Replicas that were given up in this session."""
    withheld: int = 0
    """Pushes that were withheld in this session, because their gradient was not finite."""
    discarded: int = 0
    """Pushes that shards dropped in this session, because they were stale, or late for a round; each counts its own."""
    rolled_back: bool = False
    """Whether the session was given up, so that the run has gone back to its last checkpoint; never at its end."""
    ended: str = ""
    """Why an evaluation has ended the run before its epochs were learned; empty where none has."""


def path_of(given: FilePath | Result, what: str = "checkpoint") -> Path:
    """Return the path that an argument of a user stands for, a result for its last checkpoint.

    Parameters
    ----------
    given
        The argument.
    what
        Its name, for the message.

    Raises
    ------
    UserError
        If it is neither a path nor a result.
    """
    if isinstance(given, Result):
        return given.checkpoint
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{what}: given a {type(given).__name__}; expected the path of a file")
    return Path(given)
