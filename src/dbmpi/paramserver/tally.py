"""What a shard counts of its work, and of the pushes of a client."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dbmpi.monitor.measures import StalenessHistogram
from dbmpi.objective import Outcome

if TYPE_CHECKING:
    from dbmpi.paramserver.protocol import Header


class PushProgress(NamedTuple):
    """How far the pushes of a client have come at a shard, as numbers of pushes."""

    whole: int
    """Posted completely."""
    begun: int
    """Of which something is posted."""
    touched: int
    """Of which something is applied."""


class Tally:
    """The work of a shard since the last :meth:`dbmpi.paramserver.server.Server.take_tally`."""

    def __init__(self) -> None:
        self.pushes = self.discarded = 0
        self.steps = self.samples = self.withheld = 0
        self.applied_bytes = 0
        self.apply_seconds = 0.0
        self.deepest_queue = 0
        self.staleness = StalenessHistogram()
        self.outcome = Outcome(0, 0.0, 0)

    def add(self, header: Header) -> None:
        """Count the steps and samples in the `header` of a report, and losses if they are behind a push that came."""
        self.steps, self.samples = self.steps + header.steps, self.samples + header.samples
        self.withheld += header.withheld
        if not header.withheld:
            self.outcome = self.outcome.plus(Outcome(header.samples, header.loss, header.correct))

    def merge(self, other: Tally) -> None:
        """Count the work in another tally, too.

        Parameters
        ----------
        other
            It stays as it is.
        """
        self.pushes, self.discarded = self.pushes + other.pushes, self.discarded + other.discarded
        self.steps, self.samples = self.steps + other.steps, self.samples + other.samples
        self.withheld += other.withheld
        self.applied_bytes += other.applied_bytes
        self.apply_seconds += other.apply_seconds
        self.deepest_queue = max(self.deepest_queue, other.deepest_queue)
        self.staleness.merge(other.staleness)
        self.outcome = self.outcome.plus(other.outcome)
