"""How a Downpour client's loop comes by its parameters and gets rid of its gradients: in turn, or all at once.

The paper (section 4.1) lets a client fetch, push and compute in three threads that are only weakly synchronised.  Both
paths have the form that algorithm 1.1 needs; `Blocking` does one after the other, as it is written there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from dbmpi.downpour.room import Room
from dbmpi.kernels import updates
from dbmpi.mpi import waiting
from dbmpi.objective import Gradient, Outcome
from dbmpi.paramserver.client import Client, Mark


class DataPath(Protocol):
    """Parameters and gradients of one client.

    Attributes
    ----------
    parameters
        What the next gradient is computed from; another array after `fetch` or `look`.
    gradient
        Where the next gradient goes; another array after `push`.
    on_gradient
        To be called in a step that ends in a push, with the number of each layer whose gradient is complete; or None.
    """

    parameters: np.ndarray
    gradient: Gradient
    on_gradient: Callable[[int], None] | None

    @property
    def add(self) -> bool:
        """Whether the next gradient is to be added to what is there, the gradients of earlier steps."""
        ...

    def fetch(self) -> None:
        """Get parameters from the shards, where the algorithm says so."""
        ...

    def look(self) -> None:
        """Take what has arrived between two steps, without waiting."""
        ...

    def begin(self) -> None:
        """Wait until the next gradient has a place to go to."""
        ...

    def accrue(self, pushing: bool) -> None:
        """Count the gradient among those of earlier steps; `pushing` in a step that ends in a push."""
        ...

    def push(self, outcome: Outcome, steps: int) -> None:
        """Give what was accrued in so many steps to the shards."""
        ...

    def close(self) -> None:
        """Wait until all is pushed and applied, and nothing is on the way."""
        ...


class Blocking:
    """One after the other: a fetch waits for the own pushes, and computing waits for the fetch.

    With one client this is plain serial learning, bit for bit.

    Parameters
    ----------
    apart
        Whether the gradient of each step is needed by itself before it is accrued.
    """

    on_gradient: Callable[[int], None] | None = None

    def __init__(self, client: Client, size: int, dtype: np.dtype[np.floating], *, apart: bool = False) -> None:
        self._client = client
        self.parameters = np.zeros(size, dtype) if client.parameters is None else client.parameters
        # What is pushed lies where shards on this host can read it.
        self._accrued = client.gradients[0] if client.gradients else np.zeros(size, dtype)
        self.gradient: Gradient = np.zeros(size, dtype) if apart else self._accrued
        self._steps = 0

    @property
    def add(self) -> bool:
        """Whether the next gradient is to be added to those of earlier steps."""
        return self.gradient is self._accrued and self._steps > 0

    def fetch(self) -> None:
        """Copy the parameters, after all own pushes have been applied."""
        self._client.fetch(self.parameters)

    def look(self) -> None:
        """Do nothing: nothing is on the way."""

    def begin(self) -> None:
        """Wait until the last push has been applied, if the next gradient goes to the same place."""
        if self._steps == 0:
            self._client.settle()

    def accrue(self, pushing: bool) -> None:
        """Add the gradient to those of earlier steps, if it has been computed apart."""
        if self.gradient is not self._accrued:
            assert isinstance(self.gradient, np.ndarray)
            _add(self._accrued, self.gradient, first=self._steps == 0)
        self._steps += 1

    def push(self, outcome: Outcome, steps: int) -> None:
        """Send the accrued gradient."""
        self._client.push(self._accrued, outcome, steps)
        self._steps = 0

    def close(self) -> None:
        """Wait until all pushes have been applied."""
        self._client.settle()


class Concurrent:
    """What goes on while a gradient is computed: the next parameters arrive, and gradients leave.

    Within a host a fetch is a copy by a thread that releases the interpreter, and a push needs no thread: shards read
    the gradient in place.  To other hosts a second thread drives the transfers.

    Parameters
    ----------
    client
        Fetches and pushes.
    size, dtype
        Of the worker's flat vector.
    parts
        For each layer the range of the flat vector that holds its parameters.
    serve
        Called while the loop waits.
    """

    def __init__(
        self,
        client: Client,
        size: int,
        dtype: np.dtype[np.floating],
        parts: Sequence[range],
        serve: Callable[[], bool],
    ) -> None:
        client.divide(parts)
        self._client = client
        self._parts = parts
        self._serve = serve
        self._in_place = client.parameters is not None
        self.parameters = np.zeros(size, dtype) if client.parameters is None else client.parameters
        self._next = self.parameters if self._in_place else np.zeros(size, dtype)
        self._fetcher = ThreadPoolExecutor(1, "dbmpi-fetch")
        self._sender = ThreadPoolExecutor(1, "dbmpi-push")
        self._fetch: Future[list[int]] | None = None
        self._sending: list[Future[None]] = []
        self._first = True

    def fetch(self) -> None:
        """Make the fetch before this one current, and begin the next; the very first one is waited for."""
        if self._in_place:
            self._client.fetched(self._client.versions())
        elif self._first:
            self._client.fetch(self.parameters)
        else:
            self._take()
            self._fetch = self._fetcher.submit(self._client.copy, self._next)
        self._first = False

    def look(self) -> None:
        """Make a fetch current that has ended meanwhile."""
        if self._fetch is not None and self._fetch.done():
            self._take()

    def close(self) -> None:
        """Wait until all pushes have been applied and the last fetch has ended."""
        self._take()
        for future in self._sending:
            waiting.until(future.done, "gradients to leave", serve=self._serve)
            future.result()
        self._client.settle()
        self._fetcher.shutdown()
        self._sender.shutdown()

    def _take(self) -> None:
        """Make what a fetch on the way brings current."""
        if self._fetch is not None:
            waiting.until(self._fetch.done, "parameters to arrive", serve=self._serve)
            self._client.fetched(self._fetch.result())
            self.parameters, self._next = self._next, self.parameters
            self._fetch = None

    def _drive(self) -> None:
        """See that what was posted leaves, without waiting for it."""
        if not self._client.far:
            self._client.progress()
        else:
            for ended in [future for future in self._sending if future.done()]:
                ended.result()
                self._sending.remove(ended)
            self._sending.append(self._sender.submit(self._client.drain))


class Overlapped(Concurrent):
    """All at once: while a gradient is computed, the next parameters arrive and the last gradient leaves.

    There are two accrued gradients: one is computed while the shards take the other one in, so that nothing is lost or
    sent twice; and two vectors of parameters: a fetch fills one and it becomes current between two steps, at the next
    fetch point at the latest.  The layers of a gradient leave as backward completes them.  A client's own last push may
    be missing in what it fetches.

    Parameters
    ----------
    client, size, dtype, parts, serve
        See `Concurrent`.
    apart
        Whether the gradient of each step is needed by itself before it is accrued.
    """

    def __init__(
        self,
        client: Client,
        size: int,
        dtype: np.dtype[np.floating],
        parts: Sequence[range],
        serve: Callable[[], bool],
        *,
        apart: bool = False,
    ) -> None:
        super().__init__(client, size, dtype, parts, serve)
        # One accrued gradient grows and one leaves; the marks say what must be applied before each is used again.
        self._growing, self._leaving = list(client.gradients) or [np.zeros(size, dtype) for _ in range(2)]
        self._marks: list[Mark] = [client.mark(), client.mark()]
        self._scratch = np.zeros(size, dtype) if apart else None
        self.gradient: Gradient = self._growing if self._scratch is None else self._scratch
        self.on_gradient: Callable[[int], None] | None = self._complete
        self._steps = 0
        self._posting = False

    @property
    def add(self) -> bool:
        """Whether the next gradient is to be added to those of earlier steps."""
        return self._scratch is None and self._steps > 0

    def begin(self) -> None:
        """Wait until the shards have taken in what was accrued in the same place, two pushes ago."""
        if self._steps == 0:
            self._client.wait(self._marks[0], self._serve)

    def accrue(self, pushing: bool) -> None:
        """Add a gradient that has been computed apart; in a step that pushes, layers have been added one by one."""
        if self._scratch is not None and not pushing:
            _add(self._growing, self._scratch, first=self._steps == 0)
        self._steps += 1

    def push(self, outcome: Outcome, steps: int) -> None:
        """Send what has not left yet, and let the two accrued gradients change places."""
        if not self._posting:
            for layer in reversed(range(len(self._parts))):
                self._post(layer)
        self._client.report(outcome, steps)
        self._drive()
        self._posting = False
        self._marks = [self._marks[1], self._client.mark()]
        self._growing, self._leaving = self._leaving, self._growing
        if self._scratch is None:
            self.gradient = self._growing
        self._steps = 0

    def _complete(self, layer: int) -> None:
        """Send a layer's accrued gradient, now that the last step's is complete."""
        if self._scratch is not None:
            part = slice(self._parts[layer].start, self._parts[layer].stop)
            _add(self._growing[part], self._scratch[part], first=self._steps == 0)
        self._posting = True
        self._post(layer)

    def _post(self, layer: int) -> None:
        self._client.post(self._growing[self._parts[layer].start : self._parts[layer].stop], layer)
        self._drive()


class Layerwise(Concurrent):
    """No gradient is ever there as a whole: each layer's leaves when it is complete, and makes room for others.

    With ``overlap=False`` a fetch waits for the own pushes, and one client is serial learning, bit for bit: a layer's
    parameters may change as soon as backward needs them no more.  With it, a fetch goes on meanwhile.

    Parameters
    ----------
    client, size, dtype, parts, serve
        See `Concurrent`.
    overlap
        Whether fetches and pushes go on while a gradient is computed.
    pushing
        Entered while a layer waits for its room: whose time it is.
    """

    def __init__(
        self,
        client: Client,
        size: int,
        dtype: np.dtype[np.floating],
        parts: Sequence[range],
        serve: Callable[[], bool],
        *,
        overlap: bool,
        pushing: AbstractContextManager[None],
    ) -> None:
        super().__init__(client, size, dtype, parts, serve)
        self._overlap = overlap
        self._room = Room(client, parts, dtype, serve, pushing)
        self.gradient: Gradient = self._room
        self.on_gradient: Callable[[int], None] | None = self._complete
        self.add = False

    def fetch(self) -> None:
        """Get parameters: at once, after all own pushes have been applied, or as they arrive."""
        if self._overlap:
            super().fetch()
        else:
            self._client.fetch(self.parameters)

    def begin(self) -> None:
        """Do nothing: what waits is a layer for its room."""

    def accrue(self, pushing: bool) -> None:
        """Do nothing: every step pushes, and its layers are on their way."""

    def push(self, outcome: Outcome, steps: int) -> None:
        """Report the steps, and send what has not left yet."""
        self._client.report(outcome, steps)
        if self._overlap:
            self._drive()
        else:
            self._client.drain(self._serve)

    def _complete(self, layer: int) -> None:
        self._room.post(layer)
        if self._overlap:
            self._drive()
        else:
            self._client.progress()


def _add(accrued: np.ndarray, gradient: np.ndarray, *, first: bool) -> None:
    if first:
        np.copyto(accrued, gradient)
    else:
        updates.add(accrued, gradient)
