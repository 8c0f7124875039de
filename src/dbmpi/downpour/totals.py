"""What all replicas together have learned in a session, as the lead counts and shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbmpi.monitor.measures import Rate, StalenessHistogram
from dbmpi.monitor.verdict import Recent

if TYPE_CHECKING:
    from dbmpi.monitor.progress import RunProgress
    from dbmpi.paramserver.tally import Tally


class Totals:
    """The work of all replicas in this session, as far as shard 0 has applied it.

    Parameters
    ----------
    progress
        Shows it.
    earlier
        Samples of earlier sessions.
    recent
        Number of samples whose losses are kept.

    Attributes
    ----------
    steps, samples, withheld
        Steps that have been applied, withheld or dropped, the samples behind them, and the pushes that were withheld.
    discarded
        Stale pushes that shard 0 has dropped, and at the end those of the others.
    staleness
        Of all pushes that shard 0 has applied.
    recent
        The losses of the last samples learned from.
    """

    def __init__(self, progress: RunProgress, earlier: int, recent: int) -> None:
        self._progress, self._earlier = progress, earlier
        self._rate = Rate()
        self.steps = self.samples = self.withheld = self.discarded = 0
        self.staleness = StalenessHistogram()
        self.recent = Recent(recent)

    def add(self, tally: Tally, seconds: float) -> None:
        """Count and show the `tally` of the last `seconds` of shard 0."""
        outcome = tally.outcome
        self.steps += tally.steps
        self.samples += tally.samples
        if tally.withheld and not self.withheld:
            self._progress.warn("a replica withholds a push, because its gradient is not finite")
        self.withheld += tally.withheld
        self.discarded += tally.discarded
        self.recent.add(outcome)
        self.staleness.merge(tally.staleness)
        self._rate.add(tally.samples, seconds)
        if outcome.samples:
            self._progress.update(
                self._earlier + self.samples,
                outcome.mean_loss,
                outcome.accuracy,
                self._rate.per_second,
                tally.staleness.mean,
            )

    def leave_out(self, steps: int, samples: int) -> None:
        """Take back `steps` that do not count after all, and the `samples` behind them."""
        self.steps -= steps
        self.samples -= samples
