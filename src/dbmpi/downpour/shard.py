"""A shard's duties around its server: obey the lead, write its part of checkpoints, report."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.checkpoint.saver import ShardSaver
from dbmpi.downpour.mirrors import Mirrors
from dbmpi.downpour.settlement import HeldReplicas
from dbmpi.errors import RunFailed
from dbmpi.monitor.records import Recorder
from dbmpi.monitor.reports import ShardReport
from dbmpi.monitor.tracer import Tracer
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox, Message, MessageKind, Role, bits
from dbmpi.paramserver.bottleneck import moved_bytes
from dbmpi.paramserver.server import Server
from dbmpi.paramserver.tally import Tally

if TYPE_CHECKING:
    from dbmpi.session import Session

_LEAD_RANK = 0


@dataclass(frozen=True, kw_only=True)
class ShardRole:
    """The means of one shard."""

    server: Server
    """Applies the pushes."""
    held: HeldReplicas
    """Holds back the pushes of single replicas."""
    saver: ShardSaver
    """Writes the shard's part of checkpoints."""
    mirrors: Mirrors | None
    """Sends what the shard holds to another one, and holds what others send."""
    recorder: Recorder
    """Writes the shard's reports."""
    bandwidth: float
    """Bytes a second that this core reads and writes when it copies."""


class Shard:
    """The duties of one shard; :meth:`poll` is called repeatedly and never waits for a worker.

    Parameters
    ----------
    session
        Everything that is known of the run.
    role
        The means of the shard.

    Attributes
    ----------
    ended
        Whether the lead has ended training.
    """

    def __init__(self, session: Session, role: ShardRole) -> None:
        self._session, self._role, self._server = session, role, role.server
        self._monitor, self._stop = session.run.monitor, session.stop
        self._mailbox = Mailbox(session.comms.world, Role.SHARD)
        self._server.before_change = self._keep
        self._reported_stop = self._dismissed = False
        self._stands_in: dict[int, ShardSaver] = {}
        """For shards that have died and whose mirrors are here, what writes their parts of checkpoints."""
        self.ended = False
        self._pushes = self._discarded = 0
        self._busy = 0.0
        self._applying = self._reporting = 0.0
        self._reported = time.monotonic()
        self._tracer = Tracer(role.recorder, self._monitor.report_seconds, self._monitor.timeline_seconds)

    def serve(self) -> None:
        """Poll until the lead ends the run: all that a rank does which is only a shard."""
        waiting.until(lambda: self.ended, self.awaited, serve=self.poll)
        self._tracer.close()

    def awaited(self) -> str:
        """Name what this shard waits for, in the message of an error."""
        return "the lead to end the run"

    def poll(self) -> bool:
        """Apply pushes, obey messages and report when it is time; return whether there was anything."""
        role, began = self._role, time.perf_counter()
        role.held.poll()
        for replica in role.held.take_ended():
            self._mailbox.send(_LEAD_RANK, Role.SHARD, MessageKind.SETTLED, replica)
        moved = self._server.poll()
        while (message := self._mailbox.receive()) is not None:
            moved = moved or message.kind != MessageKind.BEAT
            self.hear(message)
        moved = role.saver.poll() or moved
        for saver in self._stands_in.values():
            moved = saver.poll() or moved
        if role.mirrors is not None:
            moved = role.mirrors.poll() or moved
        if self._dismissed and not self.ended and (role.mirrors is None or role.mirrors.closed):
            self._leave()
        if self._stop.number and not self._reported_stop:
            self._reported_stop = True
            self._mailbox.send(_LEAD_RANK, Role.SHARD, MessageKind.STOP_ASKED, self._stop.number)
        if moved:
            ended = time.perf_counter()
            self._busy += ended - began
            if self._tracer.open:
                self._tracer.add("serve", began, ended)
            self._server.on_apply = self._tracer.add if self._tracer.step() else None
        if time.monotonic() - self._reported >= self._monitor.report_seconds:
            self.report()
        return moved

    def hear(self, message: Message) -> None:
        """Obey the order of the lead in a `message`."""
        kind, held, values = message.kind, self._role.held, message.values
        if kind == MessageKind.END:
            self._dismissed = True
            if self._role.mirrors is not None:
                self._role.mirrors.end()
        elif kind == MessageKind.CHECKPOINT:
            step, identity, last, *_ = values
            self.take_vectors(step, identity, last=bool(last))
        elif kind == MessageKind.RESCUE:
            self.stand_in(values[0])
        elif kind == MessageKind.HOLD:
            replica, gone, *_ = values
            self._mailbox.send(_LEAD_RANK, Role.SHARD, MessageKind.HELD, replica, gone, *held.hold(replica))
        elif kind == MessageKind.SETTLE:
            replica, pushes, gone, forgone, *_ = values
            held.settle(replica, pushes, gone=bool(gone), forgone=forgone)
        elif kind == MessageKind.LET_GO:
            held.let_go(values[0])

    def take_vectors(self, step: int, identity: int, *, last: bool) -> None:
        """Begin this shard's part of a checkpoint, and those of the dead ones whose mirrors are here.

        Parameters
        ----------
        step, identity, last
            As for :meth:`dbmpi.checkpoint.saver.ShardSaver.begin`.
        """
        self._role.saver.begin(step, identity, self.vectors(), self.version, last=last)
        for shard, saver in self._stands_in.items():
            assert self._role.mirrors is not None
            mirror = self._role.mirrors.mirror(shard)
            if mirror is None:
                saver.fail(identity, f"shard {shard} has died before its first mirror was whole")
            else:
                saver.begin(step, identity, mirror.vectors, mirror.version, last=True)

    def stand_in(self, dead: int) -> None:
        """Abandon the checkpoint in the making, and get ready for one without the shard of the number `dead`."""
        saver, mirrors = self._role.saver, self._role.mirrors
        assert mirrors is not None
        saver.close()
        mirrors.abandon()
        if mirrors.holds(dead):
            self._stands_in[dead] = saver.instead_of(dead)

    def rescue(self) -> None:
        """Take part in what the lead does because a shard has died."""
        if self._role.mirrors is not None:
            self._role.mirrors.abandon()
        try:
            with suppress(RunFailed):
                watch = self._session.watch
                waiting.until(lambda: self.ended or _LEAD_RANK in watch.dead, self.awaited, serve=self.poll)
        finally:
            for saver in self._stands_in.values():
                saver.close()

    def _leave(self) -> None:
        """Tell the lead that nothing is left to do."""
        self.ended = True
        self._mailbox.send(_LEAD_RANK, Role.SHARD, MessageKind.CLOSED, bits(self.applying), self.discarded)

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
        self._discarded += tally.discarded
        if tally.pushes or tally.discarded:
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
                    discarded=self._discarded,
                    bandwidth=moved / max(tally.apply_seconds, 1e-9) / role.bandwidth,
                )
            )
        return tally, interval

    @property
    def version(self) -> int:
        """Count of pushes applied."""
        return self._server.version

    @property
    def discarded(self) -> int:
        """Pushes dropped in this session, because they were too stale or too late."""
        return self._discarded + self._server.tally.discarded

    @property
    def applying(self) -> float:
        """Fraction of the time spent in the rule's kernel, over the intervals with pushes."""
        return self._applying / max(self._reporting, 1e-9)

    def vectors(self) -> dict[str, np.ndarray]:
        """Return this shard's range of each vector, by name: the parameters and the rule's state."""
        return {"parameters": self._server.parameters, **self._server.state}
