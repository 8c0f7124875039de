"""How a rank waits: it polls, serves whoever it must serve meanwhile, naps, and gives up in the end.

A rank that blocks inside MPI spins and takes a core from a rank that computes; and it cannot notice that a peer is
gone.  So nothing in dbmpi blocks: collectives are started and tested, flags are looked at, and between two looks the
rank naps, each time twice as long up to `longest`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import RunFailed

if TYPE_CHECKING:
    from mpi4py import MPI

STALL_SECONDS = float(os.environ.get("DBMPI_STALL_SECONDS", "600"))
"""A wait in which nothing moves for this long ends the run; ``DBMPI_STALL_SECONDS`` changes it."""


class Backoff:
    """Naps that double from `shortest` to `longest` seconds until :meth:`reset`.

    With the longest nap of one millisecond, an idle rank looks about 900 times a second, which costs some 1 to 2 % of
    a core.
    """

    def __init__(self, shortest: float = 20e-6, longest: float = 1e-3) -> None:
        self._shortest = shortest
        self._longest = longest
        self._next = 0.0

    def reset(self) -> None:
        """Make the next nap the shortest one: something happened."""
        self._next = 0.0

    def nap(self) -> None:
        """Yield the core, and nap twice as long as the last time."""
        time.sleep(self._next)
        self._next = min(max(2 * self._next, self._shortest), self._longest)


def until(
    condition: Callable[[], bool],
    what: str,
    *,
    serve: Callable[[], bool] | None = None,
    seconds: float | None = None,
    longest_nap: float = 1e-3,
) -> None:
    """Wait until `condition()` holds.

    Parameters
    ----------
    condition
        Asked again and again; must not block.
    what
        What is waited for, for the message if it never comes.
    serve
        Called between two looks; returns whether it did something, which also counts as a sign of life.
    seconds
        Give up after this long without a sign of life; by default ``STALL_SECONDS``.
    longest_nap
        Upper limit of the naps, in seconds.

    Raises
    ------
    RunFailed
        If nothing moved for `seconds`.
    """
    limit = STALL_SECONDS if seconds is None else seconds
    backoff = Backoff(longest=longest_nap)
    since = time.monotonic()
    while not condition():
        if serve is not None and serve():
            since = time.monotonic()
            backoff.reset()
        elif time.monotonic() - since > limit:
            raise RunFailed(f"stalled: nothing moved for {limit:.0f} s while waiting for {what}")
        else:
            backoff.nap()


def complete(request: MPI.Request, what: str, *, serve: Callable[[], bool] | None = None) -> None:
    """Wait for a non-blocking operation by testing it."""
    until(request.Test, what, serve=serve)


def barrier(comm: MPI.Comm, what: str, *, serve: Callable[[], bool] | None = None) -> None:
    """Wait until every rank of `comm` has come here."""
    complete(comm.Ibarrier(), what, serve=serve)


def allreduce(
    comm: MPI.Comm, values: np.ndarray, operation: MPI.Op, what: str, *, serve: Callable[[], bool] | None = None
) -> np.ndarray:
    """Return `values` reduced over all ranks of `comm`; a new array of the same shape and dtype."""
    result = np.empty_like(values)
    complete(comm.Iallreduce(values, result, operation), what, serve=serve)
    return result


def broadcast(comm: MPI.Comm, values: np.ndarray, root: int, what: str) -> None:
    """Fill `values` on every rank of `comm` with those of `root`."""
    complete(comm.Ibcast(values, root), what)


def broadcast_text(comm: MPI.Comm, text: str, root: int, what: str) -> str:
    """Return the text of `root` on every rank of `comm`."""
    data = np.frombuffer(text.encode(), np.uint8).copy()
    length = np.array([data.size], np.int64)
    broadcast(comm, length, root, what)
    if comm.rank != root:
        data = np.empty(int(length[0]), np.uint8)
    broadcast(comm, data, root, what)
    return data.tobytes().decode()
