"""What the lead knows of one replica."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbmpi.paramserver.protocol import Header

_RECENT = 256
"""Reports that are kept one by one: a client never has as many pushes that are not applied everywhere."""


class ReplicaState(Enum):
    """What a replica does."""

    RUNNING = auto()
    PAUSED = auto()
    FINISHED = auto()
    """It has learned its share, and waits for more or for the end."""
    LOST = auto()
    """It is given up."""


class Reports:
    """The steps and samples behind the pushes of one replica, in this session.

    Attributes
    ----------
    steps, samples
        Of all reports so far.
    usual
        Seconds that a step takes; 0 where that is not known.
    """

    __slots__ = ("_recent", "_since", "samples", "steps", "usual")

    def __init__(self) -> None:
        self.steps = self.samples = 0
        self.usual = 0.0
        self._recent = [(0, 0, 0)]
        self._since = 0.0

    def add(self, header: Header) -> None:
        """Count a push by the `header` of its report."""
        now = time.monotonic()
        if self._since:
            seconds = (now - self._since) / max(header.steps, 1)
            # A single long one counts little: the replica may have been halted.
            self.usual = 0.9 * self.usual + 0.1 * min(seconds, 4 * self.usual) if self.usual else seconds
        self._since = now
        self.steps, self.samples = self.steps + header.steps, self.samples + header.samples
        self._recent.append((self._recent[-1][0] + 1, self.steps, self.samples))
        if len(self._recent) > 2 * _RECENT:
            del self._recent[:_RECENT]

    def until(self, pushes: int) -> tuple[int, int]:
        """Return the steps and samples behind the first `pushes`, which are among the last ones."""
        return next((steps, samples) for number, steps, samples in self._recent if number == pushes)


@dataclass(slots=True)
class Standing:
    """How one replica stands."""

    state: ReplicaState = ReplicaState.RUNNING
    learned: int = 0
    """Batches whose pushes are applied everywhere, as of its last pause, or when they were settled."""
    samples: int = 0
    """Samples of these batches."""
    drawn: int = 0
    """Batches that it had begun when it last paused."""
    reports: Reports = field(default_factory=Reports)
    pause: int = 0
    """Number of the pause that it has been asked for; 0 for none."""
    asked: float = 0.0
    """When it was asked to pause."""
    waited: float = 0.0
    """Seconds that its first partition has waited for the shards."""
    spent: float = 0.0
    """Seconds that it has spent in all."""
    held: bool = False
    """Whether a checkpoint is written without its help, while the shards hold back what it pushes."""

    @property
    def awaited(self) -> bool:
        """Whether a checkpoint waits for it."""
        return self.state == ReplicaState.RUNNING and not self.held
