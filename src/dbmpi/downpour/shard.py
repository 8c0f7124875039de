"""A shard's duties around its server: obey the lead, write its part of checkpoints, report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.checkpoint.saver import ShardSaver
from dbmpi.downpour.settlement import HeldReplicas
from dbmpi.machine.signals import StopSignal
from dbmpi.monitor.records import Recorder, ShardReport
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox, Message, MessageKind, Role, bits
from dbmpi.paramserver.bottleneck import moved_bytes
from dbmpi.paramserver.server import Server, Tally

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import MonitorSection

_LEAD_RANK = 0


@dataclass(frozen=True, kw_only=True)
class ShardRole:
    """The means of one shard."""

    comm: MPI.Intracomm
    """All ranks."""
    server: Server
    """Applies the pushes."""
    held: HeldReplicas
    """Holds back the pushes of single replicas."""
    saver: ShardSaver
    """Writes the shard's part of checkpoints."""
    recorder: Recorder
    """Writes the shard's reports."""
    stop: StopSignal
    """Collects the signals that end the run."""
    monitor: MonitorSection
    """When to report, and after which time a rank counts as stalled."""
    bandwidth: float
    """Bytes a second that this core reads and writes when it copies."""


class Shard:
    """The duties of one shard; :meth:`poll` is called repeatedly and never waits for a worker.

    Parameters
    ----------
    role
        The means of the shard.

    Attributes
    ----------
    ended
        Whether the lead has ended training.
    """

    def __init__(self, role: ShardRole) -> None:
        self._role = role
        self._comm, self._server = role.comm, role.server
        self._mailbox = Mailbox(role.comm, Role.SHARD)
        self._server.before_change = self._keep
        self._reported_stop = False
        self.ended = False
        self._pushes = 0
        self._busy = 0.0
        self._applying = self._reporting = 0.0
        self._reported = time.monotonic()

    def serve(self) -> None:
        """Poll until the lead ends the run: all that a rank does which is only a shard."""
        waiting.until(lambda: self.ended, self.awaited, serve=self.poll)

    def awaited(self) -> str:
        """Name what this shard waits for, in the message of an error."""
        return "the lead to end the run"

    def poll(self) -> bool:
        """Apply pushes, obey messages and report when it is time; return whether there was anything."""
        role, began = self._role, time.perf_counter()
        role.held.poll()
        moved = self._server.poll()
        while (message := self._mailbox.receive()) is not None:
            moved = moved or message.kind != MessageKind.BEAT
            self.hear(message)
        moved = role.saver.poll() or moved
        if role.stop.number and not self._reported_stop:
            self._reported_stop = True
            self._mailbox.send(_LEAD_RANK, Role.SHARD, MessageKind.STOP_ASKED, role.stop.number)
        if moved:
            self._busy += time.perf_counter() - began
        if time.monotonic() - self._reported >= role.monitor.report_seconds:
            self.report()
        return moved

    def hear(self, message: Message) -> None:
        """Obey the order of the lead in a `message`."""
        kind, held, values = message.kind, self._role.held, message.values
        if kind == MessageKind.END:
            self.ended = True
            self._mailbox.send(_LEAD_RANK, Role.SHARD, MessageKind.CLOSED, bits(self.applying))
        elif kind == MessageKind.CHECKPOINT:
            step, identity, last, *_ = values
            self._role.saver.begin(step, identity, self.vectors(), self.version, last=bool(last))
        elif kind == MessageKind.HOLD:
            replica, gone, *_ = values
            self._mailbox.send(_LEAD_RANK, Role.SHARD, MessageKind.HELD, replica, gone, *held.hold(replica))
        elif kind == MessageKind.SETTLE:
            replica, pushes, gone, *_ = values
            held.settle(replica, pushes, gone=bool(gone))
        elif kind == MessageKind.LET_GO:
            held.let_go(values[0])

    def _keep(self, start: int, stop: int) -> None:
        """Keep what a checkpoint needs of the elements that are about to change."""
        for name in ("parameters", *self._server.state):
            self._role.saver.keep(name, start, stop)

    def report(self) -> tuple[Tally, float]:
        """Write a report if there were pushes since the last one.

        Returns
        -------
        Tally
            Everything since the last report.
        float
            Seconds since then.
        """
        role, now = self._role, time.monotonic()
        tally = self._server.take_tally()
        interval, self._reported = now - self._reported, now
        busy, self._busy = self._busy, 0.0
        self._pushes += tally.pushes
        if tally.pushes:
            self._applying += tally.apply_seconds
            self._reporting += interval
            moved = moved_bytes(tally.applied_bytes, len(self._server.state))
            seconds = {
                "apply": tally.apply_seconds,
                "serve": max(busy - tally.apply_seconds, 0.0),
                "idle": max(interval - busy, 0.0),
            }
            role.recorder.write(
                ShardReport(
                    version=self._server.version,
                    pushes=self._pushes,
                    staleness=tally.staleness.summary(),
                    staleness_histogram=tally.staleness.counts,
                    queue=tally.deepest_queue,
                    seconds=seconds,
                    applied_bytes=tally.applied_bytes,
                    bandwidth=moved / max(tally.apply_seconds, 1e-9) / role.bandwidth,
                )
            )
        return tally, interval

    @property
    def version(self) -> int:
        """Count of pushes applied."""
        return self._server.version

    @property
    def applying(self) -> float:
        """Fraction of the time spent in the rule's kernel, over the intervals with pushes."""
        return self._applying / max(self._reporting, 1e-9)

    def vectors(self) -> dict[str, np.ndarray]:
        """Return this shard's range of each vector, by name: the parameters and the rule's state."""
        return {"parameters": self._server.parameters, **self._server.state}
