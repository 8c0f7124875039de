"""MPI's blocking operations, so that none waits for ever for a rank that does not arrive.

Communicators are duplicated and split, and windows opened and closed, by operations that block and that nothing polls.
The ranks meet first, in a wait that ends; and where one of them halts between that and the operation, a watchdog
reports what is waited for, and ends the job.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from dbmpi.errors import KnownToAll, Stalled
from dbmpi.mpi import waiting

if TYPE_CHECKING:
    from mpi4py import MPI

_COMPILING_SECONDS = 3600.0


@dataclass
class _Blocked:
    """An operation that blocks."""

    what: str
    """What it waits for."""
    seconds: float
    """Its own limit."""
    failure: Exception | None
    """What has then happened, if that is known."""
    waited: float = 0.0
    """For how many seconds it has waited."""


_blocked: dict[int, _Blocked] = {}
"""Each operation that blocks now, by number."""
_numbers = itertools.count()
_starting = threading.Lock()
_watchdog: threading.Thread | None = None
_process = 0
"""The process in which the watchdog runs: a fork has none."""
os.register_at_fork(after_in_child=_blocked.clear)  # nor does it wait for anything


def duplicate(comm: MPI.Intracomm, what: str) -> MPI.Intracomm:
    """Return a duplicate of `comm` (collective); `what` names what is waited for, if a rank does not arrive."""
    with meeting(comm, what):
        return comm.Dup()


def split(comm: MPI.Intracomm, color: int, key: int, what: str) -> MPI.Intracomm:
    """Return the communicator of all ranks of the same color, in the order of their keys (collective).

    Parameters
    ----------
    comm
        The ranks to divide.
    color
        Of the group that this rank joins; ``MPI.UNDEFINED`` for none, which gives ``MPI.COMM_NULL``.
    key
        Of this rank; equal ones keep the order of `comm`.
    what
        What is waited for, if a rank does not arrive.
    """
    with meeting(comm, what):
        return cast("MPI.Intracomm", comm.Split(color, key))


def on_this_host(comm: MPI.Intracomm, what: str) -> MPI.Intracomm:
    """Return the communicator of the ranks of `comm` that can share memory with this one, in order (collective).

    `what` names what is waited for, if a rank does not arrive.
    """
    from mpi4py import MPI

    with meeting(comm, what):
        return cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank))


def first_on_each_node(comm: MPI.Intracomm, use_kernels: Callable[[], object]) -> None:
    """Call `use_kernels`, which compiles, on one rank of each node, then on the others, which find its cache filled.

    Collective over `comm`.  The others wait for an hour at most.
    """
    node = on_this_host(comm, "the other ranks to compile the kernels")
    for turn in (True, False):
        if (node.rank == 0) == turn:
            use_kernels()
        waiting.complete(node.Ibarrier(), "the kernels to be compiled", seconds=_COMPILING_SECONDS)
    free(node)


def free(comm: MPI.Comm) -> None:
    """Free `comm` (collective); no MPI seen so far waits for the others in this, but one may."""
    with blocking("the other ranks to give back a communicator"):
        comm.Free()


class Collective(ABC):
    """A context manager whose resources all ranks free together.

    Where an exception of one rank alone ends the block, nothing is freed: that would wait for the others, which
    do not know of it, and the job is about to end.
    """

    @abstractmethod
    def free(self) -> None:
        """Free everything (collective); a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KnownToAll):
            from dbmpi.mpi import failures

            with failures.survived():  # of a death meanwhile: then the process that ends gives everything back
                self.free()


@contextmanager
def meeting(comm: MPI.Comm, what: str) -> Iterator[None]:
    """Wait until all ranks of `comm` have arrived, and watch over the operations in the block.

    Raises
    ------
    Stalled
        If one does not arrive within the stall limit; the message says that `what` was waited for.
    """
    waiting.barrier(comm, what)
    with blocking(what):
        yield


@contextmanager
def blocking(what: str, *, seconds: float = math.inf, failure: Exception | None = None) -> Iterator[None]:
    """End the job, reporting that `what` is waited for, if the block takes longer than the stall limit.

    It costs a microsecond, so that an operation in a loop may be watched over, too.

    Parameters
    ----------
    what
        What is waited for.
    seconds
        Another limit, if it is less.
    failure
        The error by which the job then ends, in place of that report.
    """
    _watch()
    number = next(_numbers)
    _blocked[number] = _Blocked(what, seconds, failure)
    try:
        yield
    finally:
        _blocked.pop(number, None)


def _watch() -> None:
    """Start the watchdog if it does not run."""
    global _watchdog, _process
    if _watchdog is not None and _process == os.getpid():
        return
    with _starting:
        if _watchdog is None or _process != os.getpid():
            _watchdog, _process = threading.Thread(target=_poll, name="dbmpi-watchdog", daemon=True), os.getpid()
            _watchdog.start()


def _poll() -> None:
    while True:
        # Counted in steps: a process that was suspended, perhaps with the whole job, has not waited all that time.
        step = min(1.0, waiting.STALL_SECONDS / 8)
        time.sleep(step)
        for one in tuple(_blocked.values()):
            one.waited += step
            if one.waited > min(waiting.STALL_SECONDS, one.seconds):
                from dbmpi.mpi.world import abort_from_thread

                seconds = f"{waiting.STALL_SECONDS:g} s"
                stalled = Stalled(f"stalled: blocked for {seconds} while waiting for {one.what}")
                abort_from_thread(one.failure or stalled)
