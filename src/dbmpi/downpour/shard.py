"""A shard's duties around its server: hear the lead, hand its vectors over for a checkpoint, report."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.collect import hand_over
from dbmpi.machine.signals import StopSignal
from dbmpi.monitor.records import Recorder, ShardReport
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.paramserver.bottleneck import moved_bytes
from dbmpi.paramserver.server import Server

if TYPE_CHECKING:
    from dbmpi.downpour.lead import Lead

_LEAD_RANK = 0


class Shard:
    """The duties of one shard; :meth:`poll` is called again and again and never waits for a worker.

    Parameters
    ----------
    server
        Applies the pushes.
    held
        The range of the flat vector that this shard holds.
    lead
        On shard 0, what keeps the run's order; None elsewhere.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        server: Server,
        held: range,
        mailbox: Mailbox,
        recorder: Recorder,
        stop: StopSignal,
        report_seconds: float,
        bandwidth: float,
        lead: Lead | None,
    ) -> None:
        self._comm = comm
        self._server = server
        self._held = held
        self._mailbox = mailbox
        self._recorder = recorder
        self._stop = stop
        self._stop_told = False
        self._report_seconds = report_seconds
        self._lead = lead
        self.ended = False
        self._pushes = 0
        self._busy = 0.0
        self._bandwidth = bandwidth
        self._applying = self._reporting = 0.0
        self._reported = time.monotonic()

    def serve(self) -> None:
        """Do nothing else until the lead ends the run: the life of a rank that is only a shard."""
        awaited = "the lead to end the run" if self._lead is None else self._lead.awaited
        waiting.until(lambda: self.ended, awaited, serve=self.poll)

    def poll(self) -> bool:
        """Do what there is to do; return whether there was anything."""
        began = time.perf_counter()
        moved = self._server.poll()
        while (message := self._mailbox.receive()) is not None:
            moved = True
            if message.kind == MessageKind.END:
                self.ended = True
            elif message.kind == MessageKind.CHECKPOINT:
                hand_over(self._comm, self._server.version, self.vectors().values())
            elif self._lead is not None:
                self._lead.hear(message)
        if self._stop.number and not self._stop_told:
            self._stop_told = True
            self._mailbox.send(_LEAD_RANK, Role.SHARD, MessageKind.STOP_ASKED, self._stop.number)
        if moved:
            self._busy += time.perf_counter() - began
        if time.monotonic() - self._reported >= self._report_seconds:
            self.report()
        if self._lead is not None:
            moved |= self._lead.look(self)
        return moved

    def report(self) -> None:
        """Write what was done since the last report, if there was anything."""
        now = time.monotonic()
        tally = self._server.take_tally()
        interval, self._reported = now - self._reported, now
        busy, self._busy = self._busy, 0.0
        self._pushes += tally.pushes
        if self._lead is not None:
            self._lead.advance(tally, interval)
        if tally.pushes:
            self._applying += tally.apply_seconds
            self._reporting += interval
            moved = moved_bytes(tally.applied_bytes, len(self._server.state))
            seconds = {
                "apply": tally.apply_seconds,
                "serve": max(busy - tally.apply_seconds, 0.0),
                "idle": max(interval - busy, 0.0),
            }
            self._recorder.write(
                ShardReport(
                    version=self._server.version,
                    pushes=self._pushes,
                    staleness=tally.staleness.summary(),
                    staleness_histogram=tally.staleness.counts,
                    queue=tally.deepest_queue,
                    seconds=seconds,
                    applied_bytes=tally.applied_bytes,
                    bandwidth=moved / max(tally.apply_seconds, 1e-9) / self._bandwidth,
                )
            )

    @property
    def version(self) -> int:
        """Count of pushes applied."""
        return self._server.version

    @property
    def applying(self) -> float:
        """Share of the time in the rule's kernel, while pushes came."""
        return self._applying / max(self._reporting, 1e-9)

    def vectors(self) -> dict[str, np.ndarray]:
        """Return all vectors that this shard holds a range of, by name."""
        return {"parameters": self._server.parameters, **self._server.state}
