"""The heartbeat of one rank: it tells the lead that it makes progress, and writes where it is when it makes none."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role

if TYPE_CHECKING:
    from dbmpi.monitor.worker_log import WorkerLog
    from dbmpi.session import Session

_STDERR = 2


class Heartbeat:
    """Beats in every wait of a rank, and before each step; a thread of its own notices when it does not.

    A context manager: the thread ends with the block.  It counts in short sleeps, so that a process which was suspended
    has not been idle all that time.

    Parameters
    ----------
    seconds
        Without a beat for so long, the stack trace of the rank is written, once until it beats again.
    send
        Tells the lead that this rank beats; called a few times in `seconds`.
    name
        Of the rank, with its role.
    where
        Returns the step and the phase that it is in.
    """

    def __init__(self, seconds: float, send: Callable[[], None], name: str, where: Callable[[], str]) -> None:
        self._seconds, self._send, self._name, self._where = seconds, send, name, where
        self._owner = threading.get_ident()
        self._beaten = True
        self._next = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dbmpi-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self) -> bool:
        """Show that this rank makes progress, if its own thread calls; return False, as that is no sign of data."""
        if threading.get_ident() == self._owner:
            self._beaten = True
            now = time.monotonic()
            if now >= self._next:
                self._next = now + self._seconds / 16
                self._send()
        return False

    def _watch(self) -> None:
        step = min(1.0, self._seconds / 8)
        idle = 0.0
        while not self._ended.wait(step):
            before, idle = idle, 0.0 if self._beaten else idle + step
            self._beaten = False
            if before < self._seconds <= idle:
                since = f"has made no progress for {self._seconds:g} s"
                os.write(_STDERR, f"dbmpi: {self._name} {since}, {self._where()}; it is here:\n".encode())
                faulthandler.dump_traceback(_STDERR)


@contextmanager
def beating(session: Session, log: WorkerLog | None) -> Iterator[Callable[[], bool]]:
    """Let this rank show in the block that it makes progress; yield what to call before each step of a worker.

    Parameters
    ----------
    session
        Says how long it may make none.
    log
        Of the worker on this rank, if it is one.
    """
    comm, seconds = session.comms.world, session.run.monitor.stall_timeout
    if not seconds:
        yield bool  # which is False
        return
    mailbox = Mailbox(comm, Role.WORKER)
    roles = [] if session.comms.shard is None else [f"shard {session.comms.shard}"]
    if session.comms.worker is not None:
        replica, partition = divmod(session.comms.worker, session.plan.partitions)
        roles.append(f"partition {partition} of {session.plan.name(replica)}")

    def send() -> None:
        mailbox.send(session.plan.shard_ranks[0], Role.SHARD, MessageKind.BEAT)

    def where() -> str:
        if log is None:
            return "serving"
        return f"in step {log.steps + 1} ({log.stopwatch.activity or 'between two phases'})"

    heartbeat = Heartbeat(seconds, send, f"rank {comm.rank} ({', '.join(roles)})", where)
    with heartbeat, waiting.serving(heartbeat.beat):
        yield heartbeat.beat
