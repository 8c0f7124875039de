"""A shard's duties around its server: hear the lead, hand its vectors over for a checkpoint, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from dbmpi.monitor.records import Recorder, ShardReport
from dbmpi.paramserver.server import Server
from dbmpi.runtime import waiting
from dbmpi.runtime.orders import Kind, Mailbox, Role
from dbmpi.runtime.signals import StopSignal

if TYPE_CHECKING:
    from dbmpi.optim.lead import Lead

_DATA = 3
"""Tag of the vectors' pieces."""
_PIECE = 1 << 22
"""Elements of a vector that are sent at once."""
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
            if message.kind == Kind.END:
                self.ended = True
            elif message.kind == Kind.CHECKPOINT:
                self._hand_over()
            elif self._lead is not None:
                self._lead.hear(message)
        if self._stop.number and not self._stop_told:
            self._stop_told = True
            self._mailbox.send(_LEAD_RANK, Role.SHARD, Kind.STOP_ASKED, self._stop.number)
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
                )
            )

    @property
    def version(self) -> int:
        """Count of pushes applied."""
        return self._server.version

    def vectors(self) -> dict[str, np.ndarray]:
        """Return all vectors that this shard holds a range of, by name."""
        return {"parameters": self._server.parameters, **self._server.state}

    def _hand_over(self) -> None:
        """Send version and vectors to the lead, piece by piece."""
        version = np.array([self._server.version], np.int64)
        waiting.complete(self._comm.Isend(version, _LEAD_RANK, _DATA), "the lead to take a checkpoint")
        for vector in self.vectors().values():
            for start in range(0, vector.size, _PIECE):
                piece = vector[start : start + _PIECE]
                waiting.complete(self._comm.Isend(piece, _LEAD_RANK, _DATA), "the lead to take a checkpoint")


def collect(
    comm: MPI.Intracomm, rank: int, held: range, names: tuple[str, ...], dtype: np.dtype[np.floating]
) -> tuple[int, Iterator[tuple[str, int, np.ndarray]]]:
    """Receive what the shard on a rank hands over: its version, and the pieces of its vectors.

    Returns
    -------
    version
        The shard's version.
    pieces
        ``(vector, start, values)`` with the start in the whole flat vector; `values` is only valid until the next
        piece.
    """
    version = np.empty(1, np.int64)
    waiting.complete(comm.Irecv(version, rank, _DATA), f"the shard on rank {rank} to hand over its vectors")

    def pieces() -> Iterator[tuple[str, int, np.ndarray]]:
        buffer = np.empty(min(_PIECE, len(held)), dtype)
        for name in names:
            for start in range(held.start, held.stop, _PIECE):
                piece = buffer[: min(_PIECE, held.stop - start)]
                waiting.complete(comm.Irecv(piece, rank, _DATA), f"{name} of the shard on rank {rank}")
                yield name, start, piece

    return int(version[0]), pieces()
