"""How a rank waits: it polls, serves other ranks, sleeps in between, and gives up in the end.

A rank that blocks inside MPI spins and takes a core from a rank that computes; and it cannot notice that a peer is
gone.  So nothing in dbmpi blocks: collectives are started and tested, flags are polled, and between two polls the
rank yields the core, then sleeps, each time a quarter longer up to `longest`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import Stalled, UserError
from dbmpi.mpi import pieces

if TYPE_CHECKING:
    from mpi4py import MPI


LONG_SECONDS = 86400.0
"""How long ranks wait for what depends on the size of the data: reading a large file takes as long as it does."""


_MOST_SECONDS = 1e9


def stall_seconds() -> float:
    """Return how long a wait may last in which nothing moves: 600 s, or the value of ``DBMPI_STALL_SECONDS``.

    Raises
    ------
    UserError
        If the variable holds no positive number.
    """
    text = os.environ.get("DBMPI_STALL_SECONDS", "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _MOST_SECONDS:
        raise UserError(f"DBMPI_STALL_SECONDS={text}: expected a number of seconds above 0 and at most 1e9, e.g. 600")
    return seconds


_in_every_wait: list[Callable[[], bool]] = []
STALL_SECONDS = stall_seconds()
"""A wait in which nothing moves for this long ends the run."""
_LONGEST_GAP = 1.0
"""Seconds that count between two polls, at most."""
_YIELDING = 1e-4
"""Seconds for which a wait only yields."""


class Backoff:
    """Yields for a tenth of a millisecond, then sleeps that grow by a quarter from `shortest` to `longest` seconds.

    A sleep is then about a fifth of the time since something happened: an event after T seconds is noticed T / 5 late
    at most.  (Several in a row matter where an MPI needs the rank's help for every step of a transfer.)  With the
    longest sleep of one millisecond, an idle rank polls about 900 times a second, which costs some 1 to 2 % of a core.

    At first it only yields, as even a sleep of no length takes Linux some 70 us: partitions of a model wait for each
    other dozens of times in a step, mostly for less than that.  Once only, as a thread that does so leaves others of
    its process little of Python's time.
    """

    def __init__(self, shortest: float = 20e-6, longest: float = 1e-3) -> None:
        self._shortest = shortest
        self._longest = longest
        self._next = 0.0
        self._yields_until = time.monotonic() + _YIELDING

    def reset(self) -> None:
        """Make the next sleep the shortest one: something happened."""
        self._next = 0.0

    def sleep(self) -> None:
        """Yield the core, and sleep a quarter longer than the last time."""
        if self._yields_until and time.monotonic() < self._yields_until:
            os.sched_yield()
            return
        self._yields_until = 0.0
        time.sleep(self._next)
        self._next = min(max(1.25 * self._next, self._shortest), self._longest)


@contextmanager
def serving(serve: Callable[[], bool]) -> Iterator[None]:
    """Call `serve` in every wait of this process, whatever it waits for; it returns whether something is under way.

    For requests that may come from others at any time, so that two ranks that wait for each other's answers proceed.
    While something is under way this rank does not sleep, but that is no sign of life.  `serve` must not wait.
    """
    _in_every_wait.append(serve)
    try:
        yield
    finally:
        _in_every_wait.remove(serve)


def until(
    condition: Callable[[], bool],
    what: str | Callable[[], str],
    *,
    serve: Callable[[], bool] | None = None,
    seconds: float | None = None,
    longest_sleep: float = 1e-3,
) -> None:
    """Wait until `condition()` holds.

    Parameters
    ----------
    condition
        Called again and again; must not block.
    what
        What is waited for, for the message if it never comes; a function is called only then.
    serve
        Called between two polls; returns whether it did something, which also counts as a sign of life.
    seconds
        Give up after this long without a sign of life; by default ``STALL_SECONDS``.
    longest_sleep
        Upper limit of the sleeps, in seconds.

    Raises
    ------
    Stalled
        If nothing moved for `seconds`.
    """
    limit = STALL_SECONDS if seconds is None else seconds
    backoff = Backoff(longest=longest_sleep)
    waited, polled = 0.0, time.monotonic()
    while not condition():
        for others in _in_every_wait:
            if others():
                backoff.reset()
        now = time.monotonic()
        # A process that was suspended, perhaps with the whole job, has not waited all that time.
        waited, polled = waited + min(now - polled, _LONGEST_GAP), now
        if serve is not None and serve():
            waited = 0.0
            backoff.reset()
        elif waited > limit:
            awaited = what if isinstance(what, str) else what()
            raise Stalled(f"stalled: nothing moved for {limit:g} s while waiting for {awaited}")
        else:
            backoff.sleep()


def complete(
    request: pieces.Operation, what: str, *, serve: Callable[[], bool] | None = None, seconds: float | None = None
) -> None:
    """Wait for a non-blocking operation by testing it.

    Parameters
    ----------
    request
        The operation.
    what
        What is waited for, for the message if it never comes.
    serve, seconds
        As for `until`.
    """
    until(request.Test, what, serve=serve, seconds=seconds)


def barrier(comm: MPI.Comm, what: str, *, serve: Callable[[], bool] | None = None) -> None:
    """Wait until every rank of `comm` has arrived; `what` and `serve` are as for `until`."""
    complete(comm.Ibarrier(), what, serve=serve)


def allreduce(
    comm: MPI.Comm,
    values: np.ndarray,
    operation: MPI.Op,
    what: str,
    *,
    serve: Callable[[], bool] | None = None,
    seconds: float | None = None,
) -> np.ndarray:
    """Return an array reduced over all ranks; a new one of the same shape and dtype.

    Parameters
    ----------
    comm
        The ranks.
    values
        This rank's; contiguous.
    operation
        How elements are combined.
    what
        What is waited for, for the message if it never comes.
    serve, seconds
        As for `until`.
    """
    result = np.empty_like(values)
    complete(pieces.iallreduce(comm, values, result, operation), what, serve=serve, seconds=seconds)
    return result


def broadcast(comm: MPI.Comm, values: np.ndarray, root: int, what: str) -> None:
    """Fill an array on every rank with the root's.

    Parameters
    ----------
    comm
        The ranks.
    values
        Contiguous, of the same size and dtype on all ranks.
    root
        The rank whose values they are.
    what
        What is waited for, for the message if it never comes.
    """
    complete(pieces.ibcast(comm, values, root), what)


def broadcast_text(comm: MPI.Comm, text: str, root: int, what: str) -> str:
    """Return the root's text on every rank.

    Parameters
    ----------
    comm
        The ranks.
    text
        Of this rank; only the root's counts.
    root
        The rank whose text it is.
    what
        What is waited for, for the message if it never comes.
    """
    data = np.frombuffer(text.encode(), np.uint8).copy()
    length = np.array([data.size], np.int64)
    broadcast(comm, length, root, what)
    if comm.rank != root:
        data = np.empty(int(length[0]), np.uint8)
    broadcast(comm, data, root, what)
    return data.tobytes().decode()
