"""A replica in virtual time: how far it has come, and what it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dbmpi.monitor.reports import WorkerReport
from dbmpi.objective import Outcome

if TYPE_CHECKING:
    import numpy as np

    from dbmpi.downpour.datapath import Push
    from dbmpi.simulation.versions import HeldVersion

_ACTIVITIES = ("compute", "fetch", "push", "wait", "data")


class VirtualReplica:
    """The state of one replica between two events.

    Parameters
    ----------
    number
        Of the replica.
    batches
        The numbers of the batches that it learns.
    slowness
        Factor of its times to compute.
    step
        Where its count of steps begins.

    Attributes
    ----------
    number, slowness, step
        As given; the step is that which goes on, or the next one.
    batch, next_batch
        Numbers of the last batch that it began, and of the next one; None if there is none.
    held, versions
        Of each shard the parameters that it has fetched last, while it needs them, and their versions.
    walk
        Its own parameters after local steps; None before the first one since its last fetch.
    gradient, steps, outcome, samples
        What it has accrued, of how many steps and samples; the samples of the step that goes on are counted, too.
    push
        What has become of all this, once that is known.
    pending
        Shards that have not taken the push under way.
    learned
        Batches whose pushes all shards have taken.
    withheld_in_a_row
        Its last pushes, as far as they were withheld.
    turn, in_turn
        Number of the last turn that it has asked for, and whether it has one.
    fetches
        Whether its next step fetches, whatever its number is.
    finishing
        Whether its last push is on its way.
    """

    def __init__(self, number: int, batches: Iterator[int], slowness: float = 1.0, step: int = 0) -> None:
        self.number, self.slowness, self.step = number, slowness, step
        self._batches = batches
        self.batch, self.next_batch = 0, next(batches, None)
        self.held: list[HeldVersion] = []
        self.versions: list[int] = []
        self.walk: np.ndarray | None = None
        self.gradient: np.ndarray | None = None
        self.steps, self.outcome, self.samples = 0, Outcome(0, 0.0, 0), 0
        self.push: Push | None = None
        self.pending = self.learned = self.withheld_in_a_row = self.turn = 0
        self.in_turn, self.fetches, self.finishing = False, True, False

    def draw(self) -> int:
        """Begin the next batch, and return its number."""
        assert self.next_batch is not None
        self.batch, self.next_batch = self.next_batch, next(self._batches, None)
        return self.batch


class VirtualLog:
    """What one replica reports, in virtual seconds.

    Attributes
    ----------
    steps, samples, withheld
        Gradients computed so far, samples behind them, and pushes withheld.
    seconds
        By activity, since the last report.
    waited, spent
        Seconds in fetches and pushes, and in all, up to the last report.
    """

    def __init__(self) -> None:
        self.steps = self.samples = self.withheld = 0
        self.seconds = dict.fromkeys(_ACTIVITIES, 0.0)
        self.waited = self.spent = 0.0
        self.since = 0.0
        """When something began that is not yet in the seconds: a push, or a wait."""
        self._recent, self._reported, self._told = Outcome(0, 0.0, 0), 0.0, 0
        self._pushed_bytes = self._fetched_bytes = self._chunks = self._pieces = 0

    def count(self, outcome: Outcome) -> None:
        """Count a gradient and its `outcome`, but not a loss that is not finite."""
        self.steps += 1
        self.samples += outcome.samples
        if outcome.are_numbers:
            self._recent = self._recent.plus(outcome)

    def fetched(self, nbytes: int, pieces: int) -> None:
        """Count a fetch of so many bytes, `nbytes`, in so many `pieces`."""
        self._fetched_bytes, self._pieces = self._fetched_bytes + nbytes, self._pieces + pieces

    def pushed(self, nbytes: int, chunks: int) -> None:
        """Count a push of so many bytes, `nbytes`, in so many `chunks`."""
        self._pushed_bytes, self._chunks = self._pushed_bytes + nbytes, self._chunks + chunks

    def due(self, now: float, every: float) -> bool:
        """Return whether it is time for a report `now`, if there is one every so many seconds."""
        return now - self._reported >= every

    def report(self, now: float, epoch: float, replica: int) -> WorkerReport | None:
        """Return the report of the time until `now`; None if there was no step since the last one.

        Parameters
        ----------
        now
            Virtual seconds.
        epoch
            Position in the stream, in passes through the training samples.
        replica
            Number of the replica.
        """
        if self.steps == self._told:
            return None
        self._told, recent, seconds = self.steps, self._recent, self.seconds
        self.seconds = dict.fromkeys(_ACTIVITIES, 0.0)
        self.waited += seconds["fetch"] + seconds["push"]
        self.spent += sum(seconds.values())
        report = WorkerReport(
            step=self.steps,
            epoch=epoch,
            samples=self.samples,
            loss=recent.mean_loss if recent.samples else math.nan,
            accuracy=recent.accuracy,
            samples_per_second=recent.samples / max(now - self._reported, 1e-9),
            pushed_bytes=self._pushed_bytes,
            fetched_bytes=self._fetched_bytes,
            seconds=seconds,
            replica=replica,
            pushed_chunks=self._chunks,
            fetched_pieces=self._pieces,
            withheld=self.withheld,
        )
        self._pushed_bytes = self._fetched_bytes = self._chunks = self._pieces = 0
        self._reported, self._recent = now, Outcome(0, 0.0, 0)
        return report
