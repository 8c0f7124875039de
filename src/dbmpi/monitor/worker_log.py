"""The log of one worker: how its time passes, and what it learns, from one report in the records to the next."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from dbmpi.monitor.measures import LayerTimes, Stopwatch, set_exchange_apart
from dbmpi.monitor.records import Recorder
from dbmpi.monitor.reports import WorkerReport
from dbmpi.monitor.tracer import Tracer
from dbmpi.objective import Outcome

_ACTIVITIES = ("compute", "fetch", "push", "wait", "data")


class WorkerLog:
    """Counts steps and times, and writes reports.

    Parameters
    ----------
    recorder
        Takes the reports.
    every
        Seconds between two reports.
    replica, partition
        Which worker this is.
    partitions
        Of the replica.
    traced
        Length of the windows in which single phases are recorded, in seconds; 0 for none.

    Attributes
    ----------
    stopwatch
        For the activities `compute`, `fetch`, `push`, `wait` and `data`.
    steps
        Taken so far.
    withheld
        Pushes withheld so far.
    waited, spent
        Seconds in fetches and pushes, and in all, up to the last report.
    """

    def __init__(
        self, recorder: Recorder, every: float, *, replica: int, partition: int, partitions: int, traced: float
    ) -> None:
        self._recorder, self._every = recorder, every
        self._replica, self._partition, self._cut = replica, partition, partitions > 1
        self._layer_times = LayerTimes()
        self._samples, self._recent = 0, Outcome(0, 0.0, 0)
        self._reported, self._moved = time.monotonic(), (0, 0, 0, 0)
        self.stopwatch = Stopwatch()
        self._tracer = Tracer(recorder, every, traced)
        self.steps = self.withheld = self._told = 0
        self.waited = self.spent = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for a report."""
        return time.monotonic() - self._reported >= self._every

    def count(self, outcome: Outcome) -> None:
        """Count a step and its outcome, but not a loss that is not finite."""
        self.steps += 1
        self._samples += outcome.samples
        if outcome.are_numbers:
            self._recent = self._recent.plus(outcome)
        self.stopwatch.on_phase = self._tracer.add if self._tracer.step() else None

    def end_trace(self) -> None:
        """Record the phases up to now; to be called at the end."""
        self.stopwatch.on_phase = None
        self._tracer.close()

    def report(
        self, epoch: float, moved: tuple[int, int, int, int], layer_seconds: Mapping[str, Sequence[float]]
    ) -> None:
        """Write a report; if there was no step since the last one, leave the times to the next.

        Parameters
        ----------
        epoch
            Position in the stream, in passes through the training samples.
        moved
            Bytes pushed and fetched so far, and in how many pieces.
        layer_seconds
            Seconds so far by phase, for each layer.
        """
        now, recent = time.monotonic(), self._recent
        if self.steps == self._told:
            return
        self._told = self.steps
        pushed_bytes, fetched_bytes, chunks, pieces = map(int.__sub__, moved, self._moved)
        layers, seconds = self._layer_times.take(layer_seconds), self.stopwatch.take(_ACTIVITIES)
        self.waited += seconds["fetch"] + seconds["push"]
        self.spent += sum(seconds.values())
        if self._cut:
            set_exchange_apart(seconds, layers)  # that of evaluations, too, which count as waiting
        self._recorder.write(
            WorkerReport(
                step=self.steps,
                epoch=epoch,
                samples=self._samples,
                loss=recent.mean_loss if recent.samples else math.nan,
                accuracy=recent.accuracy,
                samples_per_second=recent.samples / max(now - self._reported, 1e-9),
                pushed_bytes=pushed_bytes,
                fetched_bytes=fetched_bytes,
                seconds=seconds,
                layers=layers,
                replica=self._replica,
                partition=self._partition,
                pushed_chunks=chunks,
                fetched_pieces=pieces,
                withheld=self.withheld,
            )
        )
        self._reported, self._recent, self._moved = now, Outcome(0, 0.0, 0), moved
