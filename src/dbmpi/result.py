"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dbmpi.objective import Outcome


@dataclass(frozen=True)
class Result:
    """What a run came to; the same on every rank, except for `seconds`."""

    steps: int
    """Steps of all replicas in this session."""
    samples: int
    """Samples behind them."""
    seconds: float
    """Time from the first step to the last."""
    test: Outcome | None
    """Outcome on the test data; None without test data or after a stop."""
    stopped_by: int
    """Number of the signal that ended the run early; 0 if it ran to its end."""
    checkpoint: Path
    """The last checkpoint."""
    staleness: float = 0.0
    """Mean staleness of the pushes in this session."""
    advice: str = ""
    """What would make such a run faster, if the shards were the bottleneck."""
    warning: str = ""
    """What is wrong with the losses that the run ended with, if they make no sense (:mod:`dbmpi.monitor.verdict`)."""
    lost: tuple[int, ...] = ()
    """Replicas of Sandblaster that have died in this session."""
